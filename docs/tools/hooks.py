"""What mkdocs needs of the project beside the pages: where examples import from, and the figures of a report."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYODIDE = "_markdown_exec_pyodide"
FIGURES = ROOT / "reports" / "digits" / "figures"


def on_startup(**_: Any) -> None:
    """Let examples import ``example``, and let the command line write lines that fit a page."""
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    os.environ |= {"TERMINAL_WIDTH": "84", "NO_COLOR": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    import torch

    torch.set_num_threads(1)


def on_env(env: Any, config: Any, **_: Any) -> Any:
    """Link nothing of Pyodide, which no page uses: it would ask another host for styles."""
    config.extra_css = [its for its in config.extra_css if PYODIDE not in str(its)]
    config.extra_javascript = [its for its in config.extra_javascript if PYODIDE not in str(its)]
    return env


def on_post_build(config: Any, **_: Any) -> None:
    """Leave nothing of it in the site."""
    for path in Path(config.site_dir, "assets").glob(f"{PYODIDE}.*"):
        path.unlink()


def on_files(files: Files, config: Any) -> Files:
    """Put the figures of the committed report beside the pages that explain them."""
    for path in sorted(FIGURES.glob("*.svg")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files
