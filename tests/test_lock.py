"""A dvc.lock that was being written when DVC was killed, and what is damaged in the cache that it names."""

from __future__ import annotations

import os

import pytest
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from ruamel.yaml import YAML
from running import command, started

from utilized_rank.stages.cache import drop_damaged
from utilized_rank.stages.lock import LOCK, mend

WHOLE = """schema: '2.0'
stages:
  check:
    cmd: utilized-rank check
    outs:
    - path: data/a
      md5: 11.dir
  train@vgg11:
    cmd: utilized-rank stage train vgg11
    outs:
    - path: data/b
      md5: 22ab
"""


def test_a_lock_that_is_whole_stays_as_it_is(tmp_path):
    assert mend(tmp_path) is None
    (tmp_path / LOCK).write_text(WHOLE)
    assert mend(tmp_path) is None
    assert (tmp_path / LOCK).read_text() == WHOLE


@pytest.mark.parametrize("kept", range(len(WHOLE)))
def test_cut_anywhere_it_is_one_that_dvc_reads_and_no_whole_entry_is_lost(tmp_path, kept):
    path = tmp_path / LOCK
    path.write_text(WHOLE[:kept])
    said = mend(tmp_path)
    if not path.is_file():
        assert said is not None
        assert kept < WHOLE.index("  train")
        return
    lock = YAML(typ="safe").load(path.read_text())
    COMPILED_LOCKFILE_SCHEMA(lock)
    assert set(lock["stages"]) <= {"check", "train@vgg11"}
    assert all("cmd" in entry for entry in lock["stages"].values())
    if kept >= WHOLE.index("  train"):
        assert lock["stages"]["check"]["outs"] == [{"path": "data/a", "md5": "11.dir"}]
    assert mend(tmp_path) is None


PIPELINE = """stages:
  made:
    cmd: mkdir data && echo one > data/a && echo two > data/b && echo one > data/c
    deps: [given]
    outs: [data]
  used:
    cmd: cat data/a data/b data/c > used
    deps: [data]
    outs: [used]
"""
ONE, TWO, USED = "5bbf5a52328e7439ae6e719dfe712200", "c193497a1a06b2c72230e6146ff47080", "one\ntwo\none\n"


def project_with(tmp_path, link: str):
    """A small project under DVC, its stages run."""
    command(tmp_path, "dvc", "init", "--quiet", "--no-scm")
    command(tmp_path, "dvc", "config", "cache.type", link)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "given").touch()
    command(tmp_path, "dvc", "repro")
    assert (tmp_path / "used").read_text() == USED
    return tmp_path, tmp_path / ".dvc/cache/files/md5"


def damage(path, content: bytes) -> None:
    """Another content in the same file, which stays read-only."""
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(0o444)


@pytest.mark.parametrize("link", ["copy", "hardlink", "symlink"])
def test_a_damaged_entry_is_named_and_its_stage_runs_again_whatever_lies_in_the_workspace(tmp_path, link):
    project, cache = project_with(tmp_path, link)
    assert drop_damaged(project, project) == []
    damage(cache / ONE[:2] / ONE[2:], b"onE\n")
    # DVC does not see it: a copy comes from there, a link shows it.
    for name in ("data/a", "data/b", "data/c", "used"):
        (project / name).unlink()
    assert started(command(project, "dvc", "repro")) == []
    assert (project / "data/a").read_text() == "onE\n"
    said = drop_damaged(project, project)
    assert [line.split()[1] for line in said] == ["data/a", "data/c"]
    assert all(line.endswith("made runs again") for line in said)
    assert not os.path.lexists(project / "data/a")
    assert (project / "data/b").read_text() == "two\n"
    assert started(command(project, "dvc", "repro")) == ["made"]
    assert [(project / f"data/{name}").read_text() for name in "abc"] == ["one\n", "two\n", "one\n"]
    assert (project / "used").read_text() == USED
    assert drop_damaged(project, project) == []
    assert "up to date" in command(project, "dvc", "status")


def test_a_folders_list_and_a_file_that_is_cut_to_nothing_are_found_too(tmp_path):
    project, cache = project_with(tmp_path, "copy")
    (listed,) = cache.glob("*/*.dir")
    damage(listed, listed.read_bytes()[:-1])
    assert [line.split()[1] for line in drop_damaged(project, project)] == ["data"]
    assert started(command(project, "dvc", "repro")) == ["made"]
    damage(cache / TWO[:2] / TWO[2:], b"")
    assert [line.split()[1] for line in drop_damaged(project, project)] == ["data/b"]
    assert (project / "data/b").read_text() == "two\n"  # a copy that is whole
    assert started(command(project, "dvc", "repro")) == ["made"]
    assert drop_damaged(project, project) == []


def test_without_a_lock_there_is_nothing_to_look_at(tmp_path):
    assert drop_damaged(tmp_path, tmp_path) == []
