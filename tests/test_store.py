import os

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from utilized_rank.base import files
from utilized_rank.base.sections import StudyError
from utilized_rank.base.store import Store
from utilized_rank.study.opened import open_study

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int64)}
TABLE = pd.DataFrame({"layer": ["conv1", "block.fc"], "k": [1, 2], "accuracy": [1 / 3, 100.0]})
WRITERS = {
    "text": (files.write_text, "one\ntwo"),
    "json": (files.write_json, {"b": [1, 2.5], "a": None}),
    "table": (files.write_table, TABLE),
    "tensors": (files.write_tensors, TENSORS),
}


def names_in(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_data_and_reports_of_a_study_have_folders_of_their_own(tmp_path):
    digits = Store("digits", tmp_path)
    assert digits.data("runs", "a.csv") == tmp_path / "data" / "digits" / "runs" / "a.csv"
    assert digits.report("figures") == tmp_path / "reports" / "digits" / "figures"


def test_open_study_fails_outside_of_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError):
        open_study()


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_content_gives_the_same_bytes(tmp_path, kind):
    write, content = WRITERS[kind]
    write(tmp_path / "first", content)
    write(tmp_path / "new" / "folder" / "second", content)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "new" / "folder" / "second").read_bytes()
    assert names_in(tmp_path) == ["first", "new"]


def test_the_order_of_metadata_does_not_matter(tmp_path):
    files.write_tensors(tmp_path / "first", TENSORS, {"x": 1, "y": 2})
    files.write_tensors(tmp_path / "second", TENSORS, {"y": 2, "x": 1})
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def write_half(path) -> None:
    with files.whole(path) as partial:
        partial.write_text("half of i")
        raise RuntimeError("midway")


@pytest.mark.parametrize("before", [None, "old"])
def test_a_write_that_raises_leaves_no_trace(tmp_path, before):
    path = tmp_path / "result"
    if before is not None:
        path.write_text(before)
    with pytest.raises(RuntimeError, match="midway"):
        write_half(path)
    assert names_in(tmp_path) == ([] if before is None else ["result"])
    assert before is None or path.read_text() == before


@pytest.mark.parametrize(
    ("write", "content"),
    [
        (files.write_json, {"x": float("nan")}),
        (files.write_json, {"x": object()}),
        (files.write_tensors, {"x": 1}),
    ],
    ids=["NaN is no JSON", "neither is an object", "a number is no tensor"],
)
def test_what_cannot_be_written_keeps_what_was_there(tmp_path, write, content):
    (tmp_path / "result").write_text("old")
    with pytest.raises((ValueError, TypeError, AttributeError)):
        write(tmp_path / "result", content)
    assert names_in(tmp_path) == ["result"]
    assert (tmp_path / "result").read_text() == "old"


def test_nothing_is_at_the_path_before_the_block_ends(tmp_path):
    with files.whole(tmp_path / "result") as partial:
        partial.write_text("x")
        assert not (tmp_path / "result").exists()
    assert (tmp_path / "result").read_text() == "x"
    assert (tmp_path / "result").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("text", ["a", "a\n", "a\n\n\n"])
def test_text_ends_in_one_newline(tmp_path, text):
    files.write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_bytes() == b"a\n"


def test_json_round_trip(tmp_path):
    value = {"float": 0.1 + 0.2, "list": [1, None, "ä"]}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value


def test_tables_keep_ten_digits(tmp_path):
    files.write_table(tmp_path / "a.csv", TABLE)
    read = files.read_table(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(read, TABLE, rtol=1e-10)
    assert "0.3333333333\n" in (tmp_path / "a.csv").read_text()


@pytest.mark.parametrize("names", [["0", "2"], ["null", "NA"]], ids=["numbers", "words for nothing"])
def test_tables_keep_names_as_text(tmp_path, names):
    files.write_table(tmp_path / "a.csv", pd.DataFrame({"layer": names, "k": [1, 2]}))
    assert files.read_table(tmp_path / "a.csv").layer.tolist() == names


def test_tensors_round_trip_to_the_bit_with_their_metadata(tmp_path):
    tensors = {**TENSORS, "nan": torch.tensor([float("nan"), -0.0]), "turned": torch.rand(3, 4).T}
    files.write_tensors(tmp_path / "a.safetensors", tensors, {"ranks": {"fc": [1, 0]}})
    read, metadata = files.read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"ranks": {"fc": [1, 0]}}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name].numpy(), tensor.numpy())


def test_a_safetensors_file_without_our_metadata_can_be_read(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert files.read_tensors(tmp_path / "theirs.safetensors")[1] == {}


def test_networks_keep_parameters_and_buffers(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(memory_format=torch.channels_last)
    files.write_network(tmp_path / "a.safetensors", network)
    read, _ = files.read_tensors(tmp_path / "a.safetensors")
    own = network.state_dict()
    assert read.keys() == own.keys()
    assert all(torch.equal(read[name], own[name]) for name in own)


def test_a_network_with_a_shared_module_can_be_written(tmp_path, make):
    files.write_network(tmp_path / "a.safetensors", make("shared"))
    other = make("shared")
    nn.init.zeros_(other.block.weight)
    other.load_state_dict(files.read_tensors(tmp_path / "a.safetensors")[0])
    assert torch.equal(other.block.weight, make("shared").block.weight)
