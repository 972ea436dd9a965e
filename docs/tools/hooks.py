"""What mkdocs needs of the project beside the pages: where examples import from, and the figures of a report."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIGURES = ROOT / "reports" / "digits" / "figures"


def on_startup(**_: Any) -> None:
    """Let examples import ``example``, and let the command line write lines that fit a page."""
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    os.environ |= {"TERMINAL_WIDTH": "84", "NO_COLOR": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    warnings.filterwarnings("ignore")
    for name in ("torch", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    torch.set_num_threads(1)


def on_files(files: Files, config: Any) -> Files:
    """Put the figures of the committed report beside the pages that explain them."""
    for path in sorted(FIGURES.glob("*.svg")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files
