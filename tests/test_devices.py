"""A GPU that is not there: fake tensors have its name and no values, and tell what lies on the wrong device."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from utilized_rank.base import runtime
from utilized_rank.base.sections import StudyError
from utilized_rank.compression import compensation, lowrank
from utilized_rank.compression.compensation import Compensation
from utilized_rank.compression.lowrank import FORMS, forms_of, outputs_kept
from utilized_rank.compression.pairs import factorized, substitute
from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Split
from utilized_rank.datasets.sections import Augmentation
from utilized_rank.networks import suffix
from utilized_rank.networks.attention import explicit
from utilized_rank.networks.evaluation import outputs
from utilized_rank.networks.plain import plain
from utilized_rank.ranks import moments, subspaces
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.moments import Budget, input_moments
from utilized_rank.ranks.projection import bases, projected, replaced
from utilized_rank.training import loop, models
from utilized_rank.training.sections import Model, Recipe

SHAPE, CLASSES = (3, 32, 32), 4
NETWORKS = {
    "resnet20": lambda: models.build(Model(architecture="resnet20", width=0.25), SHAPE, CLASSES),
    "vit": lambda: models.build(Model(architecture="vit", dim=24, depth=2, heads=3, patch_size=8), SHAPE, CLASSES),
    "mobilenet": lambda: timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=CLASSES),
    "encoder": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Linear(1024, 16),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    ),
}


@pytest.fixture
def gpu(monkeypatch):
    """Tensors have a device and no values; what would be asked of it is answered with yes."""
    for module in (moments, subspaces, suffix):
        monkeypatch.setattr(module, "truth", lambda flag: True)
    for module in (lowrank, compensation):
        monkeypatch.setattr(module, "truth", lambda failed: False)
    monkeypatch.setattr(nn.Module, "to", moved)
    with FakeTensorMode() as mode:
        yield mode


def moved(network: nn.Module, *args: object, **how: object) -> nn.Module:
    """What nn.Module.to does, which cannot put fake tensors in place of one another."""
    if "memory_format" in how:
        return network
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(*args, **how), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(*args, **how)
    return network


def there(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A network of the processor as it would be on a GPU."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter).detach().to("cuda")
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer).to("cuda")
    return network


@pytest.fixture(scope="module")
def made() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    networks = {name: explicit(make(), split=False).eval() for name, make in NETWORKS.items()}
    for network in networks.values():
        plain(network, torch.randn(1, *SHAPE))
    return networks


@pytest.fixture(params=NETWORKS)
def twins(made, gpu, request) -> list[nn.Module]:
    """A network and a copy of it, both of the one fake mode."""
    with unset_fake_temporarily():
        own = [copy.deepcopy(made[request.param]) for _ in range(2)]
    return [there(network, gpu) for network in own]


@pytest.fixture
def network(twins) -> nn.Module:
    return twins[0]


def images(count: int = 8) -> torch.Tensor:
    return torch.randn(count, *SHAPE)  # on the processor, where a loader would leave them


def test_a_forward_pass_brings_images_to_the_network(network):
    assert outputs(network, images()).device.type == "cuda"


@pytest.mark.parametrize("budget", [None, Budget(1, 200)])
def test_moments_and_bases_and_projections_are_on_the_networks_device(network, budget):
    layers = countable(network).layers[:4]
    found = input_moments(network, layers, images(200).split(50), budget)
    for layer in layers:
        its = found[layer.name]
        assert its.products.device.type == its.total.device.type == "cuda"
        assert its.products.dtype == torch.float64
        s, t = bases(layer, its, min(3, layer.width))
        with replaced({layer: projected(layer.weight(), s, t, 2, 2)}):
            assert layer.module.weight.device.type == "cuda"
            assert outputs(network, images(2)).device.type == "cuda"


@pytest.mark.parametrize("method", ["optimal", "compensated"])
def test_layers_in_two_are_on_the_networks_device(twins, method):
    network, small = twins
    layers = countable(network).layers
    found = input_moments(network, layers, [images(64)])
    for layer in layers[:3]:
        fit = (
            Compensation(network, small, images(16), batch_size=8).fit(layer)
            if method == "compensated"
            else outputs_kept(layer, found[layer.name])
        )
        for form in forms_of(layer):
            two = factorized(layer, FORMS[form](fit).factors(1))
        substitute(small, {layer.name: two})
    assert {parameter.device.type for parameter in small.parameters()} == {"cuda"}
    assert outputs(small, images(2)).device.type == "cuda"


def toy(files: bool = False) -> Dataset:
    """Images that lie on the device; or that come to it batch by batch, as files do."""
    images = torch.zeros(24, *SHAPE, dtype=torch.uint8, device="cpu" if files else "cuda")
    split = Split(images, torch.zeros(24, dtype=torch.int64, device="cuda"))
    splits = dict.fromkeys(("train", "search"), split)
    return Dataset(splits, list("abcd"), [0.5] * 3, [0.3] * 3, device=torch.device("cuda"))


CHANGED = Augmentation(crop=2, shift=0.1, rotate=5, scale=0.1, contrast=0.1, noise=0.1, flip=True)


def stepped(loss: torch.Tensor) -> None:
    """No gradient can be computed without a GPU, but a step can be taken."""
    assert loss.device.type == "cuda"


@pytest.mark.parametrize("files", [False, True])
def test_a_training_step_is_where_the_network_is(network, monkeypatch, files):
    """The loss of an epoch is asked for once: a fake one has no value."""
    asked = []
    monkeypatch.setattr(torch.Tensor, "item", lambda its: asked.append(its) or 1.0)
    monkeypatch.setattr(torch.Tensor, "backward", stepped)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lambda *_, **__: None)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: None)
    monkeypatch.setattr(loop, "_watch", lambda *_: dict)
    recipe = Recipe(epochs=2, lr=0.1, batch_size=8, optimizer="sgd", augmentation=CHANGED)
    loop.train_supervised(network, toy(files), recipe, torch.Generator(), "bfloat16", "toy")
    assert len(asked) == 2


@pytest.mark.parametrize("files", [False, True])
def test_images_are_changed_and_normalised_on_the_device(gpu, files):
    dataset = toy(files)
    batch = dataset.splits["train"].images[:4]
    assert dataset.augmented(batch, CHANGED, torch.Generator()).device.type == "cuda"
    assert next(iter(dataset.inputs("search").split(4))).device.type == "cuda"


def test_a_device_that_is_not_there_is_named_in_one_line(monkeypatch):
    for asked, told in {"cuda:9": "has no cuda:9", "gpu": "no kind of device 'gpu'"}.items():
        monkeypatch.setenv(runtime.DEVICE, asked)
        with pytest.raises(StudyError, match=told):
            runtime.device()


def test_a_study_runs_on_the_processor_when_told_so(monkeypatch):
    monkeypatch.setenv(runtime.DEVICE, "cpu")
    assert runtime.device() == torch.device("cpu")
