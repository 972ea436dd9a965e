"""DVC writes its lock in place: killed meanwhile, it leaves a part of it that it will not read again."""

from __future__ import annotations

import re
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..base.files import write_text

LOCK = "dvc.lock"


def mend(home: Path) -> str | None:
    """Keep the entries of a broken lock that are whole: the stages of the others come back from DVC's run cache.

    Args:
        home: the folder of the study.

    Returns:
        What was done, for people; None where the lock is whole, or there is none.
    """
    path = home / LOCK
    if not path.is_file():
        return None
    text = path.read_bytes().decode(errors="replace")
    lines = text[: text.rfind("\n") + 1]
    if lines == text and _is_whole(text):
        return None
    head, *entries = re.split(r"(?m)^(?=  \S)", lines)
    whole = [entry for entry in entries if _is_whole(head + entry)]
    if whole:
        write_text(path, head + "".join(whole))
    else:
        path.unlink()
    return f"{LOCK} was cut short: {len(whole)} of its entries are whole and stay, the rest is looked at again"


def _is_whole(text: str) -> bool:
    """Whether DVC would read it."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        lock = COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))
    except (YAMLError, Invalid):
        return False
    return bool(lock.get("stages"))
