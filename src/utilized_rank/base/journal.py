"""What a stage has finished so far, kept beside its outputs: an interrupted one goes on there.

DVC deletes the outputs of a stage before it runs it again, so that a journal is none of them. Whoever starts a stage
names its folder in the environment, after everything that the result depends on; without that nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import Damaged, read_json, read_tensors, write_json, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FOLDER = "UTILIZED_RANK_JOURNAL"
"""The environment variable that names the folder of a stage's journal."""
EVERY, SHARE = 30.0, 0.01
"""Seconds, at least, from one time of writing to the next; and the part of the time, at most, that goes into it."""
WHERE = "where.json"
"""In the folder of a journal: how far it had come, for people."""

Entry = tuple["dict[str, Tensor]", dict[str, Any]]
"""Tensors, and what else is known, as JSON."""


class Journal:
    """Finished and half-finished pieces of work, by name.

    Entries are kept in memory until they are written: at most every :data:`EVERY` seconds.

    Args:
        folder: of its files; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._unwritten: dict[str, Entry] = {}
        self._next = time.monotonic() + EVERY
        self._where = ""

    def get(self, name: str) -> Entry | None:
        """What is known of a piece of work, from this execution or an interrupted one; None: nothing.

        A file that is damaged is named on standard error and dropped.
        """
        if name in self._unwritten or self._folder is None:
            return self._unwritten.get(name)
        path = _path(self._folder, name)
        try:
            return read_tensors(path) if path.is_file() else None
        except Damaged as error:
            print(f"{error}: that piece of work begins anew", file=sys.stderr)
            path.unlink()
            return None

    @property
    def keeps(self) -> bool:
        """Whether anything is kept."""
        return self._folder is not None

    @property
    def due(self) -> bool:
        """Whether something that is put now would be written."""
        return self._folder is not None and time.monotonic() >= self._next

    def put(self, name: str, tensors: dict[str, Tensor], known: dict[str, Any], where: str) -> None:
        """Keep what is known of a piece of work.

        Args:
            name: of the piece.
            tensors: not to be changed until they are written.
            known: anything else, as JSON.
            where: how far the work is, for people: said when it goes on from there.
        """
        if self._folder is None:
            return
        self._unwritten[name] = tensors, known
        self._where = where
        if self.due:
            self._write(self._folder)

    def _write(self, folder: Path) -> None:
        began = time.monotonic()
        try:
            for name, entry in self._unwritten.items():
                write_tensors(_path(folder, name), *entry)
            write_json(folder / WHERE, self._where)
        except OSError as error:  # a full disk: the work itself may still come to its end
            print(f"progress is not kept: {error}", file=sys.stderr)
        else:
            self._unwritten.clear()
        now = time.monotonic()
        self._next = now + max(EVERY, (now - began) / SHARE)


NOTHING_KEPT = Journal()


def _path(folder: Path, name: str) -> Path:
    return folder / f"{_hashed(name)}.safetensors"


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def current() -> Journal:
    """The journal of the stage that runs, on the device where it runs."""
    from .runtime import device, device_name

    folder = os.environ.get(FOLDER)
    return Journal(Path(folder, _hashed(device_name(device()))) if folder else None)


def where(folder: Path) -> str | None:
    """How far the execution had come whose journal lies in ``folder``; None where there is none."""
    for path in folder.rglob(WHERE):
        try:
            return str(read_json(path))
        except (OSError, ValueError):
            pass
    return None


class Answers:
    """Questions that have one answer each: asked again, none of them is worked out again.

    A copy in another process knows what is known by now, and keeps nothing.

    Args:
        journal: where they are kept.
        name: of the piece of work.
    """

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name
        found = journal.get(name)
        self._known: dict[str, Any] = {} if found is None else found[1]["answers"]

    def __call__(self, question: Any, work_out: Callable[[], Any]) -> Any:
        """The answer (JSON) to a question (JSON): the one of the interrupted execution, or what is worked out now."""
        asked = json.dumps(question)
        if asked not in self._known:
            self._known[asked] = work_out()
            where = f"{self._name}, question {len(self._known)}"
            self._journal.put(self._name, {}, {"answers": self._known}, where)
        return self._known[asked]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_journal": NOTHING_KEPT}


def random_state(generator: torch.Generator) -> dict[str, Tensor]:
    """The states of all random numbers, as tensors."""
    import numpy as np
    import torch

    version, numbers, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002  (libraries draw from it)
    state = {
        "random.python": torch.tensor([version, *numbers], dtype=torch.int64),
        "random.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "random.numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "random.numpy_rest": torch.tensor(
            [legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]], dtype=torch.float64
        ),
        "random.torch": torch.get_rng_state(),
        "random.own": generator.get_state(),
    }
    if torch.cuda.is_available():
        state |= {f"random.cuda{i}": its for i, its in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_random_state(state: dict[str, Tensor], generator: torch.Generator) -> None:
    """Go on with the random numbers of :func:`random_state`."""
    import numpy as np
    import torch

    version, *numbers = state["random.python"].tolist()
    random.setstate((version, tuple(numbers), next(iter(state["random.gauss"].tolist()), None)))
    pos, has_gauss, gauss = state["random.numpy_rest"].tolist()
    key = state["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(pos), int(has_gauss), gauss))  # noqa: NPY002
    torch.set_rng_state(state["random.torch"])
    generator.set_state(state["random.own"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state[f"random.cuda{i}"] for i in range(torch.cuda.device_count())])
