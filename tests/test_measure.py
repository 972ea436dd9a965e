import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from utilized_rank.base.journal import Answers, Journal
from utilized_rank.base.sections import StudyError
from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Split
from utilized_rank.networks.each import in_turn, ordered
from utilized_rank.networks.evaluation import Labelled, is_correct
from utilized_rank.networks.precision import autocast
from utilized_rank.ranks import measure as library
from utilized_rank.ranks import moments
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.measure import UNCALLED, Measurement
from utilized_rank.ranks.projection import bases, projected, replaced
from utilized_rank.stages.measure import measure
from utilized_rank.study.sections import Measure
from utilized_rank.training.models import classifier

MEASURE = Measure(
    calibration_images=60, epsilons=[0.0, 5.0, 20.0], batch_size=32, memory=64, precision="float32", rows=None
)
NETWORKS = ["residual", "in_place", "data_dependent", "shared", "vit"]


def with_labels_of(network: nn.Module, images: Tensor) -> Dataset:
    """The images as calibration and as search split, labelled by the network, every fifth one wrongly.

    The network's classifier is centred on them.
    """
    pixels = ((images - images.min()) / (images.max() - images.min()) * 255).byte()
    mean, std = pixels.float().mean((0, 2, 3)) / 255, pixels.float().std((0, 2, 3)) / 255
    unlabelled = Split(pixels, torch.zeros(len(images), dtype=torch.int64))
    dataset = Dataset({"train": unlabelled, "search": unlabelled}, [], mean.tolist(), std.tolist())
    with torch.no_grad():
        logits = network(dataset.inputs("search")[:])
        classifier(network).bias -= logits.mean(0)  # no class ahead of the others: predictions differ
    said = (logits - logits.mean(0)).argmax(1)
    wrong = torch.arange(len(said)) % 5 == 0
    labels = torch.where(wrong, (said + 1) % logits.shape[1], said)
    return dataclasses.replace(dataset, splits={"train": unlabelled, "search": Split(pixels, labels)})


@pytest.fixture
def measured(make, images):
    """A function from a network's name and what to change in MEASURE to the network, its data and result."""

    def measured(name: str, **changes: object) -> tuple[nn.Module, Dataset, Measurement]:
        network = make(name)
        dataset = with_labels_of(network, images)
        return network, dataset, measure(network, dataset, MEASURE.model_copy(update=changes))

    return measured


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy"])
def test_every_rank_passes_on_the_whole_search_split_and_one_less_fails(measured, name, criterion):
    network, dataset, result = measured(name, criterion=criterion)
    inputs, labels = dataset.inputs("search"), dataset.labels("search")
    original = int(is_correct(network, inputs, labels).sum())
    assert (result.score, result.search_images) == (pytest.approx(100 * original / 70), 70)
    layers = {layer.name: layer for layer in countable(network).layers}

    def passes(row, k_s: int, k_t: int) -> bool:
        layer = layers[row.layer]
        s, t = bases(layer, result.moments[row.layer])
        with replaced({layer: projected(layer.weight(), s, t, k_s, k_t)}):
            right = int(is_correct(network, inputs, labels).sum())
        return 100 * (original - right) / 70 <= row.epsilon + 1e-9

    for row in result.layers.itertuples():
        width = min(row.m, row.n)
        assert passes(row, row.k_s, row.k_t)
        if criterion == "energy":
            continue
        for side, k, whole in ((0, row.k_s_alone, row.m), (1, row.k_t_alone, row.n)):
            if pd.isna(k):  # not asked: this side needs as much as the other at least
                assert criterion == "utilized"
                pair = (row.r - 1, row.n) if side == 0 else (row.m, row.r - 1)
                assert row.r == 1 or not passes(row, *pair)
                continue
            k = int(k)
            below = k - 1 if k <= width else width
            pair = (below, row.n) if side == 0 else (row.m, below)
            assert 1 <= k <= width or k == whole
            assert below == 0 or not passes(row, *pair)


def test_utilization_is_the_rank_over_the_width_and_mlu_its_mean(measured):
    _, _, result = measured("residual")
    table = result.layers
    assert len(table) == 4 * 3
    width = table[["m", "n"]].min(axis=1)
    assert table.r.tolist() == np.minimum(table[["k_s", "k_t"]].min(axis=1), width).tolist()
    np.testing.assert_allclose(table.utilization, table.r / width)
    mlu = result.mean_layer_utilization()
    assert mlu.keys() == {0.0, 5.0, 20.0}
    for epsilon, mean in mlu.items():
        assert mean == pytest.approx(table[table.epsilon == epsilon].utilization.mean())
    assert 0 < mlu[20.0] < mlu[0.0] <= 1


def test_layers_are_described_as_they_are(measured):
    _, _, result = measured("residual")
    conv1 = result.layers[result.layers.layer == "conv1"].iloc[0]
    assert (conv1.m, conv1.n, conv1.groups) == (36, 4, 2)


@pytest.mark.parametrize("changes", [{"memory": 1}, {"batch_size": 7}])
def test_memory_and_batches_change_no_rank(measured, changes):
    usual, changed = measured("residual")[2], measured("residual", **changes)[2]
    pd.testing.assert_frame_equal(usual.layers, changed.layers)


@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy", "predicted"])
@pytest.mark.parametrize("name", ["residual", "vit"])
def test_where_and_in_which_order_layers_are_searched_changes_nothing(make, images, name, criterion, elsewhere):
    network = make(name)
    dataset = with_labels_of(network, images)
    search = Labelled(dataset.inputs("search"), dataset.labels("search"))
    here, there = (
        library.measure(network, search, images, [0.0, 20.0], criterion=criterion, precision="float32", each=each)
        for each in (in_turn, elsewhere)
    )
    pd.testing.assert_frame_equal(here.layers, there.layers)
    asked, again = (its.evaluations.drop(columns="seconds") for its in (here, there))
    pd.testing.assert_frame_equal(asked, again)
    assert asked.layer.nunique() > 1
    assert (here.score, here.precision, here.thresholds) == (there.score, there.precision, there.thresholds)


def test_what_was_found_elsewhere_is_not_looked_for_again(make, images, tmp_path, elsewhere):
    """Answers that came back from copies are kept in the journal of the one who asked."""
    network = make("residual")
    dataset = with_labels_of(network, images)
    search = Labelled(dataset.inputs("search"), dataset.labels("search"))
    kept = Journal(tmp_path)
    first = library.measure(network, search, images, [20.0], recall=Answers(kept, "search"), each=elsewhere)

    def refused(question: Any, work_out: Callable[[], Any]) -> Any:
        return Answers(kept, "search")(question, lambda: pytest.fail(f"{question} was worked out again"))

    again = library.measure(network, search, images, [20.0], recall=refused)
    pd.testing.assert_frame_equal(first.layers, again.layers)
    pd.testing.assert_frame_equal(first.evaluations, again.evaluations)


def test_results_are_put_in_order_as_soon_as_they_can_be():
    seen = []

    def coming() -> Iterator[tuple[str, int]]:
        for name, its in [("b", 2), ("a", 1), ("d", 4), ("c", 3)]:
            seen.append(name)
            yield name, its

    results = ordered(coming(), "abcd")
    assert (next(results), seen) == (1, ["b", "a"])
    assert (next(results), seen) == (2, ["b", "a"])
    assert list(results) == [3, 4]


def test_every_rank_is_certified_by_an_evaluation_that_is_recorded(measured):
    """Or by what a guess, or a smaller tolerance, has looked at where that is enough."""
    _, _, result = measured("residual")
    asked = result.evaluations
    tried = set(zip(asked.layer, asked.k_s, asked.k_t, strict=True))
    for row in result.layers.itertuples():
        for pair in [(row.k_s_alone, row.n), (row.m, row.k_t_alone), (row.k_s, row.k_t)]:
            assert pair == (row.m, row.n) or (row.layer, *pair) in tried
    assert set(asked.certified) == {True, False}


@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy"])
def test_no_image_is_looked_at_twice_for_the_same_ranks(measured, criterion):
    _, _, result = measured("residual", criterion=criterion)
    assert set(result.evaluations.epsilon) <= {0.0, 5.0, 20.0}
    seen = result.evaluations.groupby(["layer", "k_s", "k_t"]).images.sum()
    assert 0 < seen.min() <= seen.max() <= 70


@pytest.mark.parametrize("name", ["residual", "vit", "shared"])
def test_the_utilized_rank_alone_takes_fewer_images(measured, name):
    both, alone = measured(name)[2], measured(name, criterion="utilized")[2]
    assert alone.evaluations.images.sum() < both.evaluations.images.sum()
    for row in alone.layers.itertuples():
        assert (row.k_s == row.m) or (row.k_t == row.n)
        assert row.r == min(k for k in (row.k_s_alone, row.k_t_alone) if not pd.isna(k))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_search_is_in_the_precision_that_was_asked_for(measured, precision):
    """The unaltered network is counted in it too."""
    network, dataset, result = measured("residual", precision=precision)
    assert result.precision == precision
    with autocast(precision):
        right = is_correct(network, dataset.inputs("search"), dataset.labels("search"))
    assert result.score == pytest.approx(100 * right.mean())
    types = set()
    network.conv2.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    measure(network, dataset, MEASURE.model_copy(update={"precision": precision}))
    assert getattr(torch, precision) in types


@pytest.mark.parametrize(("able", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_the_measurement_names_the_precision_that_auto_stands_for(measured, monkeypatch, able, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    assert measured("residual", precision="auto")[2].precision == precision


def test_moments_are_over_the_calibration_images_of_the_training_split(measured):
    _, _, result = measured("residual", calibration_images=25)
    assert result.moments["head"].count == 25


def test_moments_are_over_as_many_rows_as_the_budget_has(measured, monkeypatch):
    """Of 60 images with 64 patches of width 27 or 36 each; the head receives one row an image."""
    monkeypatch.setattr(moments, "FEWEST", 3)
    _, _, result = measured("residual", rows=5)
    assert result.moments["stem"].count == 3 * 64  # 135 rows are fewer than three images have
    assert result.moments["conv1"].count == 3 * 64
    assert result.moments["conv2"].count == 5 * 64  # 5.6 images hold 360 rows
    assert result.moments["head"].count == 40


def test_the_network_is_left_as_it_was(make, images):
    network = make("residual")
    dataset = with_labels_of(network, images)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measure(network, dataset, MEASURE)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


class Planted(nn.Module):
    """An invertible layer that sees k of 12 dimensions, and classes that need all of them."""

    def __init__(self, k: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(12, k, generator=generator)).Q
        self.register_buffer("onto", basis @ torch.randn(k, 64, generator=generator) / 8)  # (12, 64)
        self.layer = nn.Linear(12, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x[:, 0].flatten(1) @ self.onto.T))


@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy"])
@pytest.mark.parametrize("k", [2, 5])
def test_a_planted_subspace_is_found_by_the_rank_search(k, criterion, generator):
    torch.manual_seed(0)
    network = Planted(k).eval()
    pixels = torch.randint(0, 256, (2000, 1, 8, 8), generator=generator).byte()
    unlabelled = Split(pixels, torch.zeros(2000, dtype=torch.int64))
    dataset = Dataset({"train": unlabelled, "search": unlabelled}, [], [0.5], [0.3])
    with torch.inference_mode():
        said = network(dataset.inputs("search")[:]).argmax(1)
    dataset = dataclasses.replace(dataset, splits={"train": unlabelled, "search": Split(pixels, said)})
    how = Measure(calibration_images=2000, epsilons=[0.0], criterion=criterion, precision="float32")
    rows = measure(network, dataset, how).layers.set_index("layer")
    found = rows.loc["layer"]
    assert found.r == k
    assert found.k_t == k
    assert found.k_s == (12 if criterion == "utilized" else k)


@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy"])
@pytest.mark.parametrize("how", ["no input", "no weight"])
def test_a_dead_layer_has_rank_zero_and_is_reported(make, images, criterion, how):
    network = make("residual")
    if how == "no input":  # the ReLU before conv2 gives nothing
        nn.init.zeros_(network.conv1.weight)
        nn.init.constant_(network.conv1.bias, -1.0)
    else:
        nn.init.zeros_(network.conv2.weight)
    parameters = MEASURE.model_copy(update={"criterion": criterion})
    result = measure(network, with_labels_of(network, images), parameters)
    dead = result.layers[result.layers.layer == "conv2"]
    assert len(dead) == 3
    for column in ("k_s", "k_t", "k_s_alone", "k_t_alone", "r", "utilization"):
        assert not dead[column].any()
    assert not (result.evaluations.layer == "conv2").any()


def test_depthwise_convolutions_are_left_out_with_the_reason(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.Linear(3 * 36, 4)).eval()
    result = measure(network, with_labels_of(network, images), MEASURE)
    assert set(result.layers.layer) == {"2"}
    assert result.left_out == {"0": "depthwise convolution: one channel a group"}


class Uncalled(nn.Module):
    """One layer is not used, and of another the weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spare = nn.Conv2d(3, 4, 3, stride=3), nn.Conv2d(4, 4, 1)
        self.read, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stem(x).flatten(1) @ self.read.weight).relu())


@pytest.mark.parametrize("criterion", ["rank", "utilized", "energy"])
def test_layers_that_are_never_called_are_left_out_with_the_reason_and_have_no_moments(images, criterion):
    torch.manual_seed(0)
    network = Uncalled().eval()
    parameters = MEASURE.model_copy(update={"criterion": criterion})
    result = measure(network, with_labels_of(network, images), parameters)
    assert result.left_out == {"spare": UNCALLED, "read": UNCALLED}
    assert list(result.layers.layer.unique()) == list(result.moments) == ["stem", "head"]
    assert set(result.evaluations.layer) <= {"stem", "head"}


def test_a_study_predicts_ranks_with_a_range_and_certifies_none(measured):
    _, _, result = measured("residual", criterion="predicted")
    assert result.predicted
    assert result.thresholds.keys() == {0.0, 5.0, 20.0}
    assert not result.evaluations.certified.any()
    table = result.layers
    assert len(table) == 4 * 3
    assert bool(((table.r_low <= table.r) & (table.r <= table.r_high)).all())
    assert 0 < result.mean_layer_utilization()[20.0] <= result.mean_layer_utilization()[0.0] <= 1


def test_ranks_of_a_network_without_a_gradient_are_not_predicted(make, images):
    network = make("residual")
    dataset = with_labels_of(network, images)
    network.forward = torch.no_grad()(network.forward)
    with pytest.raises(StudyError, match=r"measure\.criterion predicted: no gradient"):
        measure(network, dataset, MEASURE.model_copy(update={"criterion": "predicted"}))


def test_an_epsilon_finer_than_one_image_is_refused_before_any_work(make, images):
    network = make("residual")
    dataset = with_labels_of(network, images)
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(StudyError, match="one of the 70 search images"):
        measure(network, dataset, MEASURE.model_copy(update={"epsilons": [1.0]}))
    assert not calls


@pytest.mark.parametrize("where", ["stem", "conv1", "head"])
def test_a_layer_with_values_that_are_not_finite_stops_the_measurement(make, images, where):
    network = make("residual")
    dataset = with_labels_of(network, images)
    with torch.no_grad():
        network.get_submodule(where).weight[0] = float("nan")
    with pytest.raises(FloatingPointError):
        measure(network, dataset, MEASURE)
