"""Files that are written whole or not at all, and to the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from .sections import Section, StudyError, suggestion

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn


NAMES = ("layer", "run", "kind", "form", "method", "subspace")
"""Columns of tables that hold names."""


HASH = "sha256"
"""Of a file of tensors, in its metadata."""
AGAIN = "what wrote it has to run again (of a study: `dvc repro`)"


class Damaged(StudyError, ValueError):
    """A file that is not as it was written."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_hash(paths: list[Path], root: Path) -> str:
    """SHA-256 over the names (relative to ``root``) and contents of files, in sorted order."""
    lines = [f"{path.relative_to(root).as_posix()} {file_hash(path)}" for path in sorted(paths)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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


def read_json(path: Path, schema: Any = None) -> Any:
    """Read what :func:`write_json` wrote.

    Args:
        path: of the file.
        schema: the type that its content is of; None: any.

    Raises:
        Damaged: it is no JSON, or not of that type.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Damaged(f"{path} is no JSON ({error}): {AGAIN}") from None
    if schema is not None:
        try:
            TypeAdapter(schema).validate_python(value)
        except ValidationError as error:
            raise Damaged(f"{path}: {_first(error)}: {AGAIN}") from None
    return value


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write ``table`` as CSV, floats to ten significant digits."""
    write_text(path, table.to_csv(index=False, float_format="%.10g"))


def read_table(path: Path, schema: type[Section] | None = None) -> pd.DataFrame:
    """Read what :func:`write_table` wrote; names stay names, also those that look like numbers or "NA".

    Args:
        path: of the file.
        schema: what each row is, column by column; None: anything.

    Raises:
        Damaged: it is cut short, or a column or a row is not of the schema.
    """
    import pandas as pd

    if schema is not None:
        _check_rows(path, schema)
    return pd.read_csv(path, dtype=dict.fromkeys(NAMES, str), keep_default_na=False, na_values=[""])


def _check_rows(path: Path, schema: type[Section]) -> None:
    """Raises Damaged; checked is the text, as in numbers that pandas made of it a word has made words of its column."""
    fields = schema.model_fields
    try:
        text = path.read_text(encoding="utf-8")
        header, *lines = list(csv.reader(io.StringIO(text), strict=True)) or [[]]
    except (ValueError, csv.Error) as error:
        raise Damaged(f"{path} is no table ({error}): {AGAIN}") from None
    for column in [*header, *fields]:
        if column not in fields:
            raise Damaged(f"{path} has an unknown column {column!r}{suggestion(column, fields)}: {AGAIN}")
        if header.count(column) != 1 and (column in header or fields[column].is_required()):
            raise Damaged(f"{path} has {header.count(column)} columns {column!r} in place of one: {AGAIN}")
    if not text.endswith("\n"):
        raise Damaged(f"{path} is cut short in line {len(lines) + 1}: {AGAIN}")
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(header):
            raise Damaged(f"{path}, line {number}: {len(cells)} cells in place of {len(header)}: {AGAIN}")
        try:
            schema.model_validate({name: cell or None for name, cell in zip(header, cells, strict=True)})
        except ValidationError as error:
            raise Damaged(f"{path}, line {number}: {_first(error)}: {AGAIN}") from None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    found = error.errors()[0]
    where = ".".join(str(part) for part in found["loc"])
    if found["type"] in ("missing", "extra_forbidden"):
        return f"{where} is {'missing' if found['type'] == 'missing' else 'unknown'}"
    return f"{where} is {found['input']!r}: {found['msg']}" if where else str(found["ctx"]["error"])


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
    """Write tensors as safetensors; ``metadata`` is kept in the header as JSON, and in it a hash of all there is."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    known = metadata or {}
    # One entry: safetensors writes several in an order that is another each time.
    header = {"json": json.dumps({**known, HASH: _content_hash(plain, known)}, sort_keys=True)}
    with whole(path) as partial:
        try:
            save_file(plain, partial, metadata=header)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata that :func:`write_tensors` wrote (or any safetensors file).

    Raises:
        Damaged: it is cut short, or its content is not what its hash says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            known = json.loads((file.metadata() or {}).get("json", "{}"))
    except (SafetensorError, ValueError) as error:
        raise Damaged(f"{path} is no whole safetensors file ({error})") from None
    if known.pop(HASH, None) not in (None, _content_hash(tensors, known)):
        raise Damaged(f"{path} is damaged: its content is not what its hash says")
    return tensors, known


def _content_hash(tensors: dict[str, Tensor], known: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and values, and what is said of them."""
    import torch

    found = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_network(path: Path, network: nn.Module, metadata: dict[str, Any] | None = None) -> None:
    """Write a network's parameters and buffers."""
    # A module under two names has its tensors twice in the file: safetensors takes no shared memory.
    write_tensors(path, {name: tensor.clone() for name, tensor in network.state_dict().items()}, metadata)
