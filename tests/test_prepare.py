import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utilized_rank.base.sections import StudyError
from utilized_rank.datasets import prepare
from utilized_rank.datasets.data import SPLITS
from utilized_rank.datasets.images import Files, Split, array
from utilized_rank.datasets.prepare import build, split_counts, split_indices
from utilized_rank.datasets.sections import Data
from utilized_rank.datasets.sources import Source, read

DIGITS = Data(source="sklearn", dataset="digits", image_size=16, search=0.2, test=0.25)
FRUIT = Data(source="folder", dataset="data/raw/fruit", image_size=16, search=0.25)
LABELS = np.repeat(np.arange(4), [100, 60, 40, 20])


def how(**changes: float | None) -> Data:
    return DIGITS.model_copy(update=changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(DIGITS, 3, tmp_path_factory.mktemp("digits"))


amounts = st.one_of(st.floats(0.1, 0.45), st.integers(12, 90).map(float))


@settings(max_examples=60)
@given(search=amounts, test=st.one_of(st.none(), amounts), seed=st.integers(0, 2**32 - 1))
def test_splits_are_disjoint_stratified_and_cover_all_images(search, test, seed):
    """By fraction or by number; no image becomes a test image where the source has its own."""
    splits = split_indices(LABELS, how(search=search, test=test), seed, own_test=test is None)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(220))
    given_amounts = {"search": search} | ({} if test is None else {"test": test})
    assert splits.keys() == {"train", *given_amounts}
    for name, amount in given_amounts.items():
        wanted = amount * 220 if amount < 1 else amount
        assert abs(len(splits[name]) - wanted) < 1 if amount < 1 else len(splits[name]) == wanted
    for indices in splits.values():
        counts = np.bincount(LABELS[indices], minlength=4)
        assert np.abs(counts - len(indices) / 220 * np.bincount(LABELS)).max() <= 2


def test_counts_are_those_of_the_splits_and_fractions_are_of_what_the_limit_keeps():
    for data in (how(), how(search=50, test=30), how(limit=110), how(limit=150, search=30)):
        splits = split_indices(LABELS, data, 0, own_test=False)
        assert split_counts(220, 4, data, own_test=False) == {name: len(rows) for name, rows in splits.items()}
    assert split_counts(220, 4, how(limit=100, search=0.1, test=0.3), False) == {"train": 60, "search": 10, "test": 30}
    assert split_counts(220, 4, how(search=19, test=None), True) == {"train": 201, "search": 19}


@pytest.mark.parametrize("each", [3, 4, 5, 9])
def test_a_folder_of_a_few_images_has_one_of_each_class_in_every_split(each):
    labels = np.repeat(np.arange(4), each)
    splits = split_indices(labels, how(search=0.2, test=0.2), 0, own_test=False)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(4 * each))
    assert all(set(labels[rows]) == set(range(4)) for rows in splits.values())


@pytest.mark.parametrize("limit", [110, 217, 219, 220, 10_000])
def test_a_limit_keeps_that_many_images_stratified(limit):
    splits = split_indices(LABELS, how(limit=limit), 0, own_test=False)
    kept = np.concatenate(list(splits.values()))
    assert len(set(kept)) == len(kept) == min(limit, 220)
    shares = len(kept) / 220 * np.bincount(LABELS)
    assert np.abs(np.bincount(LABELS[kept]) - shares).max() < 1


def test_the_seed_decides_the_splits():
    first, again, other = (split_indices(LABELS, DIGITS, seed, own_test=False) for seed in (0, 0, 1))
    for name in SPLITS:
        np.testing.assert_array_equal(first[name], again[name])
        assert set(first[name]) != set(other[name])


@pytest.mark.parametrize(
    ("changes", "own_test", "words"),
    [
        ({"limit": 10}, False, r"10 images are too few \(2 for train, 4 for search, 4 for test\).* of 4 classes"),
        ({"search": 3}, False, r"search has fewer; change data\.limit, data\.search or data\.test"),
        ({"search": 170, "test": 50}, False, r"0 for train, 170 for search, 50 for test.* train has fewer"),
        ({"test": 3}, False, "test has fewer"),
        ({"test": None}, False, "no test images of its own: say in data.test how many"),
        ({"test": 0.2}, True, "has test images of its own: leave data.test away"),
    ],
)
def test_splits_that_cannot_be_are_refused_with_what_to_change(changes, own_test, words, said):
    with pytest.raises(StudyError, match=words) as caught:
        split_indices(LABELS, how(**changes), 0, own_test)
    assert "\n" not in str(caught.value)
    given = ", ".join(f"data.{name}: {value}" for name, value in changes.items())
    said("images", f"{given}{', test images of its own' if own_test else ''}", str(caught.value))


def drawn(counts: list[int], own: list[int] | None = None) -> Source:
    """Images of so many classes, each of another grey, and test images of its own."""

    def split(each: list[int]) -> Split:
        labels = torch.arange(len(each)).repeat_interleave(torch.tensor(each))
        return Split((10 * labels).byte()[:, None, None, None].expand(-1, 1, 8, 8), labels)

    return Source(split(counts), split(own) if own else None, [f"class {i}" for i in range(len(counts))])


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    search=st.one_of(st.floats(0.05, 0.6), st.integers(1, 60).map(float)),
    test=st.one_of(st.none(), st.floats(0.05, 0.39), st.integers(1, 60).map(float)),
    limit=st.one_of(st.none(), st.integers(5, 200)),
)
@example(counts=[12, 34, 8], search=17, test=None, limit=52)  # fewer are left out than there are classes
@example(counts=[29, 26, 4, 6, 16], search=0.48, test=None, limit=11)  # one image of a class is kept
@example(counts=[30, 3, 30], search=0.2, test=0.5, limit=None)  # the test takes all but one of a class
def test_every_split_has_every_class_or_the_study_is_refused(counts, search, test, limit):
    source = drawn(counts, own=[2] * len(counts) if test is None else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "read", lambda data, root: source)
        try:
            dataset, indices = build(how(search=search, test=test, limit=limit), 0, Path())
        except StudyError:
            return
    for name, split in dataset.splits.items():
        assert set(split.labels.tolist()) == set(range(len(counts)))
        its = source.test if name == "test" and test is None else source.images
        assert torch.equal(split.labels, its.labels[indices[name]])
        assert torch.equal(split.images, its.images[indices[name]])


@pytest.mark.parametrize(("own", "needed"), [(False, 3), (True, 2)], ids=["three splits", "two splits"])
def test_a_class_with_one_image_is_refused_by_name(image_folder, tmp_path, own, needed, said):
    image_folder(apple=12, pear=1, plum=12)
    if own:
        image_folder("test", apple=1, pear=1, plum=1)
    with pytest.raises(StudyError, match=rf"have 1 of class pear: it needs {needed}, one for each split") as caught:
        build(FRUIT.model_copy(update={"test": None if own else 0.25}), 0, tmp_path)
    said("images", f"one image of a class, and {needed} splits", str(caught.value))


@pytest.mark.parametrize("where", ["images", "test"])
@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_names_no_class_is_refused(monkeypatch, tmp_path, where, label, said):
    source = drawn([20, 20, 20], own=[2, 2, 2])
    getattr(source, where).labels[4] = label
    monkeypatch.setattr(prepare, "read", lambda data, root: source)
    with pytest.raises(StudyError, match=rf"images have label {label}, but there are 3 classes") as caught:
        build(how(test=None), 0, tmp_path)
    said("images", f"label {label} of three ({where})", str(caught.value))


def test_digits_are_split_as_the_indices_say(built, tmp_path):
    dataset, indices = built
    assert dataset.shape == (1, 16, 16)
    assert dataset.classes == [str(d) for d in range(10)]
    found = read(DIGITS, tmp_path).images
    assert sorted(chain.from_iterable(indices.values())) == list(range(1797))
    for name, split in dataset.splits.items():
        assert torch.equal(split.images, found.images[indices[name]])
        assert torch.equal(split.labels, found.labels[indices[name]])


def test_the_statistics_are_those_of_the_training_images_alone(built):
    dataset, _ = built
    pixels = dataset.splits["train"].images.numpy() / 255
    assert dataset.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert dataset.std == pytest.approx([pixels.std()], rel=1e-12)
    others = dataset.splits["test"].images.numpy() / 255
    assert dataset.mean[0] != pytest.approx(others.mean(), rel=1e-4)


@pytest.mark.parametrize("side", [16, 70], ids=["array", "files"])
def test_the_statistics_are_of_each_channel_whether_array_or_files(image_folder, tmp_path, side):
    image_folder(apple=9, pear=8, plum=8)
    data = FRUIT.model_copy(update={"image_size": side, "test": 0.2, "workers": 0})
    dataset, _ = build(data, 0, tmp_path)
    train = dataset.splits["train"].images
    assert isinstance(train, Files) == (side == 70)
    pixels = array(train).numpy() / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 2, 3)), rtol=1e-12)
    assert len(set(dataset.mean)) == 3


def test_images_of_one_grey_have_a_deviation_to_divide_by(monkeypatch, tmp_path):
    plain = Split(torch.full((40, 1, 8, 8), 51, dtype=torch.uint8), torch.arange(40) % 2)
    monkeypatch.setattr(prepare, "read", lambda data, root: Source(plain, None, ["even", "odd"]))
    dataset, _ = build(how(), 0, tmp_path)
    assert dataset.mean == pytest.approx([0.2])
    assert dataset.std == [1e-3]
    assert float(dataset.inputs("train")[:].abs().max()) < 1e-3


@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize("limit", [None, 12])
def test_own_test_images_are_the_test_and_the_search_split_is_carved_from_train(image_folder, tmp_path, part, limit):
    image_folder(apple=9, pear=8, plum=7)
    image_folder(part, apple=7, pear=6, plum=6)
    data = FRUIT.model_copy(update={"limit": limit})
    found = read(data, tmp_path)
    dataset, indices = build(data, 0, tmp_path)
    assert sorted(indices["train"] + indices["search"]) == list(range(24)) or limit
    assert (len(indices["train"]), len(indices["search"])) == ((18, 6) if limit is None else (9, 3))
    for name in ("train", "search"):
        assert torch.equal(dataset.splits[name].images, found.images.images[indices[name]])
    # A limit takes every so manieth: the classes lie one after the other.
    assert indices["test"] == (list(range(19)) if limit is None else [int(i * 18 / 11) for i in range(12)])
    assert torch.equal(dataset.splits["test"].images, found.test.images[indices["test"]])
    assert torch.equal(dataset.labels("test"), found.test.labels[indices["test"]])
    with pytest.raises(StudyError, match=r"has test images of its own: leave data\.test away"):
        build(data.model_copy(update={"test": 0.2}), 0, tmp_path)


@pytest.mark.parametrize("side", [64, 65], ids=["decoded once", "decoded when needed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image_stops_the_building_and_is_named(image_folder, tmp_path, side, workers):
    folder = image_folder(apple=9, pear=8, plum=8)
    for path in (folder / "train" / "plum").iterdir():
        path.write_text("not one of them is an image")
    data = FRUIT.model_copy(update={"image_size": side, "test": 0.2, "workers": workers})
    with pytest.raises(StudyError, match=re.escape(f"{folder}/train/plum/")) as caught:
        build(data, 0, tmp_path)
    assert "is not a whole image" in str(caught.value)
    assert "\n" not in str(caught.value)


HALVED = FRUIT.model_copy(update={"search_from": "test"})


def test_half_of_the_test_images_stratified_is_for_networks_whose_weights_are_given(monkeypatch):
    monkeypatch.setattr(prepare, "read", lambda data, root: drawn([20, 12, 8], own=[10, 6, 4]))
    dataset, indices = build(HALVED, 0, Path())
    test = dataset.labels("test")
    assert (
        torch.bincount(test[dataset.searched]).tolist() == torch.bincount(test[~dataset.searched]).tolist() == [5, 3, 2]
    )
    assert sorted(indices["test_searched"] + indices["test_reported"]) == indices["test"]
    assert [indices["test"][i] for i in dataset.searched.nonzero().flatten()] == indices["test_searched"]
    _, again = build(HALVED, 0, Path())
    _, other = build(HALVED, 1, Path())
    assert again == indices
    assert other["test_searched"] != indices["test_searched"]
    plain, without = build(FRUIT, 0, Path())
    assert plain.searched is None
    assert without == {name: indices[name] for name in SPLITS}


def test_a_class_with_a_single_test_image_cannot_be_in_both_halves(monkeypatch):
    monkeypatch.setattr(prepare, "read", lambda data, root: drawn([20, 12, 8], own=[10, 6, 1]))
    with pytest.raises(StudyError, match=r"test images have 1 of class class 2: .* data\.search_from is test"):
        build(HALVED, 0, Path())
