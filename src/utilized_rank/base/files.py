"""Files that are written whole or not at all, and to the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sections import StudyError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn


NAMES = ("layer", "run", "kind", "form", "method", "subspace")
"""Columns of tables that hold names."""


class Damaged(StudyError):
    """A file that is not as it was written."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; move it there, on the disk, when the block ends well, else drop it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o644)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # before its name: a name without its bytes is what a crash would leave
        partial.replace(path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk does not say which file
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
    """Write tensors as safetensors; ``metadata`` is kept in the header as JSON, and a hash of all that beside it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = json.dumps(metadata or {}, sort_keys=True)
    with whole(path) as partial:
        try:
            save_file(plain, partial, metadata={"json": described, "sha256": _content_hash(plain, described)})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error})") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata that :func:`write_tensors` wrote (or any safetensors file).

    Raises:
        Damaged: it is cut short, or its content is not what its hash says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except SafetensorError as error:
        raise Damaged(f"{path} is no whole safetensors file ({error})") from None
    described = header.get("json", "{}")
    if header.get("sha256", expected := _content_hash(tensors, described)) != expected:
        raise Damaged(f"{path} is damaged: its content is not what its hash says")
    return tensors, json.loads(described)


def _content_hash(tensors: dict[str, Tensor], described: str) -> str:
    """SHA-256 over names, types, shapes and values, and what is said of them."""
    import torch

    found = hashlib.sha256(described.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_network(path: Path, network: nn.Module, metadata: dict[str, Any] | None = None) -> None:
    """Write a network's parameters and buffers."""
    # A module under two names has its tensors twice in the file: safetensors takes no shared memory.
    write_tensors(path, {name: tensor.clone() for name, tensor in network.state_dict().items()}, metadata)
