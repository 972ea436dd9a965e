"""Stages that are killed at random moments, and what is left of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from running import hashes

WAYS = ("interrupt all", "kill dvc", "terminate dvc", "kill the stage", "kill the kernel")
"""From the keyboard, and from elsewhere."""
PATIENCE = 10.0
"""Seconds within which every process is gone."""
EAGER = """import utilized_rank.base.journal as journal
journal.EVERY, journal.SHARE = 0.0, float("inf")
"""
"""Stages of a shrunken study end before half a minute: their journals are written at every chance."""


@dataclass
class Kill:
    """One stage that was killed."""

    stage: str
    way: str
    after: float
    """Seconds from its start."""
    went_on: str
    """What the next execution said that it goes on from; nothing where it began anew."""


def stages(project: Path) -> list[str]:
    """The stages of the shrunken study, as DVC names them, in their order."""
    listed = run(project, "dvc", "stage", "list", "--name-only")
    return [name for name in listed.split() if name not in ("check", "publish")]


def environment(project: Path) -> dict[str, str]:
    """As the tests run commands, with journals that are written at every chance."""
    eager = project.parent / "eager"
    eager.mkdir(exist_ok=True)
    (eager / "sitecustomize.py").write_text(EAGER)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "DVC_NO_ANALYTICS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(eager),
    }


def run(project: Path, *words: str) -> str:
    """A command that ends well; its output."""
    done = subprocess.run(
        words, cwd=project, env=environment(project), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def killed(project: Path, stage: str, kills: int, draw: random.Random) -> Iterator[Kill]:
    """Kill one stage so many times, one after the other, and then let it end.

    Raises:
        AssertionError: a process is left, or the stage ends in other bytes than before.
    """
    before = hashes(project, "reports/tiny", "data/tiny")
    began = time.monotonic()
    run(project, "dvc", "repro", "--single-item", "--force", stage)
    whole = time.monotonic() - began
    assert hashes(project, "reports/tiny", "data/tiny") == before
    said = [*before][:0]
    done: list[Kill] = []
    for _ in range(kills):
        way, after = draw.choice(WAYS), draw.uniform(0.3, 1.0) * whole
        said.append(_kill(project, stage, way, after))
        done.append(Kill(stage, way, after, ""))
    said.append(run(project, "dvc", "repro", "--single-item", stage))
    for kill, output in zip(done, said[1:], strict=True):
        kill.went_on = next((line for line in output.splitlines() if "it goes on from" in line), "")
    assert hashes(project, "reports/tiny", "data/tiny") == before
    yield from done


def _kill(project: Path, stage: str, way: str, after: float) -> str:
    """Start a stage, and kill it; returns what it had said."""
    words = ["dvc", "repro", "--single-item", "--force", stage]
    dvc = subprocess.Popen(
        words,
        cwd=project,
        env=environment(project),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    time.sleep(after)
    own = psutil.Process(dvc.pid)
    family = [own, *own.children(recursive=True)] if dvc.poll() is None else []
    if way == "interrupt all":
        for process in family:
            _send(process, signal.SIGINT)
    else:
        what, whom = way.split(" ", 1)
        which = {"dvc": own, "the stage": _find(family, "utilized-rank"), "the kernel": _find(family, "stages.watch")}
        target = which[whom]
        if target is not None:
            _send(target, signal.SIGKILL if what == "kill" else signal.SIGTERM)
    output, _ = dvc.communicate(timeout=120)
    _, left = psutil.wait_procs(family, timeout=PATIENCE)
    assert not left, f"{way} left {left}"
    return output


def _find(family: list[psutil.Process], word: str) -> psutil.Process | None:
    for process in family:
        try:
            if any(word in its for its in process.cmdline()[:4]):
                return process
        except psutil.NoSuchProcess:
            pass
    return None


def _send(process: psutil.Process, which: int) -> None:
    try:
        process.send_signal(which)
    except psutil.NoSuchProcess:
        pass
