"""What is killed, cut short or full loses nothing: the study ends in the bytes of one that nothing happened to."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from kills import GOES_ON, eager, everything, kill, killed
from ruamel.yaml import YAML
from running import command, started

STAGES = [
    "prepare",
    "pretrain@tiny_simclr",
    "train@tiny_vgg",
    "train@tiny_ssl",
    "measure@tiny_vgg",
    "measure@tiny_ssl",
    "ssl_vs_supervised@tiny",
    "decompose@tiny_vgg",
    "decompose@tiny_ssl",
    "finetune@tiny_vgg",
    "finetune@tiny_ssl",
    "frontier@tiny_vgg",
    "report",
]
SHORT = ("finetune@tiny_vgg", 2)
"""Of all kills, those that every run of the tests has time for."""
KILLS = 6


def test_all_stages_are_killed(tiny_project):
    listed = command(tiny_project, "dvc", "stage", "list", "--name-only").split()
    assert set(listed) - {"check", "publish"} == set(STAGES)


@pytest.mark.parametrize(
    ("stage", "kills"),
    [pytest.param(*SHORT), *(pytest.param(stage, KILLS, marks=pytest.mark.faults) for stage in STAGES)],
)
def test_a_stage_that_is_killed_ends_as_if_it_had_not_been(tiny_project, stage, kills, record_property):
    for done in killed(tiny_project, stage, kills, random.Random(f"{stage} {kills}")):
        gone_on = done.went_on.partition(GOES_ON)[2].strip()
        how = "had ended before" if done.ended else gone_on or "began anew"
        record_property("kill", f"{done.stage}|{done.way}|{done.after:.1f}|{how}")


@pytest.fixture
def own(tiny_project, tmp_path) -> Path:
    """A copy of the shrunken study, run, with a cache of its own."""
    return shutil.copytree(tiny_project, tmp_path / "own", symlinks=True)


def test_a_lock_that_was_being_written_is_mended_and_no_stage_runs_again(own, record_property):
    before, lock = everything(own), own / "dvc.lock"
    text = lock.read_text()
    lock.write_text(text[: text.index("md5:", len(text) // 2) + 2])
    said = command(own, "utilized-rank", "check")
    assert "dvc.lock was cut short" in said
    # DVC remembers what it has run.
    assert set(started(command(own, "dvc", "repro"))) <= {"check", "publish"}
    assert everything(own) == before
    assert YAML(typ="safe").load(lock) == YAML(typ="safe").load(text)
    record_property("fault", f"dvc.lock cut short while it was written|{said.splitlines()[0]}")


DAMAGED = {
    "weights": ("data/tiny/train/tiny_vgg/network.safetensors", "measure@tiny_vgg"),
    "moments": ("data/tiny/measure/tiny_vgg/moments.safetensors", "decompose@tiny_vgg"),
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("how", ["cut short", "a byte flipped", "unreadable"])
def test_a_damaged_file_is_named_and_made_again(own, what, how, record_property):
    name, stage = DAMAGED[what]
    before, path = everything(own), own / name
    path.chmod(0o644)
    held = bytearray(path.read_bytes())
    path.unlink()  # it may be a link into the cache
    if how == "cut short":
        held = held[: len(held) // 2]
    held[-1] ^= 1 if how == "a byte flipped" else 0
    path.write_bytes(held)
    if how == "unreadable":
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        path.chmod(0)
    stage_name, _, key = stage.partition("@")
    said = command(own, "utilized-rank", "stage", stage_name, key, ok=False)
    (line,) = [line for line in said.splitlines() if path.name in line]
    assert "Traceback" not in said
    record_property("fault", f"{path.name} {how}|{line.replace(str(own), '.')}")
    command(own, "dvc", "repro")
    assert everything(own) == before


@pytest.mark.faults
def test_interrupted_twice_a_study_ends_as_if_it_had_not_been(own, record_property):
    """Finished stages are not run again, and what was interrupted goes on."""
    before = everything(own)
    for folder in ("data/tiny", "reports/tiny", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(own / folder)
    (own / "dvc.lock").unlink()
    ran: list[str] = []
    for after in (40.0, 60.0):
        output, ended = kill(own, ("dvc", "repro"), eager(own), "interrupt all", after)
        assert not ended
        assert "Traceback" not in output
        ran += started(output)[:-1]
    output = command(own, "dvc", "repro", env=eager(own))
    assert not set(started(output)) & set(ran) - {"check"}
    assert everything(own) == before
    record_property("fault", f"Ctrl-C in the middle of a study, twice|{len(ran)} finished stages were not run again")


@pytest.mark.faults
def test_a_full_disk_is_said_and_the_stage_goes_on_when_there_is_room(tiny_project, tmp_path, record_property):
    """A small disk is filled in the middle of a stage."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", disk]).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        own = shutil.copytree(tiny_project, disk / "own", symlinks=True)
        before, stage = everything(own), ("dvc", "repro", "--force", "--single-item", "finetune@tiny_vgg")
        running = subprocess.Popen(
            stage, cwd=own, env=eager(own), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        until = time.monotonic() + 120
        while not list((own / "data/tiny/journal").rglob("*.safetensors")) and time.monotonic() < until:
            time.sleep(0.02)
        filled = disk / "filled"
        with filled.open("wb") as file:
            room = shutil.disk_usage(disk).free
            os.posix_fallocate(file.fileno(), 0, room - (1 << 14))
        said, _ = running.communicate(timeout=120)
        assert running.returncode != 0
        lines = [line for line in said.splitlines() if "No space left" in line]
        assert lines
        assert "Traceback" not in said
        filled.unlink()
        command(own, "dvc", "repro", "--force", "--single-item", "finetune@tiny_vgg")
        assert everything(own) == before
        record_property("fault", f"a disk filled in the middle of a stage|{lines[-1].replace(str(own), '.')}")
    finally:
        subprocess.run(["umount", disk], check=True)
