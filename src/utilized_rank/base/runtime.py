"""How torch computes in this process: threads and seeds."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils import deterministic


def start(threads: int, seed: int, purpose: str) -> torch.Generator:
    """Fix threads and algorithms of this process, then seed it as :func:`seeded` does."""
    torch.set_num_threads(threads)
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
    torch.manual_seed(its)
    return torch.Generator().manual_seed(its)


def derived_seed(seed: int, purpose: str) -> int:
    """A 32-bit seed that depends on the study's seed and on what it is for."""
    entropy = np.random.SeedSequence([seed, *purpose.encode()])
    return int(entropy.generate_state(1)[0])
