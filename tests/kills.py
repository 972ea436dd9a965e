"""Stages that are killed at random moments, and what is left of them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from running import command, environment, hashes

WAYS = ("interrupt all", "kill dvc", "terminate dvc", "kill the stage", "terminate the stage", "kill the kernel")
"""From the keyboard, and from elsewhere."""
PATIENCE = 10.0
"""Seconds within which every process is gone."""
EAGER = """import os, time
if "UTILIZED_RANK_JOURNAL" in os.environ:  # in a kernel of a stage
    from utilized_rank.base.journal import Journal
    from utilized_rank.base import journal
    journal.EVERY, journal.SHARE = 0.0, float("inf")
    write = Journal._write
    Journal._write = lambda *args: (time.sleep(0.1), write(*args))
"""
"""Stages of a shrunken study end before half a minute: their journals are written at every chance, and slowly, so that
most kills meet work that has begun."""
GOES_ON = "it goes on from"
"""What a stage says that takes up the work of an interrupted one."""


@dataclass
class Kill:
    """One execution of a stage that was killed."""

    stage: str
    way: str
    after: float
    """Seconds from its start."""
    ended: bool
    """Whether the stage had ended before."""
    went_on: str = ""
    """What the next execution said that it goes on from; nothing where it began anew."""


def eager(project: Path) -> dict[str, str]:
    """The environment of commands whose stages write their journals at every chance."""
    folder = project.parent / "eager"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(EAGER)
    known = environment()
    return known | {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), known.get("PYTHONPATH"))))}


def killed(project: Path, stage: str, kills: int, draw: random.Random) -> list[Kill]:
    """Kill one stage so many times, one after the other, and then let it end.

    Raises:
        AssertionError: a process is left, or the stage ends in other bytes than before.
    """
    env, again = eager(project), ("dvc", "repro", "--single-item", "--force", stage)
    before = everything(project)
    began = time.monotonic()
    command(project, *again, env=env)
    whole = time.monotonic() - began
    _same(before, everything(project))
    done: list[Kill] = []
    for _ in range(kills):
        way, after = draw.choice(WAYS), draw.uniform(0.2, 0.9) * whole
        output, ended = kill(project, again, env, way, after)
        _note(done, output)
        done.append(Kill(stage, way, after, ended))
    _note(done, command(project, *again, env=env))
    _same(before, everything(project))
    return done


def everything(project: Path) -> dict[str, str]:
    """Hashes of all that a study has (but the notebooks of failures), and what else lies in the project's root."""
    found = {name: its for name, its in hashes(project, "reports/tiny", "data/tiny").items() if ".partial." not in name}
    return found | {path.name: "" for path in project.iterdir()}


def _same(before: dict[str, str], after: dict[str, str]) -> None:
    other = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not other, f"not as before: {other}"


def _note(done: list[Kill], output: str) -> None:
    for kill in done[-1:]:
        kill.went_on = next((line for line in output.splitlines() if GOES_ON in line), "")


def kill(project: Path, words: tuple[str, ...], env: dict[str, str], way: str, after: float) -> tuple[str, bool]:
    """Start DVC and kill one of its processes; what was said, and whether all had ended before.

    Raises:
        AssertionError: a process is left.
    """
    dvc = subprocess.Popen(
        words,
        cwd=project,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with suppress(subprocess.TimeoutExpired):
        dvc.wait(timeout=after)
    ended = dvc.returncode is not None
    own = [] if ended else [psutil.Process(dvc.pid)]
    family = [*own, *(child for its in own for child in its.children(recursive=True))]
    if way == "interrupt all":  # as a terminal does: a kernel is in a group of its own
        for process in family:
            if not _is(process, "stages.watch"):
                _send(process, signal.SIGINT)
    else:
        what, whom = way.split(" ", 1)
        word = {"dvc": "dvc", "the stage": "utilized-rank", "the kernel": "stages.watch"}[whom]
        for process in [its for its in family if _is(its, word)][:1]:
            _send(process, signal.SIGKILL if what == "kill" else signal.SIGTERM)
    output, _ = dvc.communicate(timeout=120)
    _, left = psutil.wait_procs(family, timeout=PATIENCE)
    assert not left, f"{way} after {after:.1f} s left {left}"
    return output, ended


def _is(process: psutil.Process, word: str) -> bool:
    try:
        return any(word in its for its in process.cmdline()[:4])
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, which: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(which)
