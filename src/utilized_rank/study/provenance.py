"""What a result came from: hashes of code, parameters and data, versions, processor, threads, seed."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..base.files import tree_hash
from ..base.runtime import device as runtime_device
from ..base.runtime import device_name, processor
from ..networks.precision import resolved
from .config import Study

PACKAGES = ("torch", "torchvision", "timm", "lightly", "kornia", "numpy", "scipy", "scikit-learn", "dvc", "papermill")


def parameter_hash(study: Study) -> str:
    """SHA-256 of all parameters, defaults included."""
    return hashlib.sha256(json.dumps(study.model_dump(), sort_keys=True).encode()).hexdigest()


def provenance(study: Study, data: list[Path], root: Path) -> dict[str, Any]:
    """The record that lies beside a study's results.

    Args:
        study: its parameters.
        data: the files that hold its images and splits.
        root: the project's root.

    A git revision is left out on purpose: committing the record would change it.
    """
    root, device = root.absolute(), runtime_device()
    code = [*root.glob("src/**/*.py"), *root.glob(f"data/{study.name}/notebooks/*.ipynb")]  # the notebooks as they run
    return {
        "study": study.name,
        "title": study.title,
        "code": tree_hash(code, root),
        "parameters": parameter_hash(study),
        "data": tree_hash([path.absolute() for path in data], root),
        "seed": study.seed,
        "precision": {
            "training": resolved(study.precision, device.type),
            "rank search": resolved(study.measure.precision, device.type),
            "evaluation": "float32",
            "sums of second moments": "float64",
        },
        "device": device.type if device.type == "cpu" else f"{device.type} ({device_name(device)})",
        "threads": study.threads,
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
