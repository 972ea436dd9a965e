"""One network of each family, of random weights and small: measured, put in two, made smaller, saved and loaded."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import Conv2dSame, StdConv2d
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.models.segmentation.lraspp import _lraspp_mobilenetv3

import utilized_rank as ur
from utilized_rank.compression.lowrank import Channel, weight_kept
from utilized_rank.compression.pairs import factorized, substitute
from utilized_rank.networks.batches import call, first
from utilized_rank.networks.modules import Attention, SamePad
from utilized_rank.networks.standard import standardize
from utilized_rank.ranks.layers import countable

INPUTS, CLASSES, WORDS = 16, 5, 50
LANGUAGE = {"vocab_size": WORDS, "initializer_range": 0.2}
DEEP = LANGUAGE | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.2


def images(side: int) -> Tensor:
    return drawn(INPUTS, 3, side, side)


def words() -> Tensor:
    return torch.randint(0, WORDS, (INPUTS, 12), generator=torch.Generator().manual_seed(1))


def sentences() -> dict[str, Tensor]:
    """Every other one is shorter."""
    mask = torch.ones(INPUTS, 12, dtype=torch.int64)
    mask[::2, -3:] = 0
    return {"input_ids": words(), "attention_mask": mask}


def vision_transformer() -> nn.Module:
    how = {"num_layers": 2, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96, "num_classes": CLASSES}
    return torchvision.models.VisionTransformer(image_size=32, patch_size=8, **how)


class Narrow(torchvision.models.resnet.Bottleneck):
    expansion = 1


def resnet50() -> nn.Module:
    """Of all its blocks, each narrower: no shortcut of the first stage needs a convolution."""
    return torchvision.models.ResNet(Narrow, [3, 4, 6, 3], width_per_group=16, num_classes=CLASSES)


def segmentation() -> nn.Module:
    return _lraspp_mobilenetv3(torchvision.models.mobilenet_v3_small(dilated=True, width_mult=0.25), CLASSES)


def big_transfer() -> nn.Module:
    how = {"layers": [1, 1], "channels": [128, 256], "stem_chs": 32, "stem_type": "fixed", "num_classes": CLASSES}
    return ResNetV2(**how, conv_layer=partial(StdConv2d, eps=1e-8))


class Encoder(nn.Module):
    """In evaluation its layers take torch's fused path, which calls none of their parts."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def swin() -> nn.Module:
    how = {"img_size": 56, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": CLASSES}
    return timm.create_model("swin_tiny_patch4_window7_224", **how)


def timm_vit() -> nn.Module:
    how = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES}
    return timm.create_model("vit_tiny_patch16_224", **how)


def mixer() -> nn.Module:
    return MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=64, num_classes=CLASSES)


def convnext() -> nn.Module:
    return timm.create_model("test_convnext", num_classes=CLASSES)


def mobilenet() -> nn.Module:
    return timm.create_model("mobilenetv3_small_050", num_classes=CLASSES)


def efficientnet() -> nn.Module:
    return timm.create_model("test_efficientnet", num_classes=CLASSES, pad_type="same")


def hugging_face(kind: str, config: str, **how: object) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="networks of Hugging Face")
    return getattr(transformers, kind)(getattr(transformers, config)(**how))


def bert() -> nn.Module:
    return hugging_face(
        "BertForSequenceClassification", "BertConfig", **DEEP, max_position_embeddings=32, num_labels=CLASSES
    )


def gpt2() -> nn.Module:
    how = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return hugging_face("GPT2LMHeadModel", "GPT2Config", **LANGUAGE, **how, bos_token_id=0, eos_token_id=0)


def llama() -> nn.Module:
    return hugging_face("LlamaForCausalLM", "LlamaConfig", **DEEP, num_key_value_heads=2)


@dataclass(frozen=True)
class Family:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    layers: int
    """That count."""
    depthwise: int = 0
    whole: tuple[str, ...] = ()
    """That count, but cannot be put in two."""


QUICK = {
    "timm ViT": Family(timm_vit, partial(images, 32), 1 + 2 * 4 + 1),
    "torchvision ViT": Family(vision_transformer, partial(images, 32), 1 + 2 * 4 + 1),
    "MLP-Mixer": Family(mixer, partial(images, 32), 1 + 2 * 4 + 1),
    "EfficientNet": Family(efficientnet, partial(images, 64), 16, depthwise=2),
    "TransformerEncoder": Family(Encoder, lambda: drawn(INPUTS, 7, 32), 2 * 4 + 1),
    "BERT": Family(bert, sentences, 2 * 6 + 2),
    "GPT-2": Family(gpt2, words, 2 * 4 + 1, whole=("lm_head",)),
    "Llama": Family(llama, sentences, 2 * 7 + 1),
}
OTHERS = {
    "Swin": Family(swin, partial(images, 56), 1 + 4 * 4 + 1 + 1),
    "ConvNeXt": Family(convnext, partial(images, 64), 23, depthwise=9),
    "MobileNetV3": Family(mobilenet, partial(images, 64), 43, depthwise=11),
    "ResNetV2": Family(big_transfer, partial(images, 32), 10),
    "ResNet-50": Family(resnet50, partial(images, 32), 1 + 16 * 3 + 3 + 1),
    "segmentation": Family(segmentation, partial(images, 64), 45, depthwise=11),
}
FAMILIES = QUICK | OTHERS
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.networks) for name in OTHERS)]
of_each_family = pytest.mark.parametrize("name", CASES)


def made(name: str, seed: int = 0) -> nn.Module:
    """In evaluation, and as after some training: no norm is the identity, no branch is nothing."""
    torch.manual_seed(seed)
    network = FAMILIES[name].make()
    with torch.no_grad():
        for its, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(std=0.2) if its.endswith("bias") else parameter.uniform_(0.5, 1.5)
            elif not parameter.any():
                parameter.normal_(std=0.2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@torch.no_grad()
def given(network: nn.Module, inputs: Any) -> list[Any]:
    return tree_leaves(call(network, inputs))


def tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def assert_same(network: nn.Module, other: nn.Module, inputs: Any, to: float) -> None:
    ours, theirs = (tensors(given(its, inputs)) for its in (network, other))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, two, rtol=0, atol=to * float(two.abs().max()))


def state(network: nn.Module) -> dict[str, Any]:
    """All that may be seen of a network, but the values of its tensors."""
    modules = {name: (type(module), module.training) for name, module in network.named_modules(remove_duplicate=False)}
    return modules | {f"{name} learns": its.requires_grad for name, its in network.named_parameters()}


def assert_untouched(network: nn.Module, before: nn.Module) -> None:
    assert state(network) == state(before)
    held = before.state_dict()
    assert network.state_dict().keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in network.state_dict().items())


def parameters(network: nn.Module) -> int:
    return sum(its.numel() for its in network.parameters())


def halved(network: nn.Module, inputs: Any, params: float = 0.5, **how: Any) -> nn.Module:
    return ur.compress(network, inputs, params=params, losses="energy", progress=False, **how)


@of_each_family
def test_every_layer_that_counts_has_a_utilization_and_the_others_a_reason(name):
    family, network = FAMILIES[name], made(name)
    before = copy.deepcopy(network)
    found = ur.measure(network, calibration=family.inputs(), energy=0.99)
    assert len(found.layers) == family.layers
    assert found.layers.utilization.between(0, 1, inclusive="right").all()
    assert 0 < found.mlu < 1
    assert list(found.left_out.values()) == ["depthwise convolution: one channel a group"] * family.depthwise
    assert_untouched(network, before)


@of_each_family
def test_in_two_at_full_rank_all_layers_compute_the_same(name):
    family, network = FAMILIES[name], made(name)
    inputs = family.inputs()
    standing = copy.deepcopy(network)
    assert standardize(standing, first(inputs, 1)) == {}
    layers = countable(standing).layers
    assert len(layers) == family.layers
    cuts = {layer.name: factorized(layer, Channel(weight_kept(layer)).factors(layer.width)) for layer in layers}
    substitute(standing, cuts)
    assert_same(standing, network, inputs, 1e-4)


@of_each_family
def test_of_half_the_parameters_a_network_is_plain_and_goes_into_a_folder_and_back(name, tmp_path):
    family, network = FAMILIES[name], made(name)
    inputs = family.inputs()
    next(network.children()).train()
    before = copy.deepcopy(network)
    small = halved(network, inputs)
    assert_untouched(network, before)
    network.eval()

    assert parameters(small) <= 0.5 * parameters(network)
    assert not any(module.training for module in small.modules())
    kinds = {type(module) for module in network.modules()}
    new = {type(module) for module in small.modules()} - kinds
    assert new <= {nn.Sequential, nn.Linear, nn.Conv2d, nn.ZeroPad2d, Attention, SamePad}
    record = small.utilized_rank
    assert record["parameters"] == [parameters(network), parameters(small)]
    assert len(record["left_whole"]) == family.depthwise + len(family.whole)
    assert set(family.whole) <= record["left_whole"].keys()

    outputs, expected = given(small, inputs), given(network, inputs)
    assert type(call(small, inputs)) is type(call(network, inputs))
    assert [getattr(one, "shape", type(one)) for one in outputs] == [
        getattr(one, "shape", type(one)) for one in expected
    ]
    loaded = ur.load(ur.save(small, tmp_path / "small"), made(name, seed=1))
    assert_same(loaded, small, inputs, 1e-5)


def test_families_are_of_what_their_names_say():
    def kinds(name: str) -> set[type]:
        return {type(module) for module in made(name).modules()}

    assert Conv2dSame in kinds("EfficientNet")
    assert StdConv2d in kinds("ResNetV2")
    assert nn.MultiheadAttention in kinds("torchvision ViT") & kinds("TransformerEncoder")
    network = made("GPT-2")
    assert network.lm_head.weight is network.transformer.wte.weight
    assert "Conv1D" in {kind.__name__ for kind in kinds("GPT-2")}
    attention = made("Llama").model.layers[0].self_attn
    assert attention.k_proj.out_features < attention.q_proj.out_features


def one_input(name: str) -> tuple[nn.Module, Tensor]:
    """A smaller network of a family whose inputs are one tensor each, and some inputs."""
    inputs = FAMILIES[name].inputs()
    return halved(made(name), inputs), inputs


@pytest.mark.networks
@pytest.mark.parametrize("name", ["torchvision ViT", "ResNet-50", "EfficientNet"])
def test_a_smaller_network_is_exported_as_a_graph(name):
    small, inputs = one_input(name)
    assert_same(torch.export.export(small, (inputs,)).module(), small, inputs, 1e-5)


@pytest.mark.networks
@pytest.mark.parametrize("name", ["torchvision ViT", "ResNet-50"])
def test_a_smaller_network_is_exported_to_onnx(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    pytest.importorskip("onnxscript", reason="torch exports through it")
    small, inputs = one_input(name)
    torch.onnx.export(small, (inputs,), tmp_path / "small.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    expected = given(small, inputs)[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.networks
def test_a_smaller_resnet_is_scripted():
    small, inputs = one_input("ResNet-50")
    assert_same(torch.jit.script(small), small, inputs, 1e-5)


class Odd(nn.Module):
    """What networks do with layers beside calling each once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 16)
        self.twice = nn.Linear(16, 16)
        self.again = self.twice
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        self.right.weight = self.left.weight
        self.read = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.twice(self.stem(x).relu()).relu()).relu()
        x = (self.left(x) + self.right(x.flip(1))).relu()
        return self.head(self.read(x) + nn.functional.linear(x, self.read.weight))


UNCALLED = "its module is never called: the network reads its weight, or does not use it"
WHOLE = {
    "left": "its weight is also that of right",
    "right": "its weight is also that of left",
    "read": "the network does something else with it than call it",
    "never": UNCALLED,
}


def odd(seed: int = 0) -> Odd:
    torch.manual_seed(seed)
    return Odd().eval()


def test_what_is_called_twice_shared_read_or_never_reached_is_measured_or_has_a_reason():
    found = ur.measure(odd(), calibration=drawn(200, 12), energy=0.99, rows=None)
    assert list(found.layers.layer) == ["stem", "twice", "left", "right", "read", "head"]
    assert found.left_out == {"never": UNCALLED}
    assert found.moments["twice"].count == 2 * found.moments["stem"].count == 400


def test_what_is_shared_read_or_never_reached_stays_whole_with_a_reason():
    network = odd()
    small = halved(network, drawn(200, 12), 0.8)
    assert small.utilized_rank["left_whole"] == WHOLE
    assert small.utilized_rank["ranks"].keys() == {"stem", "twice", "head"}
    assert small.left.weight is small.right.weight
    for name in WHOLE:
        assert torch.equal(small.get_submodule(name).weight, network.get_submodule(name).weight)


def test_a_layer_under_two_names_is_two_layers_under_both_also_out_of_a_folder(tmp_path):
    network, inputs = odd(), drawn(200, 12)
    small = halved(network, inputs, 0.8)
    loaded = ur.load(ur.save(small, tmp_path / "small"), odd(seed=1))
    for its in (small, loaded):
        assert isinstance(its.twice, nn.Sequential)
        assert its.again is its.twice
        assert its.left.weight is its.right.weight
        assert parameters(its) == small.utilized_rank["parameters"][1] <= 0.8 * parameters(network)
    assert_same(loaded, small, inputs, 1e-5)


class Tied(nn.Module):
    """Two layers of Hugging Face that store one weight, transposed: plain ones would have a copy each."""

    def __init__(self) -> None:
        super().__init__()
        kind = pytest.importorskip("transformers.pytorch_utils", reason="a layer of Hugging Face").Conv1D
        self.stem, self.one, self.two = nn.Linear(12, 16), kind(16, 16), kind(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x)).relu()).relu())


def test_a_weight_that_is_shared_and_stored_in_another_form_stays_one():
    torch.manual_seed(0)
    network, inputs = Tied().eval(), drawn(200, 12)
    why = {"one": "Conv1D: its weight is also that of two", "two": "Conv1D: its weight is also that of one"}
    assert ur.measure(network, calibration=inputs, energy=0.99).left_out == why
    small = halved(network, inputs, 0.9)
    assert small.utilized_rank["left_whole"] == why
    assert small.one.weight is small.two.weight
    assert parameters(small) <= 0.9 * parameters(network)


def test_a_network_none_of_whose_layers_can_be_put_in_two_is_refused():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network[1].weight = network[0].weight
    with pytest.raises(ur.InputError, match=r"no layer of the network can be put in two: .*also that of 1"):
        halved(network, drawn(20, 8))


def test_frozen_layers_stay_frozen_and_those_that_learn_go_on_learning(tmp_path):
    network = made("torchvision ViT").requires_grad_(False)
    learning = "encoder.layers.encoder_layer_1."
    network.get_submodule(learning[:-1]).requires_grad_(True)
    inputs = FAMILIES["torchvision ViT"].inputs()
    small = halved(network, inputs)
    ranks = small.utilized_rank["ranks"]
    assert 0 < sum(name.startswith(learning) for name in ranks) < len(ranks)
    loaded = ur.load(ur.save(small, tmp_path / "small"), network)
    for its in (small, loaded):
        for name, parameter in its.named_parameters():
            assert parameter.requires_grad == name.startswith(learning), name
    small(inputs).square().mean().backward()
    assert all(
        its.grad.any()
        for name, its in small.named_parameters()
        if name.endswith("mlp.0.0.weight") and its.requires_grad
    )


def test_a_network_in_training_stays_there_and_the_smaller_one_is_in_evaluation():
    network = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.Linear(32, CLASSES))
    network[2].eval()
    before, inputs = copy.deepcopy(network), drawn(100, 12)
    small = halved(network, inputs, 0.8)
    found = ur.measure(network, calibration=inputs, energy=0.99)
    assert_untouched(network, before)
    assert not any(module.training for module in small.modules())
    assert ur.measure(before.eval(), calibration=inputs, energy=0.99).layers.equals(found.layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_network_stays_of_its_type(dtype, tmp_path):
    def new(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 24), nn.Linear(24, CLASSES)]
        return nn.Sequential(*layers).eval().to(dtype)

    network, inputs = new(0), drawn(60, 3, 8, 8).to(dtype)
    labels = network(inputs).argmax(1)
    found = ur.measure(network, (inputs, labels), epsilon=5)
    assert len(found.layers) == 3
    assert found.score == 100
    small = halved(network, inputs)
    loaded = ur.load(ur.save(small, tmp_path / "small"), new(1))
    assert {its.dtype for model in (small, loaded) for its in model.parameters()} == {dtype}
    assert_same(loaded, small, inputs, 1e-5)


def test_parts_of_another_type_keep_it_out_of_a_folder(tmp_path):
    """As Llama's frequencies in float32 under weights in bfloat16."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 32).bfloat16(), nn.Linear(32, CLASSES)
            self.register_buffer("fine", torch.rand(12, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one((x * self.fine).bfloat16()).float())

    network, inputs = Mixed().eval(), drawn(100, 12)
    small = halved(network, inputs, 0.8)
    loaded = ur.load(ur.save(small, tmp_path / "small"), network)
    types = {name: tensor.dtype for name, tensor in small.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == types
    assert types["fine"] == torch.float64
    assert_same(loaded, small, inputs, 1e-5)


def test_what_the_library_tells_stays_as_it_was_told():
    """Only sums, which grow batch by batch, can be changed."""
    rooms = ("networks", "ranks", "compression")
    names = [its.name for its in walk_packages(ur.__path__, "utilized_rank.") if its.name.split(".")[1] in rooms]
    found = {its for name in names for its in vars(import_module(name)).values() if isinstance(its, type)}
    kinds = [its for its in found if is_dataclass(its)]
    assert {its.__name__ for its in kinds if not its.__dataclass_params__.frozen} == {"Moments", "Trial"}
    assert len(kinds) > 20
