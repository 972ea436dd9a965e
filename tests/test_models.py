import math

import pytest
import torch
from torch import nn

from utilized_rank import models
from utilized_rank.config import Model, StudyError
from utilized_rank.layers import countable
from utilized_rank.provenance import file_hash
from utilized_rank.store import write_network, write_tensors

VIT = Model(architecture="vit", dim=24, depth=2, heads=3, patch_size=4)
SMALL = {
    "vgg11": (Model(architecture="vgg11", width=0.1), (3, 32, 32)),
    "resnet20": (Model(architecture="resnet20", width=0.25), (1, 8, 8)),
    "vit": (VIT, (1, 8, 8)),
}
CLASSES = 7


def build(name: str) -> nn.Module:
    return models.build(*SMALL[name], CLASSES)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_vgg11_has_the_published_convolutions():
    network = models.build(Model(architecture="vgg11"), (3, 32, 32), 10)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 256, 512, 512, 512, 512]
    weights = 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512)
    norms = 2 * (64 + 128 + 256 + 256 + 4 * 512)
    assert count(network) == weights + norms + 513 * 10


def test_resnet20_has_the_published_size():
    network = models.build(Model(architecture="resnet20"), (3, 32, 32), 10)
    assert len(countable(network).layers) == 20
    assert count(network) == 269_722  # 0.27 million in table 6 of He et al. 2016


def test_vit_has_the_size_of_its_parameters():
    dim, classes, tokens = 24, 7, 1 + 4
    block = 2 * 2 * dim + (dim + 1) * 3 * dim + (dim + 1) * dim + (dim + 1) * 4 * dim + (4 * dim + 1) * dim
    patches = (1 * 4 * 4 + 1) * dim
    expected = patches + dim + tokens * dim + 2 * block + 2 * dim + (dim + 1) * classes
    assert count(models.build(VIT, (1, 8, 8), classes)) == expected


@pytest.mark.parametrize("name", SMALL)
def test_networks_give_logits_that_depend_on_the_image(name, generator):
    network = build(name).eval()
    logits = network(torch.randn(3, *SMALL[name][1], generator=generator))
    assert logits.shape == (3, CLASSES)
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_decides_the_weights(name):
    first, again = (torch.manual_seed(4) and build(name).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_width_scales_the_channels():
    half = models.build(Model(architecture="vgg11", width=0.5), (3, 32, 32), 10)
    assert [m.out_channels for m in half.modules() if isinstance(m, nn.Conv2d)][:3] == [32, 64, 128]


@pytest.mark.parametrize("architecture", ["vgg11", "resnet20"])
def test_convolutions_start_as_he_et_al_2015(architecture):
    network = models.build(Model(architecture=architecture), (3, 32, 32), 10)
    last = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1]
    weight = last.weight.detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (last.out_channels * 9)), rel=0.03)
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(("channels", "width", "stride"), [(4, 4, 1), (4, 8, 2), (3, 6, 2)])
def test_the_shortcut_subsamples_and_pads_half_on_each_side(channels, width, stride, generator):
    block = models.ResidualBlock(channels, width, stride).eval()
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    x = torch.randn(2, channels, 6, 6, generator=generator)
    out = block(x)
    start = (width - channels) // 2
    expected = torch.zeros_like(out)
    expected[:, start : start + channels] = x[:, :, ::stride, ::stride].relu()
    torch.testing.assert_close(out, expected)


def test_a_residual_block_adds_its_convolutions_to_its_input(generator):
    block = models.ResidualBlock(4, 4, 1).eval()
    x = torch.randn(2, 4, 6, 6, generator=generator)
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    torch.testing.assert_close(block(x), (x + branch).relu())


@pytest.mark.parametrize("name", SMALL)
def test_weights_survive_the_disk_to_the_bit(name, tmp_path):
    network = build(name)
    write_network(tmp_path / "a.safetensors", network)
    loaded = models.load(tmp_path / "a.safetensors", *SMALL[name], CLASSES)
    assert not loaded.training
    own = network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_the_classifier_is_the_layer_that_gives_the_logits(name):
    network = build(name)
    assert models.classifier(network).out_features == CLASSES


def test_a_network_without_a_linear_layer_has_no_classifier():
    with pytest.raises(StudyError, match="Conv2d has no linear layer"):
        models.classifier(nn.Conv2d(1, 1, 1))


def test_a_checkpoint_is_read_where_it_is_the_file_that_is_meant(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)})
    assert torch.equal(models.read_checkpoint(str(path), file_hash(path))["x"], torch.ones(2))


def test_another_file_under_the_name_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)})
    with pytest.raises(StudyError, match=r"a\.safetensors has SHA-256 .*, not 00ff: it is another file"):
        models.read_checkpoint(str(path), "00ff")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"nowhere\.safetensors is not there"):
        models.read_checkpoint(str(tmp_path / "nowhere.safetensors"), "00ff")


def test_an_encoder_is_loaded_and_the_rest_keeps_its_random_weights():
    network, other = build("resnet20"), build("resnet20")
    encoder = {k: v for k, v in other.state_dict().items() if not k.startswith("linear.")}
    before = network.linear.weight.clone()
    assert models.start_from(network, encoder) == ["linear.weight", "linear.bias"]
    assert torch.equal(network.layer3[0].conv1.weight, other.layer3[0].conv1.weight)
    assert torch.equal(network.linear.weight, before)


def test_starting_from_nothing_leaves_all_weights_random():
    network = build("resnet20")
    assert models.start_from(network, {}) == list(network.state_dict())


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [("conv9.weight", (4, 1, 3, 3), "no such tensor"), ("conv1.weight", (4, 3, 3, 3), r"\(4, 1, 3, 3\)")],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(name, shape, reason):
    network = build("resnet20")
    before = network.bn1.weight.clone()
    with pytest.raises(StudyError, match=rf"{name} .* does not fit the network: {reason}"):
        models.start_from(network, {"bn1.weight": torch.zeros(4), name: torch.zeros(shape)})
    assert torch.equal(network.bn1.weight, before)
