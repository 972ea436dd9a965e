"""Where results lie, and how they are written: whole or not at all, and to the same bytes each time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Study, StudyError
from .homes import load_study, project_root, study_home

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn


NAMES = ("layer", "run", "kind", "form", "method", "subspace")
"""Columns of tables that hold names."""


@dataclass(frozen=True)
class Store:
    """The folders of one study.

    ``data/<study>/`` holds what DVC caches, ``reports/<study>/`` the small text and pictures that
    git keeps, and ``data/<study>/timings/`` what differs from one execution to the next.
    """

    study: str
    root: Path = Path()

    def data(self, *parts: str) -> Path:
        """A path under ``data/<study>/``."""
        return self.root.joinpath("data", self.study, *parts)

    def report(self, *parts: str) -> Path:
        """A path under ``reports/<study>/``."""
        return self.root.joinpath("reports", self.study, *parts)


def open_study(name: str | None = None) -> tuple[Study, Store]:
    """The parameters and folders of a study: the one around the working directory, or the one of that name.

    Tolerances that it leaves to its search split are in place as soon as the images are split.

    Raises:
        StudyError: as :func:`utilized_rank.study.homes.study_home` and ``load_study`` there; or the parameters are
            another study's.
    """
    root = project_root()
    home = study_home(root, name)
    study = load_study(home)
    params = (home / "params.yaml").relative_to(root).as_posix()
    if study.params != params or study.name != (name or study.name):
        raise StudyError(
            f"{params} says name: {study.name} and params: {study.params}, which it is not: "
            f"run `utilized-rank study {name or home.name}`"
        )
    store = Store(study.name, root)
    splits = store.data("prepare", "splits.json")
    if not study.measure.epsilons and splits.is_file():
        indices = read_json(splits)
        smallest = min(len(indices[name]) for name in ("search", "test_searched") if name in indices)
        measure = study.measure.resolved(smallest)
        study = study.model_copy(update={"measure": measure})
    return study, store


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it there when the block ends well, else drop it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, with one newline at its end."""
    with whole(path) as partial:
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False))


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write ``table`` as CSV, floats to ten significant digits."""
    write_text(path, table.to_csv(index=False, float_format="%.10g"))


def read_table(path: Path) -> pd.DataFrame:
    """Read what :func:`write_table` wrote; names stay names, also those that look like numbers or "NA"."""
    import pandas as pd

    return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write tensors as safetensors; ``metadata`` is kept in the header as JSON."""
    from safetensors.torch import save_file

    header = {"json": json.dumps(metadata or {}, sort_keys=True)}
    with whole(path) as partial:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, metadata=header)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata that :func:`write_tensors` wrote (or any safetensors file)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = (file.metadata() or {}).get("json", "{}")
    return tensors, json.loads(header)


def write_network(path: Path, network: nn.Module, metadata: dict[str, Any] | None = None) -> None:
    """Write a network's parameters and buffers."""
    # A module under two names has its tensors twice in the file: safetensors takes no shared memory.
    write_tensors(path, {name: tensor.clone() for name, tensor in network.state_dict().items()}, metadata)
