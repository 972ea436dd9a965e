"""A dvc.lock that was being written when DVC was killed."""

from __future__ import annotations

import pytest
from ruamel.yaml import YAML

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
      md5: 22
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
    assert set(lock["stages"]) <= {"check", "train@vgg11"}
    assert all("cmd" in entry for entry in lock["stages"].values())
    if kept >= WHOLE.index("  train"):
        assert lock["stages"]["check"]["outs"] == [{"path": "data/a", "md5": "11.dir"}]
    assert mend(tmp_path) is None
