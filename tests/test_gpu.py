"""On a GPU: ``make test-gpu``. Needs torch, timm and pandas alone; the study's own packages are not used."""

import copy

import pytest
import timm
import torch
from torch import nn

from utilized_rank.compression.compressor import Compression
from utilized_rank.compression.lowrank import Channel, weight_kept
from utilized_rank.compression.pairs import factorized, substitute
from utilized_rank.networks import devices, suffix
from utilized_rank.networks.attention import explicit
from utilized_rank.networks.evaluation import Labelled, outputs
from utilized_rank.networks.plain import plain
from utilized_rank.networks.suffix import Suffix, Traced
from utilized_rank.ranks.layers import countable
from utilized_rank.ranks.measure import measure
from utilized_rank.ranks.moments import Budget, input_moments
from utilized_rank.ranks.projection import bases, projected, replaced
from utilized_rank.ranks.subspaces import LARGE, principal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]
NETWORKS = {
    "convolutions": lambda: timm.create_model("resnet18", num_classes=10),
    "padded": lambda: timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=10),
    "attention": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10, patch_size=8),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(params=NETWORKS)
def network(request) -> nn.Module:
    torch.manual_seed(0)
    made = explicit(NETWORKS[request.param](), split=False).eval()
    plain(made, torch.randn(1, 3, 64, 64))
    return made.to("cuda", memory_format=torch.channels_last)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(160, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def search(network, images) -> Labelled:
    labels = outputs(network, images).argmax(1).cpu()
    labels[::8] = (labels[::8] + 1) % 10
    return Labelled(images, labels)


def moments_of(network: nn.Module, images: torch.Tensor, budget: Budget | None = None) -> dict:
    return input_moments(network, countable(network).layers, images.split(32), budget)


@pytest.mark.parametrize("budget", [None, Budget(1, 160)])
def test_moments_are_those_of_the_processor_in_double_precision(network, images, budget):
    found = moments_of(network, images, budget)
    expected = moments_of(copy.deepcopy(network).cpu().double(), images.double(), budget)
    for name, its in found.items():
        assert its.products.device.type == "cuda"
        assert its.count == expected[name].count
        scale = expected[name].products.abs().max()
        torch.testing.assert_close(its.products.cpu(), expected[name].products, rtol=0, atol=2e-5 * float(scale))


@pytest.mark.parametrize("order", [100, 700, LARGE])
def test_eigenpairs_of_a_device_are_eigenpairs(order):
    rows = torch.randn(order, order, dtype=torch.float64) * torch.arange(1, order + 1) ** -1.0
    moment = rows.T @ rows
    found = principal(moment.cuda(), order // 10)
    assert found.vectors.device.type == "cuda"
    vectors, values = found.vectors.cpu(), found.values.cpu()
    torch.testing.assert_close(moment @ vectors, vectors * values, rtol=0, atol=1e-6 * float(values[0]))


def test_every_rank_passes_on_the_whole_split_and_one_less_fails(network, search, images):
    found = measure(network, search, images, [5.0], criterion="utilized", precision="float32")
    before = search(network)
    assert found.score == pytest.approx(before)
    layers = {layer.name: layer for layer in countable(network).layers}
    for row in [*found.layers.itertuples()][::5]:
        s, t = bases(layers[row.layer], found.moments[row.layer])
        for less, passes in ((0, True), (1, False)):
            k_s, k_t = (k - less * (k == row.r) for k in (row.k_s, row.k_t))
            if min(k_s, k_t) > 0:
                weight = projected(layers[row.layer].weight(), s, t, k_s, k_t)
                with replaced({layers[row.layer]: weight}):
                    assert (search(network) >= before - 5 - 1e-9) == passes


def test_in_bfloat16_too_and_twice_to_the_same_bytes(network, search, images):
    first, again = (measure(network, search, images, [5.0], criterion="utilized") for _ in range(2))
    assert first.precision == "bfloat16"
    assert first.layers.equals(again.layers)
    for name, its in first.moments.items():
        assert torch.equal(its.products, again.moments[name].products)


def test_at_full_rank_nothing_changes(network, images):
    small, before = copy.deepcopy(network), outputs(network, images)
    for layer in countable(network).layers:
        two = factorized(layer, Channel(weight_kept(layer)).factors(layer.width)).eval()
        assert two[0].weight.device.type == "cuda"
        substitute(small, {layer.name: two})
    assert (outputs(small, images) - before).abs().max() <= 1e-4 * before.abs().max()


def test_half_of_the_parameters_are_as_on_the_processor(network, search, images):
    agreement = {}
    for device in ("cuda", "cpu"):
        its = copy.deepcopy(network).to(device)
        compression = Compression(its, moments_of(its, images), images, search, losses="energy")
        small = compression.build("compensated", compression.within("params", 0.5)).network
        agreement[device] = search(small)
    assert agreement["cuda"] == pytest.approx(agreement["cpu"], abs=2)


@pytest.mark.parametrize("own", [0, 2**22, 2**40])
def test_what_is_kept_on_the_device_or_beside_it_gives_the_same(network, images, monkeypatch, own):
    monkeypatch.setattr(suffix, "free_memory", lambda device: own)
    traced = Traced(network)
    layer = countable(network).layers[len(countable(network).layers) // 2]
    here = Suffix(traced, images, torch.arange(160).split(32), 2**40)
    with torch.inference_mode():
        here.move_to(layer.name)
        found = torch.cat([here.logits(i) for i in range(5)])
    expected = outputs(network, images)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    kept = {value.device.type for values in here.kept for value in values if isinstance(value, torch.Tensor)}
    assert kept == ({"cpu"} if own == 0 else kept)


def test_a_network_trains_twice_to_the_same_weights(images):
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        its = NETWORKS["attention"]().cuda().train()
        optimizer = torch.optim.AdamW(its.parameters(), lr=1e-3)
        for batch in images.cuda().split(32):
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(its(batch), batch.mean((1, 2, 3)).gt(0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in its.parameters()]))
    assert torch.equal(*weights)


def test_memory_that_is_free_is_told():
    assert 0 < devices.free_memory(torch.device("cuda")) < torch.cuda.get_device_properties(0).total_memory
