"""Where the files of a study lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


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

    @property
    def main(self) -> Path:
        """Where the paths that a study names are relative to, of raw images and checkpoints: see :func:`main_root`."""
        return main_root(self.root)


def main_root(root: Path) -> Path:
    """The project that the paths of a study are relative to: ``root``, but for experiments in a folder of their own.

    What git ignores, as raw images and checkpoints, is not there when DVC runs an experiment from its queue or with
    ``--temp``: it stays in the project that DVC was called in, which DVC names in DVC_ROOT.
    """
    called_in = os.environ.get("DVC_ROOT")
    if called_in and root.resolve().is_relative_to(Path(called_in).resolve() / ".dvc" / "tmp"):
        return Path(called_in)
    return root
