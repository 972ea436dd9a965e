import dataclasses
import math
import re
import shutil
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from utilized_rank.base.sections import StudyError
from utilized_rank.base.store import Store
from utilized_rank.datasets import augmentation, data, prepare
from utilized_rank.datasets.data import SPLITS, Dataset
from utilized_rank.datasets.images import Files, Split, array
from utilized_rank.datasets.sections import Augmentation, Data
from utilized_rank.study.config import parse_study
from utilized_rank.study.runs import dataset_of
from utilized_rank.study.sections import Measure
from utilized_rank.study.tolerances import check_resolution, search_images, tolerances

LARGE = Data(source="folder", dataset="data/raw/fruit", image_size=72, search=0.25, test=0.25, workers=0)


@pytest.fixture
def large(image_folder, tmp_path) -> Dataset:
    """Images that stay files, 72 pixels on a side."""
    image_folder(apple=9, pear=8, plum=7)
    return prepare.build(LARGE, 0, tmp_path)[0]


def in_memory(dataset: Dataset) -> Dataset:
    """The same images as arrays."""
    splits = {name: Split(array(split.images), split.labels) for name, split in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=splits)


def test_the_training_split_alone_is_normalised_to_zero_mean_and_unit_variance(large):
    inputs = large.inputs("train")[:]
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    others = large.inputs("test")[:]
    assert float(others.mean((0, 2, 3)).abs().min()) > 1e-3  # as it would not be with its own statistics


def test_normalisation_is_per_channel(dataset):
    colour = dataclasses.replace(dataset, mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 0.25])
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    torch.testing.assert_close(colour.normalised(white)[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))


def test_a_model_sees_images_as_it_was_trained_with_where_it_says_so(large):
    assert large.normalised_by(None, None) is large
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    seen = large.normalised_by(mean, std)
    column = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    by_hand = (large.splits["test"].images[:].float() / 255 - column[0]) / column[1]
    torch.testing.assert_close(seen.inputs("test")[:], by_hand)
    assert large.mean != list(mean)  # the data set itself is unchanged
    with pytest.raises(StudyError, match="mean and std of a model need one value for each of 3 channels"):
        large.normalised_by((0.5,), (0.5,))


@pytest.mark.parametrize("workers", [0, 1])
def test_inputs_of_files_are_those_of_an_array_to_the_bit(large, workers):
    """Whole, in parts, and the first of them."""
    images = large.splits["train"].images
    ahead = dataclasses.replace(images, workers=workers)
    train = Split(ahead, large.labels("train"))
    large = dataclasses.replace(large, splits=large.splits | {"train": train})
    small = in_memory(large)
    assert large.shape == small.shape == (3, 72, 72)
    for first in (None, 5, 1000):
        files, kept = large.inputs("train", first), small.inputs("train", first)
        assert isinstance(files.images, Files)
        assert len(files) == len(kept) == min(12 if first is None else first, 12)
        whole = small.normalised(small.splits["train"].images)[: len(kept)]
        for inputs in (files, kept):
            assert torch.equal(inputs[:], whole)
            assert torch.equal(inputs[2:4], whole[2:4])
            assert torch.equal(inputs[torch.tensor([4, 0, 0])], whole[[4, 0, 0]])
            parts = list(inputs.split(5))
            assert [len(part) for part in parts] == ([5, 5, 2] if len(inputs) == 12 else [5])
            assert torch.equal(torch.cat(parts), whole)


def test_saving_and_loading_changes_no_bit(dataset, tmp_path):
    store = Store("mine", tmp_path)
    data.save(dataset, store)
    loaded = data.load(store)
    assert (loaded.classes, loaded.mean, loaded.std) == (dataset.classes, dataset.mean, dataset.std)
    for name in SPLITS:
        assert torch.equal(loaded.splits[name].images, dataset.splits[name].images)
        assert torch.equal(loaded.splits[name].labels, dataset.splits[name].labels)
        assert loaded.splits[name].images.dtype == torch.uint8


def test_files_are_saved_by_name_and_found_again_when_the_project_moves(image_folder, tmp_path):
    project = tmp_path / "here" / "project"
    image_folder(folder="here/project/data/raw/fruit", apple=9, pear=8, plum=8)
    image_folder("test", folder="here/project/data/raw/fruit", apple=2, pear=1, plum=1)
    how = LARGE.model_copy(update={"test": None, "crop": 0.75, "interpolation": "bilinear", "workers": 1})
    dataset, _ = prepare.build(how, 0, project)
    store = Store("mine", project)
    data.save(dataset, store)
    assert data.path(store).stat().st_size < 10_000
    before = in_memory(data.load(store))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(project, tmp_path / "elsewhere" / "renamed")
    after = data.load(Store("mine", tmp_path / "elsewhere" / "renamed"))
    assert (after.classes, after.mean, after.std) == (dataset.classes, dataset.mean, dataset.std)
    for name in SPLITS:
        files, original = after.splits[name].images, dataset.splits[name].images
        assert (files.names, files.side, files.crop, files.workers) == (original.names, 72, 0.75, 1)
        assert torch.equal(after.labels(name), dataset.labels(name))
        assert torch.equal(array(files), before.splits[name].images)
    assert {split.images.root.name for split in after.splits.values()} == {"train", "test"}


def test_files_are_found_from_a_relative_path(large, tmp_path, monkeypatch):
    """As from a notebook, which runs in the project's root."""
    monkeypatch.chdir(tmp_path)
    store = Store("mine")
    assert not data.path(store).is_absolute()
    data.save(large, store)
    assert torch.equal(data.load(store).inputs("search")[:], large.inputs("search")[:])


def test_files_outside_of_the_project_are_found_by_their_whole_path(large, tmp_path):
    store = Store("mine", tmp_path / "project")
    data.save(large, store)
    assert torch.equal(data.load(store).inputs("search")[:], large.inputs("search")[:])


def test_an_experiment_in_a_folder_of_its_own_finds_the_images_of_the_project_and_writes_the_same_bytes(
    image_folder, tmp_path, monkeypatch
):
    """As DVC runs those of a queue: below .dvc/tmp, without what git ignores, DVC_ROOT naming the project."""
    image_folder(apple=9, pear=8, plum=8)
    here = Store("mine", tmp_path)
    data.save(prepare.build(LARGE, 0, tmp_path)[0], here)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    there = Store("mine", tmp_path / ".dvc" / "tmp" / "exps" / "a")
    data.save(prepare.build(LARGE, 0, there.main)[0], there)
    assert data.path(there).read_bytes() == data.path(here).read_bytes()
    assert torch.equal(data.load(there).inputs("test")[:], data.load(here).inputs("test")[:])


@pytest.fixture
def halved(dataset) -> data.Dataset:
    """Every other test image is searched on."""
    return dataclasses.replace(dataset, searched=torch.arange(len(dataset.splits["test"])) % 2 == 0)


def test_a_run_whose_weights_are_given_searches_and_reports_on_test_images_that_are_not_the_same(halved):
    test, seen = halved.splits["test"].images, halved.searching_test()
    assert torch.equal(seen.splits["search"].images, test[::2])
    assert torch.equal(seen.splits["test"].images, test[1::2])
    assert torch.equal(seen.labels("test"), halved.labels("test")[1::2])
    assert seen.splits["train"] is halved.splits["train"]


def test_a_data_set_without_halves_is_searched_as_it_is_split(dataset):
    assert dataset.searching_test() is dataset


@pytest.mark.parametrize("search_from", ["train", "test"])
def test_only_a_run_whose_weights_are_given_has_other_splits(halved, tmp_path, parameters, search_from):
    parameters["data"]["search_from"] = search_from
    made = {"method": "published", "supervision": "supervised", "model": {"architecture": "vit"}}
    parameters["pretrained"]["given"] = made
    parameters["runs"]["given"] = {**parameters["runs"]["vit_linear"], "label": "given", "pretrained": "given"}
    study, store = parse_study(parameters), Store("toy", tmp_path)
    data.save(halved, store)
    counts = {run: len(dataset_of(study, store, run).splits["search"]) for run in study.runs}
    assert counts == {"vgg11": 40, "vit_linear": 40, "given": 20 if search_from == "test" else 40}


@pytest.mark.parametrize(
    ("images", "named", "found"),
    [
        (61, [], [1.64, 2.0]),  # one image is 1.6393 points
        (12, [], [8.34]),
        (50, [], [2.0]),
        (100, [], [1.0, 2.0]),
        (449, [], [1.0, 2.0]),
        (61, [5.0, 0.0], [5.0, 0.0]),
    ],
)
def test_tolerances_that_nobody_named_give_way_to_what_the_search_split_resolves(images, named, found, capsys):
    measure = Measure(calibration_images=1, epsilons=named)
    assert tolerances(images, measure) == found
    said = capsys.readouterr().err
    assert (f"one of the {images} search images is worth" in said) == (not named and found != [1.0, 2.0])
    assert measure.resolved(images).by_default == (not named)
    check_resolution(images, found)


def test_a_tolerance_that_was_named_is_refused_where_it_is_too_fine():
    with pytest.raises(StudyError, match=r"measure\.epsilons has 1 points, but one of the 40 search images"):
        tolerances(40, Measure(calibration_images=1, epsilons=[1.0, 5.0]))


def test_the_smallest_search_split_of_any_run_says_what_is_resolved():
    assert search_images({"train": [*range(9)], "search": [1, 2, 3], "test": [4]}) == 3
    assert search_images({"search": [1, 2, 3], "test": [4, 5, 6], "test_searched": [4, 5]}) == 2


def test_a_file_that_was_damaged_after_preparing_is_named_when_it_is_needed(large):
    files = large.splits["search"].images
    damaged = files.root / files.names[3]
    damaged.write_bytes(damaged.read_bytes()[:300])
    for workers in (0, 1):
        inputs = dataclasses.replace(large.inputs("search"), images=dataclasses.replace(files, workers=workers))
        with pytest.raises(StudyError, match=re.escape(f"{damaged} is not a whole image")):
            list(inputs.split(2))


@pytest.mark.parametrize("epsilons", [[0.0], [0.5], [0.0, 1.0, 5.0]])
def test_an_epsilon_of_zero_or_of_an_image_or_more_is_fine(epsilons):
    check_resolution(200, epsilons)


@pytest.mark.parametrize("epsilons", [[0.4], [1.0, 0.49999]])
def test_an_epsilon_finer_than_one_image_is_refused(epsilons):
    with pytest.raises(StudyError, match=r"one of the 200 search images is worth 0\.5 points"):
        check_resolution(200, epsilons)


def ramps(count: int, side: int) -> torch.Tensor:
    """Images whose two channels are the pixel's x and y from the centre, (count, 2, side, side)."""
    at = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([x, y]).repeat(count, 1, 1, 1)


def middle(images: torch.Tensor) -> torch.Tensor:
    """Without the border that a change may draw in, (N, C, 4, 4)."""
    half = images.shape[-1] // 2
    return images[..., half - 2 : half + 2, half - 2 : half + 2]


def test_no_augmentation_is_the_identity(generator):
    images = torch.randn(10, 3, 9, 12, generator=generator)
    torch.testing.assert_close(augmentation.augment(images, Augmentation(), generator), images, rtol=0, atol=1e-5)


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others(generator):
    images = torch.randn(400, 1, 6, 6, generator=generator)
    changed = augmentation.augment(images, Augmentation(flip=True), generator)
    same = (changed - images).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (changed - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert bool((same ^ mirrored).all())
    assert abs(int(mirrored.sum()) - 200) < 50  # five standard deviations


def test_a_shift_moves_by_up_to_its_fraction_of_the_side(generator):
    images = ramps(300, 20)
    moved = middle(augmentation.augment(images, Augmentation(shift=0.1), generator)) - middle(images)
    by = moved.mean((2, 3))  # pixels, (N, 2)
    torch.testing.assert_close(moved, by[..., None, None].expand_as(moved), rtol=0, atol=1e-4)
    assert 1.9 < float(by.abs().max()) <= 2 + 1e-4
    assert float(by.mean().abs()) < 0.2


def test_a_rotation_keeps_distances_from_the_centre_up_to_its_angle(generator):
    images = ramps(300, 20)
    turned = middle(augmentation.augment(images, Augmentation(rotate=30), generator))
    torch.testing.assert_close(turned.norm(dim=1), middle(images).norm(dim=1), rtol=0, atol=1e-4)
    cosine = (turned * middle(images)).sum(1) / middle(images).square().sum(1)
    assert math.cos(math.radians(30)) - 1e-4 <= float(cosine.min()) < math.cos(math.radians(28))


def test_a_scale_stretches_from_the_centre(generator):
    images = ramps(300, 20)
    ratio = middle(augmentation.augment(images, Augmentation(scale=0.2), generator)) / middle(images)
    by = ratio.mean((1, 2, 3))
    torch.testing.assert_close(ratio, by.view(-1, 1, 1, 1).expand_as(ratio), rtol=0, atol=1e-4)
    assert 0.8 - 1e-4 <= float(by.min()) < 0.82
    assert 1.18 < float(by.max()) <= 1.2 + 1e-4


def test_contrast_multiplies_each_image(generator):
    images = torch.ones(300, 2, 5, 5)
    changed = augmentation.augment(images, Augmentation(contrast=0.3), generator)
    by = changed[:, 0, 0, 0]
    torch.testing.assert_close(changed, by.view(-1, 1, 1, 1).expand_as(changed))
    assert 0.7 <= float(by.min()) < 0.72
    assert 1.28 < float(by.max()) <= 1.3 + 1e-5


def test_noise_has_its_standard_deviation(generator):
    changed = augmentation.augment(torch.zeros(50, 1, 16, 16), Augmentation(noise=0.4), generator)
    assert float(changed.std()) == pytest.approx(0.4, rel=0.05)


def test_augmentation_is_drawn_from_the_generator_alone(generator):
    images = torch.randn(4, 1, 8, 8, generator=generator)
    everything = Augmentation(shift=0.2, rotate=20, scale=0.1, contrast=0.2, noise=0.1, flip=True)
    seeded = [augmentation.augment(images, everything, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("where", ["files", "memory"])
def test_a_part_of_inputs_is_those_images_and_reads_none_of_them(large, where, monkeypatch):
    inputs = (large if where == "files" else in_memory(large)).inputs("train", 9)
    which = torch.tensor([7, 0, 3])
    whole, wanted = inputs[:], inputs[which]
    with monkeypatch.context() as patch:
        patch.setattr(Files, "__getitem__", None)
        some, first = inputs.part(which), inputs.part(slice(2, 6))
    assert (len(some), len(first)) == (3, 4)
    torch.testing.assert_close(some[:], wanted, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([*first.split(3)]), whole[2:6], rtol=0, atol=0)


def test_a_crop_moves_every_image_by_whole_pixels_and_black_comes_in(generator):
    images = torch.randint(1, 256, (60, 2, 6, 5), generator=generator, dtype=torch.uint8)
    moved = augmentation.cropped(images, 2, generator)
    assert (moved.dtype, moved.shape) == (images.dtype, images.shape)
    around, seen = F.pad(images, [2, 2, 2, 2]), set()
    for before, after in zip(around, moved, strict=True):
        places = product(range(5), range(5))
        at = [(y, x) for y, x in places if torch.equal(before[:, y : y + 6, x : x + 5], after)]
        assert len(at) == 1
        seen |= {*at}
    assert len(seen) > 20  # of 25: each image its own


def test_an_augmented_batch_is_cropped_before_it_is_normalised(dataset, generator):
    """So that black is what was black, whatever the mean."""
    images = dataset.splits["train"].images[:30]
    changed = dataset.augmented(images, Augmentation(crop=3), generator)
    assert float(changed.min()) == pytest.approx(float(dataset.normalised(torch.zeros(1, 1, 1, 1))), abs=1e-4)
    plain = dataset.augmented(images, Augmentation(), generator)
    torch.testing.assert_close(plain, dataset.normalised(images), rtol=0, atol=1e-5)


def test_a_view_is_cut_from_its_image_and_brought_to_the_whole_size(generator):
    """Of a ramp: as steep as the part is narrow, and nowhere beyond its ends."""
    images = (4 * torch.arange(64)).expand(200, 3, 64, 64).to(torch.uint8)
    seen = augmentation.views(images, Augmentation(smallest_part=0.25), generator)
    assert seen.shape == images.shape
    assert 0 <= float(seen.min()) < float(seen.max()) <= 4 * 63
    wide = (seen[:, 0, 0, -1] - seen[:, 0, 0, 0]) / (4 * 63)
    # A quarter of the area at the least, 3:4 at the narrowest.
    assert math.sqrt(0.25 * 3 / 4) - 0.05 < float(wide.min()) < 0.6
    assert float(wide.max()) > 0.9


def test_a_view_changes_four_images_in_five_in_colour_and_takes_it_from_some(generator):
    images = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(500, 3, 4, 4)
    coloured = augmentation.views(images, Augmentation(colour=0.5), generator)
    same = (coloured - images).abs().amax((1, 2, 3)) < 1e-3
    assert abs(int(same.sum()) - 100) < 45  # five standard deviations
    grey = augmentation.views(images, Augmentation(grey=0.3), generator)
    without = (grey.amax(1) - grey.amin(1)).amax((1, 2)) < 1e-3
    assert abs(int(without.sum()) - 150) < 52


def test_a_view_of_one_channel_stays_one(generator):
    images = torch.randint(0, 256, (8, 1, 12, 12), generator=generator, dtype=torch.uint8)
    how = Augmentation(smallest_part=0.3, colour=0.5, grey=0.2)
    assert augmentation.views(images, how, generator).shape == images.shape


def test_views_are_drawn_from_the_generator_alone_and_leave_torchs_own(generator):
    images = torch.randint(0, 256, (8, 3, 12, 12), generator=generator, dtype=torch.uint8)
    how = Augmentation(smallest_part=0.3, colour=0.5, grey=0.2)
    before = torch.get_rng_state()
    seeded = [augmentation.views(images, how, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert torch.equal(torch.get_rng_state(), before)
