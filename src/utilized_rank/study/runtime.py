"""How torch computes in this process: threads and seeds."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils import deterministic

from .config import Study


def start(study: Study, purpose: str) -> torch.Generator:
    """Fix threads and algorithms, and seed every generator for one ``purpose`` of the study.

    Two purposes (say ``"train vgg11"`` and ``"train resnet20"``) draw unrelated numbers, so that
    adding a run changes no other. Returns the generator to draw from.
    """
    torch.set_num_threads(study.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Algorithms alone decide the result; filling every fresh tensor as well would cost a pass over it.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed = derived_seed(study.seed, purpose)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries draw from it)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def derived_seed(seed: int, purpose: str) -> int:
    """A 32-bit seed that depends on the study's seed and on what it is for."""
    entropy = np.random.SeedSequence([seed, *purpose.encode()])
    return int(entropy.generate_state(1)[0])
