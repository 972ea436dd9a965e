"""Image folders for a network that is given."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utilized_rank.base.sections import StudyError
from utilized_rank.datasets import folders
from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Files
from utilized_rank.datasets.sections import Data

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]


def classes_of(folder: Path, each: dict[str, int], start: int = 0) -> None:
    """Grey images of one value each, which tells them apart: of the first class 10 ..., of the second 110 ..."""
    for label, (name, count) in enumerate(each.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            value = 100 * label + start + i
            Image.fromarray(np.full((12, 10, 3), value, np.uint8)).save(folder / name / f"{i}.png")


def read(folder: Path, train: int | None = None, held_out: int = 1000, halves: bool = False, seed: int = 0) -> Dataset:
    data = Data(source="folder", dataset=str(folder), image_size=8, workers=0)
    return folders.of_folder(data, MEAN, STD, train=train, held_out=held_out, halves=halves, seed=seed)


def values(dataset: Dataset, split: str) -> list[int]:
    """Which images are in a split: each is of one value."""
    return dataset.splits[split].images[:, 0, 0, 0].tolist()


def test_calibration_images_are_those_of_train_and_others_those_of_test(tmp_path):
    classes_of(tmp_path / "train", {"a": 7, "b": 5}, start=10)
    classes_of(tmp_path / "test", {"a": 3, "b": 4}, start=50)
    found = read(tmp_path)
    assert found.classes == ["a", "b"]
    assert sorted(values(found, "train")) == [*range(10, 17), *range(110, 115)]
    assert sorted(values(found, "test")) == [*range(50, 53), *range(150, 154)]
    assert values(found, "search") == values(found, "test")
    for split in found.splits.values():
        assert [value >= 100 for value in split.images[:, 0, 0, 0]] == split.labels.bool().tolist()


def test_val_stands_in_for_test(tmp_path):
    classes_of(tmp_path / "train", {"a": 2, "b": 2})
    classes_of(tmp_path / "val", {"a": 1, "b": 1}, start=50)
    assert sorted(values(read(tmp_path), "test")) == [50, 150]


@pytest.mark.parametrize("train", [False, True], ids=["classes alone", "train without test"])
def test_one_half_is_for_calibration_where_there_are_no_test_images(tmp_path, train):
    classes_of(tmp_path / "train" if train else tmp_path, {"a": 9, "b": 8})
    found = read(tmp_path)
    parts = [set(values(found, name)) for name in ("train", "test")]
    assert [len(part) for part in parts] == [9, 8]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {*range(9), *range(100, 108)}


def test_halves_share_no_image_and_are_all_that_is_held_out(tmp_path):
    classes_of(tmp_path / "train", {"a": 2, "b": 2})
    classes_of(tmp_path / "test", {"a": 6, "b": 7})
    whole, halved = read(tmp_path), read(tmp_path, halves=True)
    search, test = values(halved, "search"), values(halved, "test")
    assert [len(search), len(test)] == [7, 6]
    assert not set(search) & set(test)
    assert set(search) | set(test) == set(values(whole, "test"))


def test_as_many_are_taken_as_are_asked_for_and_the_first_of_more(tmp_path):
    classes_of(tmp_path / "train", {"a": 6, "b": 6})
    classes_of(tmp_path / "test", {"a": 6, "b": 6})
    every, some = read(tmp_path), read(tmp_path, train=5, held_out=4)
    assert values(some, "train") == values(every, "train")[:5]
    assert values(some, "test") == values(every, "test")[:4]
    assert len(read(tmp_path, train=99, held_out=99).splits["train"]) == 12
    none = read(tmp_path, train=0, held_out=0)
    assert [len(split) for split in none.splits.values()] == [0, 0, 0]


def test_the_draw_is_the_same_each_time_and_another_with_another_seed(tmp_path):
    classes_of(tmp_path, {"a": 9, "b": 9})
    first, again, other = (values(read(tmp_path, seed=seed), "train") for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) != first  # not class by class


def test_images_are_normalised_with_what_is_given(tmp_path):
    classes_of(tmp_path, {"a": 2, "b": 2}, start=51)
    found = read(tmp_path)
    value = torch.tensor(values(found, "test")[0] / 255)
    expected = ((value - torch.tensor(MEAN)) / torch.tensor(STD)).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(found.inputs("test")[:1][0], expected)


def test_what_is_too_much_to_keep_is_decoded_when_it_is_asked_for(tmp_path, monkeypatch):
    classes_of(tmp_path, {"a": 3, "b": 3})
    kept = read(tmp_path)
    monkeypatch.setattr(folders, "HELD", 3 * 3 * 8 * 8 - 1)
    held = read(tmp_path)
    assert isinstance(kept.splits["train"].images, torch.Tensor)
    assert isinstance(held.splits["train"].images, Files)
    torch.testing.assert_close(held.inputs("train")[:], kept.inputs("train")[:], rtol=0, atol=0)


def test_a_folder_that_is_none_or_has_no_two_classes_or_a_class_without_images_is_refused(tmp_path):
    with pytest.raises(StudyError, match=r"gone is no folder: give one with a directory of images for each class"):
        read(tmp_path / "gone")
    with pytest.raises(StudyError, match=r"has 0 directories: each is a class, and two are needed"):
        read(tmp_path)
    classes_of(tmp_path, {"a": 2})
    with pytest.raises(StudyError, match=r"has 1 directories"):
        read(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("none")
    with pytest.raises(StudyError, match=r"b has no image \(\.jpg, "):
        read(tmp_path)


def test_a_class_that_only_the_test_images_lack_is_named(tmp_path):
    classes_of(tmp_path / "train", {"a": 2, "b": 2})
    classes_of(tmp_path / "test", {"a": 2})
    with pytest.raises(StudyError, match="only one of them has b"):
        read(tmp_path)


def test_an_image_cut_short_is_named(tmp_path):
    classes_of(tmp_path, {"a": 3, "b": 3})
    broken = tmp_path / "b" / "1.png"
    broken.write_bytes(broken.read_bytes()[:45])
    with pytest.raises(StudyError, match=r"b/1\.png is not a whole image"):
        read(tmp_path)
