"""How torch computes in this process: device, threads and seeds."""

from __future__ import annotations

import os
import platform
import random
from pathlib import Path

import numpy as np
import torch
from torch.utils import deterministic

from .sections import StudyError

DEVICE = "UTILIZED_RANK_DEVICE"
"""Where a study runs is no parameter of it: an environment variable says so, and no hash depends on it."""


def device(asked: str | None = None) -> torch.device:
    """Where a study runs: ``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Args:
        asked: one of them; what the environment variable says where it is None, ``auto`` without it.

    Raises:
        StudyError: there is no such device.
    """
    where = "" if asked else f"{DEVICE}: "
    asked = asked or os.environ.get(DEVICE) or "auto"
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(asked)
    except RuntimeError:
        raise StudyError(f"{where}there is no kind of device {asked!r} (auto, cpu, cuda, cuda:1, mps)") from None
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (found.index or 0) >= count.get(found.type, 0):
        raise StudyError(f"{where}this machine, as torch sees it, has no {asked} (cpu is always there)")
    return found


def device_name(its: torch.device) -> str:
    """What a device is called by its maker."""
    if its.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(its)
    return processor()


def processor() -> str:
    """The processor's model name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def start(threads: int, seed: int, purpose: str) -> torch.Generator:
    """Fix threads and algorithms of this process, then seed it as :func:`seeded` does."""
    torch.set_num_threads(threads)
    # On CUDA: products that repeat (cuBLAS asks for it by this variable), and float32 that is meant.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Algorithms alone decide the result; filling every fresh tensor as well would cost a pass over it.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return seeded(seed, purpose)


def seeded(seed: int, purpose: str) -> torch.Generator:
    """Seed every generator for one ``purpose`` of a study; returns the generator to draw from.

    Two purposes (say ``"train vgg11"`` and ``"train resnet20"``) draw unrelated numbers, so that
    adding a run changes no other.
    """
    its = derived_seed(seed, purpose)
    random.seed(its)
    np.random.seed(its)  # noqa: NPY002  (libraries draw from it)
    torch.manual_seed(its)  # of every device
    return torch.Generator().manual_seed(its)


def derived_seed(seed: int, purpose: str) -> int:
    """A 32-bit seed that depends on the study's seed and on what it is for."""
    entropy = np.random.SeedSequence([seed, *purpose.encode()])
    return int(entropy.generate_state(1)[0])
