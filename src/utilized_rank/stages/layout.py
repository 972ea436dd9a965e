"""Laying a study out: its home, and in it the parameters and a copy of the one pipeline that all studies run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ..base.files import write_text
from ..base.sections import StudyError
from ..study.homes import compose, default_study

PIPELINE = "dvc.yaml"


def lay_out(root: Path, name: str) -> tuple[Path, list[str]]:
    """Compose the parameters of a study anew, in its home; make the home where there is none yet.

    Args:
        root: the project's root.
        name: of the study, a file of ``conf/study``.

    Returns:
        The home, and what changed in parameters that were there, a line each.

    Raises:
        StudyError: as :func:`utilized_rank.study.homes.compose`.
    """
    home = root if name == default_study(root) else root / "reports" / name
    _, text = compose(name, root, home.relative_to(root))
    if home != root:
        write_text(home / PIPELINE, (root / PIPELINE).read_text())
    params = home / "params.yaml"
    before = YAML(typ="safe").load(params.read_text()) if params.is_file() else None
    write_text(params, text)
    return home, [] if before is None else [*_changes(before, YAML(typ="safe").load(text))]


def check_pipeline(root: Path, home: Path) -> None:
    """Refuse a copy of the pipeline that is not as the project's own.

    Raises:
        StudyError: it is not.
    """
    if (home / PIPELINE).read_bytes() != (root / PIPELINE).read_bytes():
        place = home.relative_to(root)
        raise StudyError(f"{place / PIPELINE} is not as {PIPELINE}: run `utilized-rank study {home.name}`")


def _changes(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """The differences of two parameter trees, a line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _changes(before.get(key), after.get(key), f"{where}.{key}" if where else str(key))
    elif before != after:
        yield f"{where}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    return "{...}" if isinstance(value, dict) else str(value)
