"""The command ``doctor``: what this machine offers, as a report of a mistake wants it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..base.runtime import DEVICE, device_name, processor
from ..base.sections import StudyError
from ..networks.precision import resolved
from ..study.homes import project_root, study_home

PACKAGES = ("utilized-rank", "torch", "torchvision", "timm", "numpy", "dvc", "papermill", "onnxruntime")


def report() -> str:
    """One line a fact."""
    return "\n".join(f"{name:<22}{fact}" for name, fact in _facts().items())


def _facts() -> dict[str, str]:
    gpus = [device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    kinds = ["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(gpus)), *(["mps"] if _has_mps() else [])]
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": _memory(),
        "threads": f"{torch.get_num_threads()} (torch)",
        "devices": ", ".join(kinds),
        DEVICE: os.environ.get(DEVICE, "not set (auto)"),
        "precision auto is": ", ".join(f"{resolved('auto', kind)} on {kind}" for kind in _types(gpus)),
        **{name: _version(name) for name in PACKAGES},
        "dvc on the path": shutil.which("dvc") or "no: activate the environment (source .venv/bin/activate)",
        "free disk here": f"{free:.0f} GiB",
        "timm's weights": _cache(Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()),
        "torchvision's weights": _cache(Path(torch.hub.get_dir(), "checkpoints")),
        "study": _study(),
        "environment": sys.prefix,
    }


def _types(gpus: list[str]) -> list[str]:
    return ["cpu", *(["cuda"] if gpus else [])]


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _memory() -> str:
    if importlib.util.find_spec("psutil") is None:
        return "unknown (psutil is not installed)"
    import psutil

    its = psutil.virtual_memory()
    return f"{its.total / 2**30:.0f} GiB, {its.available / 2**30:.0f} free"


def _cache(folder: Path) -> str:
    count = sum(1 for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return f"{folder}, {count} files"


def _study() -> str:
    try:
        home = study_home(project_root())
    except StudyError as error:
        return f"none here ({error})"
    return str(home)
