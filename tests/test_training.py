import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Split
from utilized_rank.datasets.sections import Augmentation
from utilized_rank.training import loop as training
from utilized_rank.training.models import build
from utilized_rank.training.sections import Model, Recipe

RECIPE = Recipe(epochs=4, lr=0.01, batch_size=16, weight_decay=0.0, warmup_epochs=1)


def recipe(**changes: object) -> Recipe:
    return RECIPE.model_copy(update=changes)


def seeded(seed: int = 0) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def small_network() -> nn.Module:
    """A convolution, a norm and a classifier, for images 1 x 8 x 8 of two classes."""
    torch.manual_seed(1)
    encoder = [nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*encoder, nn.Linear(36, 2))


class Regression:
    """y = X w with a known w, which :func:`training.fit` is to find: the rows of X as images, their numbers as labels.

    It is found only where images and labels belong together.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 5, generator=generator)
        self.truth = torch.randn(5, 1, generator=generator)
        self.w = nn.Parameter(torch.zeros(5, 1))
        self.split = Split(self.x, torch.arange(64))
        self.batches: list[Tensor] = []

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.batches.append(labels)
        return (images @ self.w - self.x[labels] @ self.truth).square().mean()

    def fit(self, how: Recipe, **rest: object):
        return training.fit([self.w], self, self.split, how, seeded(), **rest)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fit_finds_the_minimum(optimizer):
    problem = Regression()
    curve = problem.fit(recipe(optimizer=optimizer, epochs=60, lr=0.05))
    torch.testing.assert_close(problem.w.detach(), problem.truth, rtol=0, atol=1e-2)
    assert curve.loss.iloc[-1] < 1e-3 * curve.loss.iloc[0]


def test_an_epoch_draws_every_image_once_in_a_new_order():
    problem = Regression()
    problem.fit(recipe(epochs=2))
    orders = torch.cat(problem.batches).view(2, 64)
    assert orders.sort(1).values.equal(torch.arange(64).repeat(2, 1))
    assert not orders[0].equal(orders[1])


@pytest.mark.parametrize(("batch_size", "expected"), [(24, [24, 24]), (1000, [64])])
def test_the_smaller_last_batch_is_dropped_unless_it_is_the_only_one(batch_size, expected):
    problem = Regression()
    problem.fit(recipe(epochs=1, batch_size=batch_size))
    assert [len(batch) for batch in problem.batches] == expected


def test_the_learning_rate_warms_up_to_its_value_and_decays_along_a_cosine():
    rates = Regression().fit(recipe(epochs=9, lr=0.5, warmup_epochs=1)).lr  # 4 steps an epoch
    assert rates[0] == pytest.approx(0.5 / 4)
    np.testing.assert_allclose(rates[1:], 0.25 * (1 + np.cos(np.pi * np.arange(8) / 8)))


def test_a_warm_up_takes_half_of_the_training_at_most():
    rates = Regression().fit(recipe(epochs=4, lr=0.5, warmup_epochs=100)).lr  # of the first of 4 steps of each epoch
    np.testing.assert_allclose(rates, [0.5 / 8, 0.5 * 5 / 8, 0.5, 0.25 * (1 + np.cos(np.pi / 2))])


def test_the_curve_is_the_mean_loss_of_each_epoch_and_what_is_watched():
    problem = Regression()
    values: list[float] = []

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        value = problem(images, labels)
        values.append(value.item())
        return value

    watch = lambda: {"seen": len(values)}  # noqa: E731
    curve = training.fit([problem.w], loss, problem.split, recipe(epochs=3), seeded(), after_epoch=watch)
    assert curve.epoch.tolist() == [1, 2, 3]
    assert curve.seen.tolist() == [4, 8, 12]
    np.testing.assert_allclose(curve.loss, np.reshape(values, (3, 4)).mean(1))


def test_weights_decay_but_vectors_and_frozen_parameters_do_not():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    parameters = [matrix, vector, frozen]
    flat = lambda images, labels: sum(p.sum() for p in parameters) * 0  # noqa: E731
    training.fit(parameters, flat, Regression().split, recipe(weight_decay=0.1), seeded())
    assert bool((matrix < 1).all())
    assert torch.equal(vector, torch.ones(2))
    assert torch.equal(frozen, torch.ones(2, 2))


def test_precision_is_that_of_the_arithmetic_in_the_loss():
    seen = set()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        product = images @ problem.w
        seen.add(product.dtype)
        return product.float().square().mean()

    problem = Regression()
    for precision in ("float32", "bfloat16"):
        training.fit([problem.w], loss, problem.split, recipe(epochs=1), seeded(), precision)
    assert seen == {torch.float32, torch.bfloat16}
    assert problem.w.dtype == torch.float32


def test_a_loss_that_is_not_finite_names_the_epoch():
    problem = Regression()

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        value = problem(images, labels)
        return value * float("nan") if len(problem.batches) > 8 else value

    with pytest.raises(FloatingPointError, match=r"probe: the loss is not finite in epoch 3"):
        training.fit([problem.w], loss, problem.split, RECIPE, seeded(), title="probe")


def run(method: str, network: nn.Module, dataset: Dataset, how: Recipe = RECIPE, seed: int = 0):
    return training.METHODS[method](network, dataset, how, seeded(seed), "float32", "toy")


@pytest.mark.parametrize("method", ["supervised", "linear"])
def test_training_lowers_the_loss_and_learns(method, dataset):
    curve = run(method, small_network(), dataset, recipe(epochs=10))
    assert curve.loss.iloc[-1] < 0.5 * curve.loss.iloc[0]
    assert curve.search_accuracy.iloc[-1] > 90


@pytest.mark.parametrize("method", ["supervised", "linear"])
def test_training_is_reproducible_to_the_bit(method, dataset):
    how = recipe(augmentation=Augmentation(shift=0.1, noise=0.1))
    networks = [small_network() for _ in range(3)]
    seeds = zip(networks, (0, 0, 1), strict=True)
    curves = [run(method, network, dataset, how, seed) for network, seed in seeds]
    assert curves[0].equals(curves[1])
    assert not curves[0].equals(curves[2])
    first, again = (network.state_dict() for network in networks[:2])
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_whole_architecture_trains_reproducibly_to_the_bit(dataset):
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        network = build(Model(architecture="resnet20", width=0.25), dataset.shape, 2)
        run("supervised", network, dataset, recipe(epochs=1))
        weights.append(network.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_linear_probe_leaves_the_encoder_as_it_is_to_the_bit(dataset):
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    run("linear", network, dataset)
    after = network.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["4.weight", "4.bias"]


def test_a_linear_probe_is_softmax_regression_on_the_features(dataset):
    """The curve's last accuracy is that of the whole network."""
    network = small_network()
    curve = run("linear", network, dataset)
    logits = network.eval()(dataset.inputs("search")[:])
    accuracy = 100 * float((logits.argmax(1) == dataset.labels("search")).float().mean())
    assert curve.search_accuracy.iloc[-1] == pytest.approx(accuracy)


def test_nothing_is_trained_as_given(dataset):
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    curve = run("as_given", network, dataset)
    assert len(curve) == 0
    assert set(curve.columns) == set(run("linear", small_network(), dataset).columns)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_the_test_split_is_never_looked_at(dataset):
    unopened = copy.copy(dataset.splits)
    del unopened["test"]
    for method in training.METHODS:
        run(method, small_network(), Dataset(unopened, dataset.classes, dataset.mean, dataset.std))


def test_label_smoothing_raises_the_least_loss_that_can_be_reached(dataset):
    recipes = [recipe(epochs=40, lr=0.05, label_smoothing=smoothing) for smoothing in (0, 0.2)]
    plain, smooth = (run("linear", small_network(), dataset, how) for how in recipes)
    least = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))  # of two classes, 0.2 spread over both
    assert plain.loss.iloc[-1] < least < smooth.loss.iloc[-1] + 1e-3
