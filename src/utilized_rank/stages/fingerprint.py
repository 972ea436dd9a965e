"""What the result of a stage depends on, as one hash: no progress is taken up that belongs to another."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ..base.files import tree_hash
from ..base.store import Store
from ..study.config import Study
from .layout import PIPELINE


def fingerprint(study: Study, store: Store, stage: str, key: str | None) -> str:
    """Of the dependencies and parameters that ``dvc.yaml`` names, and of versions and threads: hexadecimal.

    On which device it runs, the stage itself finds out.
    """
    load = YAML(typ="safe").load
    parameters = load((store.root / study.params).read_text())
    declared = load((store.root / PIPELINE).read_text())["stages"][stage]
    item = _value(parameters, f"{declared['foreach'][2:-1]}.{key}") if key is not None else None
    declared = declared.get("do", declared)
    names = {**parameters, "key": key, "item": item}

    def filled(text: str) -> str:
        return re.sub(r"\$\{([\w.]+)\}", lambda match: str(_value(names, match[1])), text)

    asked = [filled(name) for file in declared.get("params", []) for name in next(iter(file.values()))]
    found = {
        "files": {name: _hash(store.root / name) for name in map(filled, declared["deps"])},
        "parameters": {name: _value(parameters, name) for name in asked},
        "python": platform.python_version(),
        "torch": version("torch"),
        "threads": [study.threads, os.environ.get("OMP_NUM_THREADS")],
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()


def _value(tree: Any, name: str) -> Any:
    """A value by its keys, with dots between them; None where it is not there: then its default counts."""
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _hash(path: Path) -> str:
    files = [path] if path.is_file() else [its for its in path.rglob("*") if its.is_file() and its.suffix != ".pyc"]
    return tree_hash(files, path.parent)
