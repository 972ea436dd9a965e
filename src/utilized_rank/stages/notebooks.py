"""Stages are notebooks: stripped before they are depended on, executed by papermill, stable to the byte."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from ..base import journal
from ..base.files import write_json, write_text
from ..base.sections import StudyError
from ..base.store import Store
from ..study.config import Study
from . import watch
from .fingerprint import fingerprint

STAGES: dict[str, tuple[str, str] | None] = {
    "prepare": None,
    "pretrain": ("encoder", "pretrained"),
    "train": ("run", "runs"),
    "measure": ("run", "runs"),
    "ssl_vs_supervised": ("comparison", "comparisons"),
    "decompose": ("run", "runs"),
    "finetune": ("run", "runs"),
    "frontier": ("run", "frontier"),
    "report": None,
}
"""The stages in their order; the parameter that each notebook takes, and the section of the study with its values."""
JOURNALS = "journal"
"""In the study's data: of each stage that was interrupted a folder, and in it one of what its result depends on."""


def source(store: Store, stage: str) -> Path:
    """The stripped notebook of ``stage``, which :func:`strip_all` writes."""
    return store.data("notebooks", f"{[*STAGES].index(stage) + 1}_{stage}.ipynb")


def strip_all(store: Store) -> None:
    """Copy the stages' notebooks into the study's data without outputs: saving one in Jupyter changes no stage."""
    for stage in STAGES:
        to = source(store, stage)
        notebook = stripped(nbformat.read(store.root / "notebooks" / to.name, as_version=4))
        write_text(to, nbformat.writes(notebook))


def stripped(notebook: NotebookNode) -> NotebookNode:
    """A notebook with its sources and tags only; cells are numbered."""
    cells = [_stripped_cell(cell, number) for number, cell in enumerate(notebook.cells)]
    return nbformat.v4.new_notebook(cells=cells, metadata={})


def _stripped_cell(cell: NotebookNode, number: int) -> NotebookNode:
    make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
    tags = cell.metadata.get("tags", [])
    return make(cell.source, metadata={"tags": tags} if tags else {}, id=f"cell-{number}")


def executed_name(stage: str, key: str | None) -> str:
    """The name of an executed notebook, of its page and of its timings."""
    return stage if key is None else f"{stage}-{key}"


def keys_of(study: Study, stage: str) -> list[str | None]:
    """The keys for which a study runs ``stage``; one None for a stage that runs once."""
    takes = STAGES[stage]
    return [None] if takes is None else [*getattr(study, takes[1])]


def execute(study: Study, store: Store, stage: str, key: str | None) -> None:
    """Execute the notebook of a stage; its executed copy goes to ``data/<study>/executed/``.

    While it runs, and when it fails, the copy is named ``.partial.ipynb``. What an interrupted execution had finished,
    of the same code, parameters and data, is taken up.

    Raises:
        StudyError: the stage or key does not exist, or a cell failed.
    """
    if key not in keys_of(study, stage):
        known = ", ".join(str(k) for k in keys_of(study, stage))
        raise StudyError(f"stage {stage} has no {key!r} in study {study.name} (known: {known})")
    notebook, name = source(store, stage), executed_name(stage, key)
    if not notebook.is_file():
        raise StudyError(f"{notebook.relative_to(store.root)} is not there: run `utilized-rank check`")
    done = store.data("executed", f"{name}.ipynb")
    partial = done.with_suffix(".partial.ipynb")
    partial.parent.mkdir(parents=True, exist_ok=True)
    takes = STAGES[stage]
    began = time.perf_counter()
    watch.end_with_dvc()
    folder = store.data(JOURNALS, name, fingerprint(study, store, stage, key)[:16])
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other)
    if (there := journal.where(folder)) is not None:
        print(f"{name} was interrupted: it goes on from {there}", flush=True)
    os.environ[journal.FOLDER] = str(folder)
    # In the study's home, by which the notebook knows whose parameters to read.
    home = store.root / study.home
    _papermill(notebook, partial, {} if takes is None else {takes[0]: key}, store.root, home)
    write_text(done, nbformat.writes(_stable(nbformat.read(partial, as_version=4))))
    partial.unlink()
    shutil.rmtree(folder.parent, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    took = {"seconds": round(time.perf_counter() - began, 2), "peak_memory_mib": round(peak)}
    write_json(store.data("timings", f"{name}.json"), took)


def _papermill(path: Path, output: Path, parameters: dict[str, Any], root: Path, cwd: Path) -> None:
    import papermill
    from traitlets.config import Config

    with tempfile.TemporaryDirectory() as folder:
        # A kernel of this very interpreter, whatever kernels are registered on the machine.
        spec = Path(folder, "kernels", "utilized-rank", "kernel.json")
        spec.parent.mkdir(parents=True)
        kernel = [sys.executable, "-m", watch.__name__, str(os.getpid())]
        argv = [*kernel, "-f", "{connection_file}", "--log-level=CRITICAL"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "utilized-rank", "language": "python"}))
        os.environ["JUPYTER_PATH"] = folder
        os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        # Threads that wait spin briefly, then sleep: beside a busy process, endless spinning costs a factor of six.
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
        try:
            papermill.execute_notebook(
                str(path),
                str(output),
                parameters,
                kernel_name="utilized-rank",
                language="python",
                cwd=str(cwd),
                progress_bar=False,
                stderr_file=sys.stderr,
                record_timing=False,
                coalesce_streams=True,
                # Sockets in the file system: no port that another user of the machine could read.
                config=Config({"KernelManager": {"transport": "ipc", "ip": str(Path(folder, "kernel"))}}),
            )
        except papermill.PapermillExecutionError as error:
            what = error.evalue if error.ename in ("StudyError", "Damaged") else f"{error.ename}: {error.evalue}"
            where = output.relative_to(root)
            raise StudyError(f"{path.stem} failed: {what}\nThe notebook up to there is {where}") from None


def _stable(notebook: NotebookNode) -> NotebookNode:
    """An executed notebook without what differs between executions: timings, ids, progress bars."""
    result = stripped(notebook)
    result.metadata = NotebookNode({"language_info": {"name": "python"}})
    for new, old in zip(result.cells, notebook.cells, strict=True):
        if old.cell_type == "code":
            new.outputs = [o for o in old.outputs if o.get("name") != "stderr"]
            new.execution_count = old.execution_count
    return result


def prune(study: Study, store: Store) -> list[Path]:
    """Remove the results of runs that the study no longer has; returns what was removed.

    The report stage depends on whole folders: a run that left the study must not linger there.
    Git and the DVC cache still have what was committed.
    """
    names = {executed_name(stage, key) for stage in STAGES for key in keys_of(study, stage)}
    files = [*store.data("executed").glob("*.ipynb"), *store.report("results").glob("*.*")]
    gone = [path for path in files if path.name.split(".")[0] not in names]
    for path in gone:
        path.unlink()
    for folder in store.data(JOURNALS).glob("*"):
        if folder.name not in names:
            shutil.rmtree(folder)
    return gone
