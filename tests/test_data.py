import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utilized_rank import data
from utilized_rank.config import Augmentation, Data, StudyError

DIGITS = Data(source="sklearn", dataset="digits", image_size=16, search_fraction=0.2, test_fraction=0.25)
LABELS = np.repeat(np.arange(4), [100, 60, 40, 20])


@pytest.fixture(scope="module")
def built():
    return data.build(DIGITS, seed=3)


def how(**fractions: float | int) -> Data:
    return DIGITS.model_copy(update=fractions)


@settings(max_examples=40)
@given(
    search=st.floats(0.1, 0.45),
    test=st.floats(0.1, 0.45),
    seed=st.integers(0, 2**32 - 1),
)
def test_splits_are_disjoint_stratified_and_cover_all_images(search, test, seed):
    splits = data.split_indices(LABELS, how(search_fraction=search, test_fraction=test), seed)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(LABELS)))
    expected = {"train": 1 - search - test, "search": search, "test": test}
    for name, fraction in expected.items():
        counts = np.bincount(LABELS[splits[name]], minlength=4)
        assert np.abs(counts - fraction * np.bincount(LABELS)).max() <= 2


def test_a_limit_keeps_that_many_images_stratified():
    splits = data.split_indices(LABELS, how(limit=110), seed=0)
    kept = np.concatenate(list(splits.values()))
    assert len(set(kept)) == 110
    np.testing.assert_array_equal(np.bincount(LABELS[kept]), [50, 30, 20, 10])


def test_a_limit_beyond_the_images_keeps_them_all():
    splits = data.split_indices(LABELS, how(limit=10_000), seed=0)
    assert sum(map(len, splits.values())) == len(LABELS)


def test_a_limit_too_small_to_stratify_is_a_study_error():
    with pytest.raises(StudyError, match="limit"):
        data.split_indices(LABELS, how(limit=3), seed=0)


def test_the_seed_decides_the_splits():
    first, again, other = (data.split_indices(LABELS, DIGITS, seed) for seed in (0, 0, 1))
    for name in data.SPLITS:
        np.testing.assert_array_equal(first[name], again[name])
    assert set(first["test"]) != set(other["test"])


def test_digits_become_grey_images_of_the_wanted_size(built):
    dataset, indices = built
    assert dataset.shape == (1, 16, 16)
    assert dataset.classes == [str(d) for d in range(10)]
    assert sum(len(split) for split in dataset.splits.values()) == 1797
    assert dataset.splits["train"].images.dtype == torch.uint8
    images, labels, _ = data.load_source(DIGITS)
    for name, split in dataset.splits.items():
        torch.testing.assert_close(split.images, images[indices[name]], rtol=0, atol=0)
        torch.testing.assert_close(split.labels, labels[indices[name]], rtol=0, atol=0)


def test_digits_keep_their_pixels_at_the_original_size():
    from sklearn.datasets import load_digits

    images, labels, _ = data.load_source(how(image_size=8))
    original = load_digits()
    np.testing.assert_allclose(images[:, 0].double().numpy() * 16 / 255, original.images, atol=0.04)
    np.testing.assert_array_equal(labels, original.target)


def test_the_training_split_alone_is_normalised_to_zero_mean_and_unit_variance(built):
    dataset, _ = built
    pixels = dataset.splits["train"].images.double() / 255
    assert dataset.mean == pytest.approx([float(pixels.mean())])
    assert dataset.std == pytest.approx([float(pixels.std(correction=0))])
    inputs = dataset.inputs("train")
    assert abs(float(inputs.mean())) < 1e-5
    assert float(inputs.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert abs(float(dataset.inputs("test").mean())) > 1e-5  # as it would be with its own statistics


def test_inputs_are_the_first_images_of_a_split(built):
    dataset, _ = built
    torch.testing.assert_close(dataset.inputs("search", 7), dataset.inputs("search")[:7], rtol=0, atol=0)


def test_normalisation_is_per_channel(dataset):
    colour = dataclasses.replace(dataset, mean=[0.0, 0.5, 1.0], std=[1.0, 0.5, 0.25])
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    torch.testing.assert_close(colour.normalised(white)[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.0]))


def test_saving_and_loading_changes_no_bit(built, tmp_path):
    dataset, _ = built
    data.save(dataset, tmp_path / "data.safetensors")
    loaded = data.load(tmp_path / "data.safetensors")
    assert (loaded.classes, loaded.mean, loaded.std) == (dataset.classes, dataset.mean, dataset.std)
    for name in data.SPLITS:
        assert torch.equal(loaded.splits[name].images, dataset.splits[name].images)
        assert torch.equal(loaded.splits[name].labels, dataset.splits[name].labels)
        assert loaded.splits[name].images.dtype == torch.uint8


@pytest.mark.parametrize("epsilons", [[0.0], [0.5], [0.0, 1.0, 5.0]])
def test_an_epsilon_of_zero_or_of_an_image_or_more_is_fine(epsilons):
    data.check_resolution(200, epsilons)


@pytest.mark.parametrize("epsilons", [[0.4], [1.0, 0.49999]])
def test_an_epsilon_finer_than_one_image_is_refused(epsilons):
    with pytest.raises(StudyError, match=r"one of the 200 search images is worth 0\.5 points"):
        data.check_resolution(200, epsilons)


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
    torch.testing.assert_close(data.augment(images, Augmentation(), generator), images, rtol=0, atol=1e-5)


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others(generator):
    images = torch.randn(400, 1, 6, 6, generator=generator)
    changed = data.augment(images, Augmentation(flip=True), generator)
    same = (changed - images).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (changed - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert bool((same ^ mirrored).all())
    assert abs(int(mirrored.sum()) - 200) < 50  # five standard deviations


def test_a_shift_moves_by_up_to_its_fraction_of_the_side(generator):
    images = ramps(300, 20)
    moved = middle(data.augment(images, Augmentation(shift=0.1), generator)) - middle(images)
    by = moved.mean((2, 3))  # pixels, (N, 2)
    torch.testing.assert_close(moved, by[..., None, None].expand_as(moved), rtol=0, atol=1e-4)
    assert 1.9 < float(by.abs().max()) <= 2 + 1e-4
    assert float(by.mean().abs()) < 0.2


def test_a_rotation_keeps_distances_from_the_centre_up_to_its_angle(generator):
    images = ramps(300, 20)
    turned = middle(data.augment(images, Augmentation(rotate=30), generator))
    torch.testing.assert_close(turned.norm(dim=1), middle(images).norm(dim=1), rtol=0, atol=1e-4)
    cosine = (turned * middle(images)).sum(1) / middle(images).square().sum(1)
    assert math.cos(math.radians(30)) - 1e-4 <= float(cosine.min()) < math.cos(math.radians(28))


def test_a_scale_stretches_from_the_centre(generator):
    images = ramps(300, 20)
    ratio = middle(data.augment(images, Augmentation(scale=0.2), generator)) / middle(images)
    by = ratio.mean((1, 2, 3))
    torch.testing.assert_close(ratio, by.view(-1, 1, 1, 1).expand_as(ratio), rtol=0, atol=1e-4)
    assert 0.8 - 1e-4 <= float(by.min()) < 0.82
    assert 1.18 < float(by.max()) <= 1.2 + 1e-4


def test_contrast_multiplies_each_image(generator):
    images = torch.ones(300, 2, 5, 5)
    changed = data.augment(images, Augmentation(contrast=0.3), generator)
    by = changed[:, 0, 0, 0]
    torch.testing.assert_close(changed, by.view(-1, 1, 1, 1).expand_as(changed))
    assert 0.7 <= float(by.min()) < 0.72
    assert 1.28 < float(by.max()) <= 1.3 + 1e-5


def test_noise_has_its_standard_deviation(generator):
    changed = data.augment(torch.zeros(50, 1, 16, 16), Augmentation(noise=0.4), generator)
    assert float(changed.std()) == pytest.approx(0.4, rel=0.05)


def test_augmentation_is_drawn_from_the_generator_alone(generator):
    images = torch.randn(4, 1, 8, 8, generator=generator)
    everything = Augmentation(shift=0.2, rotate=20, scale=0.1, contrast=0.2, noise=0.1, flip=True)
    seeded = [data.augment(images, everything, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
