"""DVC takes what lies read-only in its cache for whole: what is damaged there would come back as a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from .lock import LOCK


def drop_damaged(root: Path, home: Path) -> list[str]:
    """Remove what is damaged in DVC's cache of what a study's lock names, so that its stage runs again.

    What lies in the workspace is removed too where it is a link to such an entry or a copy of it. Every entry is read,
    a few seconds a GiB. What a stage made meanwhile of a damaged input is not seen.

    Args:
        root: the project's root.
        home: the folder of the study.

    Returns:
        What was removed, for people: a line each.
    """
    if not (home / LOCK).is_file():
        return []
    cache = _cache(root)
    contents: dict[Path, str] = {}
    removed = []
    for stage, entry in YAML(typ="safe").load((home / LOCK).read_text())["stages"].items():
        for out in entry.get("outs", []):
            # As in dvc.yaml, paths are told from the project's root.
            for name, path in _named(cache, out["md5"], root / out["path"]):
                there, whole = cache / name[:2] / name[2:], name.removesuffix(".dir")
                if there not in contents and there.is_file():
                    contents[there] = _md5(there)
                if (content := contents.get(there, whole)) != whole:
                    if path.is_file() and _md5(path) == content:
                        path.unlink()
                    there.unlink(missing_ok=True)
                    place = path.relative_to(root)
                    removed.append(f"removed {place} from DVC's cache, where it was damaged: {stage} runs again")
    return removed


def _named(cache: Path, name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """An entry of the cache and where it belongs in the workspace; after a folder, the files that it lists."""
    yield name, path
    listed = cache / name[:2] / name[2:]
    if name.endswith(".dir") and listed.is_file():
        yield from ((file["md5"], path / file["relpath"]) for file in json.loads(listed.read_text()))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _cache(root: Path) -> Path:
    from dvc.config import Config

    where = Config(str(root / ".dvc"))["cache"].get("dir")
    return Path(where or root / ".dvc" / "cache") / "files" / "md5"
