import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from test_suffix import assert_logits_are_the_networks, suffix_of
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from utilized_rank.networks.attention import explicit
from utilized_rank.networks.evaluation import outputs
from utilized_rank.ranks.layers import Layer, countable
from utilized_rank.ranks.moments import input_moments
from utilized_rank.ranks.projection import replaced

WIDTH, HEADS, TOKENS = 8, 2, 5


class Attending(nn.Module):
    """A sequence that attends to itself."""

    def __init__(self, **kind: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **kind)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, **masks)[0]


def scores(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def hidden(*shape: int) -> Tensor:
    """True where left out; the first key is left out for nobody."""
    result = scores(*shape) > 0
    result[..., 0] = False
    return result


CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
ONE, A_HEAD, PADDING = (TOKENS, TOKENS), (3 * HEADS, TOKENS, TOKENS), (3, TOKENS)
MASKS = {
    "none": {},
    "boolean": {"attn_mask": hidden(*ONE)},
    "float": {"attn_mask": scores(*ONE)},
    "boolean, of each head": {"attn_mask": hidden(*A_HEAD)},
    "float, of each head": {"attn_mask": scores(*A_HEAD)},
    "padding": {"key_padding_mask": hidden(*PADDING)},
    "float padding": {"key_padding_mask": scores(*PADDING)},
    "padding and boolean": {"key_padding_mask": hidden(*PADDING), "attn_mask": hidden(*ONE)},
    "float padding and float, of each head": {"key_padding_mask": scores(*PADDING), "attn_mask": scores(*A_HEAD)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
}


def typed(masks: dict, dtype: torch.dtype) -> dict:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in masks.items()}


def attending(dtype: torch.dtype = torch.float64, **kind: object) -> Attending:
    """Seeded; its biases, which torch starts at zero, are not."""
    torch.manual_seed(0)
    network = Attending(**kind).to(dtype)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return network


def seeded(network: nn.Module, *args: Tensor, **masks: Tensor) -> Tensor:
    torch.manual_seed(2)
    return network(*args, **masks)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_explicit_attention_is_attention_with_any_mask_in_any_mode(split, dtype, batch_first, bias, masks):
    """Dropout, too, drops the same scores under the same seed."""
    near = {"rtol": 0, "atol": 1e-10 if dtype == torch.float64 else 1e-5}
    network = attending(dtype, batch_first=batch_first, bias=bias, dropout=0.3)
    x, given = scores(3, TOKENS, WIDTH).to(dtype), typed(masks, dtype)
    x = x if batch_first else x.transpose(0, 1)
    made = explicit(copy.deepcopy(network), split)
    for training in (True, False):
        network.train(training)
        made.train(training)
        torch.testing.assert_close(seeded(made, x, **given), seeded(network, x, **given), **near)
    with torch.inference_mode():
        torch.testing.assert_close(made(x, **given), network(x, **given), **near)


@pytest.mark.parametrize("training", [True, False])
def test_explicit_attention_keeps_its_mode(training):
    made = explicit(attending(dropout=0.9).train(training), split=False)
    assert all(module.training == training for module in made.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_the_linear_layers_have_the_very_weights_of_the_attention_and_their_gradients(bias):
    network, x = attending(bias=bias), scores(3, TOKENS, WIDTH).double()
    given = dict(network.attention.named_parameters())
    network(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in given.items()}
    network.zero_grad()
    made = explicit(network, split=False).attention
    here = {"in_proj_weight": made.qkv.weight, "out_proj.weight": made.proj.weight}
    here |= {"in_proj_bias": made.qkv.bias, "out_proj.bias": made.proj.bias} if bias else {}
    assert here.keys() == given.keys()
    assert len(list(made.parameters())) == len(given)
    made(x, x, x)[0].square().sum().backward()
    for name, parameter in here.items():
        assert parameter is given[name]
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-10)
        assert parameter.grad.any()


def test_queries_that_are_not_keys_and_values_have_no_common_projection():
    attention = explicit(attending(), split=False).attention
    x, other = scores(3, TOKENS, WIDTH).double(), scores(3, TOKENS, WIDTH).double()
    for query, key, value in ((x, other, other), (x, x, other), (x, other, x)):
        with pytest.raises(NotImplementedError, match="one sequence to another"):
            attention(query, key, value)


@pytest.mark.parametrize("kind", [{"kdim": WIDTH + 1}, {"vdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_that_has_no_fused_projection_or_adds_keys_stays_and_is_listed_as_left_out(kind):
    network = nn.Sequential(attending(**kind), nn.Linear(WIDTH, 3))
    given = network[0].attention
    assert explicit(network, split=True)[0].attention is given
    selection = countable(network)
    assert [layer.name for layer in selection.layers] == ["1"]
    assert selection.left_out.keys() == {"0.attention"}


def test_attention_under_two_names_stays_one():
    network = nn.Sequential(attending(), attending())
    network[1].attention = network[0].attention
    x = scores(3, TOKENS, WIDTH).double()
    expected = network(x)
    explicit(network, split=False)
    assert network[1].attention is network[0].attention
    assert [layer.name for layer in countable(network).layers] == ["0.attention.qkv", "0.attention.proj"]
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-10)


SMALL = {"patch_size": 8, "num_classes": 5}
TIMM = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, **SMALL}


def torchvision_vit() -> nn.Module:
    network = TorchvisionViT(image_size=32, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, **SMALL)
    nn.init.normal_(network.heads.head.weight)  # torchvision starts it at zero: every logit would be 0
    for block in network.encoder.layers:
        nn.init.normal_(block.self_attention.in_proj_bias)
    return network


def encoder(batch_first: bool, norm_first: bool, bias: bool = True) -> nn.Module:
    kind = {"batch_first": batch_first, "norm_first": norm_first, "bias": bias}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, **kind)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first and bias)


ENCODERS = {
    "norm after": lambda: encoder(batch_first=True, norm_first=False),
    "norm before": lambda: encoder(batch_first=True, norm_first=True),
    "sequence first": lambda: encoder(batch_first=False, norm_first=True),
    "no bias": lambda: encoder(batch_first=True, norm_first=False, bias=False),
}
VITS = {"torchvision": torchvision_vit, "timm": lambda: VisionTransformer(**TIMM)}
NETWORKS: dict[str, Callable[[], nn.Module]] = VITS | ENCODERS


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A seeded network in evaluation mode, and what to give it."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    return network, scores(6, 3, 32, 32) if name in VITS else scores(3, TOKENS, WIDTH)


def calls(network: nn.Module, x: Tensor, modules: dict[str, nn.Module]) -> Counter:
    """How often each of ``modules`` is called, by what a hook sees in evaluation."""
    seen = Counter(dict.fromkeys(modules, 0))
    hooks = [module.register_forward_hook(lambda *_, n=name: seen.update([n])) for name, module in modules.items()]
    outputs(network, x)
    for hook in hooks:
        hook.remove()
    return seen


def test_before_a_projection_that_the_logits_depend_on_is_never_called():
    network, x = made("torchvision")
    before = outputs(network, x)
    names = [f"encoder.layers.encoder_layer_{i}.self_attention.out_proj" for i in range(2)]
    layers = {name: network.get_submodule(name) for name in names}
    assert calls(network, x, layers) == dict.fromkeys(names, 0)
    with replaced({Layer(name, layer): torch.zeros(1, 24, 24) for name, layer in layers.items()}):
        assert not torch.allclose(outputs(network, x), before, atol=1e-2)


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("name", NETWORKS)
def test_afterwards_every_layer_is_called_once_and_the_outputs_are_the_same(name, split):
    network, x = made(name)
    expected = outputs(network, x)  # without a hook: by the fused path, where torch has one
    assert explicit(network, split) is network
    assert not network.training
    torch.testing.assert_close(outputs(network, x), expected, rtol=1e-4, atol=1e-5)
    selection = countable(network)
    assert selection.left_out == {}
    parts = ["qkv.q", "qkv.k", "qkv.v", "proj"] if split else ["qkv", "proj"]
    attention = [layer.name.split("att")[1].partition(".")[2] for layer in selection.layers if "att" in layer.name]
    assert attention == 2 * parts
    modules = {layer.name: layer.module for layer in selection.layers}
    assert calls(network, x, modules) == dict.fromkeys(modules, 1)
    torch.testing.assert_close(network.train()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["norm after", "norm before"])
def test_an_encoder_that_is_given_padding_computes_the_same_for_all_but_the_padding(name):
    network, x = made(name)
    padding = torch.arange(TOKENS) >= torch.tensor([5, 2, 4])[:, None]  # left aligned: torch nests such tensors
    expected = network(x, src_key_padding_mask=padding)
    with torch.inference_mode():
        explicit(network, split=False)
        here = network(x, src_key_padding_mask=padding)
    torch.testing.assert_close(here[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


READERS = {
    "Beit": lambda: Beit(**TIMM),
    "SwinTransformer": lambda: SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=5),
}


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("make", READERS.values(), ids=READERS.keys())
def test_a_network_that_reads_the_weight_of_its_qkv_without_calling_it_computes_the_same(make, split):
    torch.manual_seed(0)
    network, x = make().eval(), scores(2, 3, 32, 32)
    expected = outputs(network, x)
    torch.testing.assert_close(outputs(explicit(network, split), x), expected, rtol=1e-4, atol=1e-5)


def tokens_of(network: nn.Module, x: Tensor) -> Tensor:
    """What flows into the first attention of torchvision's ViT, (N, tokens, D), by its parts."""
    patches = network.conv_proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([network.class_token.expand(len(x), -1, -1), patches], 1) + network.encoder.pos_embedding
    return network.encoder.layers[0].ln_1(tokens)


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
def test_moments_of_the_projections_are_those_of_attention_by_hand(split):
    """Into the first goes the normed sequence; into the second go the values, weighted by the softmax of q k^T."""
    network, x = made("torchvision")
    attention = network.encoder.layers[0].self_attention
    with torch.no_grad():
        tokens = tokens_of(network, x).double()
        q, k, v = (tokens @ attention.in_proj_weight.double().mT + attention.in_proj_bias.double()).chunk(3, -1)
        heads = zip(q.split(12, -1), k.split(12, -1), v.split(12, -1), strict=True)
        mixed = torch.cat([(q @ k.mT / 12**0.5).softmax(-1) @ v for q, k, v in heads], -1)
    explicit(network, split)
    layers = [layer for layer in countable(network).layers if "encoder_layer_0.self_attention" in layer.name]
    moments = input_moments(network, layers, x.split(4))
    parts = ["qkv.q", "qkv.k", "qkv.v", "proj"] if split else ["qkv", "proj"]
    assert [name.partition("self_attention.")[2] for name in moments] == parts
    for name, moment in moments.items():
        rows = (mixed if name.endswith("proj") else tokens).flatten(0, 1)
        assert moment.count == len(rows) == 6 * 17
        torch.testing.assert_close(moment.second[0], rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moment.mean[0], rows.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", VITS)
def test_a_split_projection_is_the_fused_one_in_thirds_each_replaced_on_its_own(name):
    fused, x = made(name)
    apart = explicit(copy.deepcopy(fused), split=True)
    explicit(fused, split=False)
    before = outputs(fused, x)
    whole = next(layer for layer in countable(fused).layers if layer.name.endswith("qkv"))
    parts = [layer for layer in countable(apart).layers if layer.name.startswith(whole.name)]
    assert torch.equal(torch.cat([part.weight() for part in parts], -1), whole.weight())
    for third, part in enumerate(parts):
        weight = whole.weight().clone()
        weight[..., third * 24 : (third + 1) * 24] *= 0.5
        with replaced({whole: weight}):
            expected = outputs(fused, x)
        with replaced({part: part.weight() / 2}):
            torch.testing.assert_close(outputs(apart, x), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(outputs(apart, x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("name", VITS)
def test_from_every_layer_of_an_explicit_vit_on_the_logits_are_those_of_the_whole_network(name, split):
    network, x = made(name)
    suffix = suffix_of(explicit(network, split), x, 4)
    assert suffix.traced.traced
    shares = []
    for layer in countable(network).layers:
        suffix.move_to(layer.name)
        assert all(suffix.kept)
        assert_logits_are_the_networks(network, suffix, layer)
        shares.append(suffix.share)
    assert shares[0] == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.01
