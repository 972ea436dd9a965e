import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from utilized_rank.base.files import file_hash, read_tensors, write_network, write_tensors
from utilized_rank.base.sections import StudyError
from utilized_rank.ranks.layers import countable
from utilized_rank.training import models
from utilized_rank.training.architectures import ResidualBlock
from utilized_rank.training.sections import Model

VIT = Model(architecture="vit", dim=24, depth=2, heads=3, patch_size=4)
STEMMED = VIT.model_copy(update={"stem": "convolutions"})
SMALL = {
    "vgg11": (Model(architecture="vgg11", width=0.1), (3, 32, 32)),
    "resnet20": (Model(architecture="resnet20", width=0.25), (1, 8, 8)),
    "vit": (VIT, (1, 8, 8)),
    "vit, convolutions": (STEMMED, (1, 8, 8)),
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


def test_a_stem_of_convolutions_gives_as_many_tokens_as_patches_do():
    plain, stemmed = (models.build(model, (3, 32, 32), CLASSES) for model in (VIT, STEMMED))
    images = torch.randn(2, 3, 32, 32)
    assert stemmed.patch_embed(images).shape == plain.patch_embed(images).shape == (2, 64, 24)
    # Two of stride 2 in place of a patch of 4: half as wide as the tokens, then as wide.
    assert [(c.in_channels, c.out_channels) for c in stemmed.modules() if isinstance(c, nn.Conv2d)] == [
        (3, 12),
        (12, 24),
    ]
    assert [layer.name for layer in countable(stemmed).layers][:2] == [
        "patch_embed.backbone.0.conv",
        "patch_embed.backbone.1.conv",
    ]


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
    block = ResidualBlock(channels, width, stride).eval()
    nn.init.zeros_(block.conv2.weight)  # only the shortcut is left
    x = torch.randn(2, channels, 6, 6, generator=generator)
    out = block(x)
    start = (width - channels) // 2
    expected = torch.zeros_like(out)
    expected[:, start : start + channels] = x[:, :, ::stride, ::stride].relu()
    torch.testing.assert_close(out, expected)


def test_a_residual_block_adds_its_convolutions_to_its_input(generator):
    block = ResidualBlock(4, 4, 1).eval()
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
    assert torch.equal(models.read_checkpoint(path, file_hash(path))["x"], torch.ones(2))


def test_another_file_under_the_name_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)})
    with pytest.raises(StudyError, match=r"a\.safetensors has SHA-256 .*, not 00ff: it is another file"):
        models.read_checkpoint(path, "00ff")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(StudyError, match=r"nowhere\.safetensors is not there"):
        models.read_checkpoint(tmp_path / "nowhere.safetensors", "00ff")


@pytest.fixture
def elsewhere(tmp_path) -> tuple[str, str]:
    """The address of a checkpoint, and its SHA-256."""
    write_tensors(tmp_path / "elsewhere" / "a.safetensors", {"x": torch.ones(2)})
    return (tmp_path / "elsewhere" / "a.safetensors").as_uri(), file_hash(tmp_path / "elsewhere" / "a.safetensors")


def test_a_checkpoint_that_is_not_there_is_downloaded_once_and_kept(tmp_path, elsewhere):
    path, (url, sha256) = tmp_path / "data" / "raw" / "checkpoints" / "a.safetensors", elsewhere
    assert torch.equal(models.read_checkpoint(path, sha256, url)["x"], torch.ones(2))
    assert torch.equal(models.read_checkpoint(path, sha256, "file:///gone")["x"], torch.ones(2))


def test_a_download_that_is_another_file_is_refused_and_leaves_nothing(tmp_path, elsewhere):
    path = tmp_path / "raw" / "a.safetensors"
    with pytest.raises(StudyError, match=r"cannot be downloaded .*invalid hash value"):
        models.read_checkpoint(path, "00ff", elsewhere[0])
    assert not list(path.parent.iterdir())


def test_without_a_network_one_paragraph_says_what_to_put_where(tmp_path):
    path, url = tmp_path / "raw" / "a.safetensors", "http://127.0.0.1:9/a.safetensors"
    with pytest.raises(StudyError) as caught:
        models.read_checkpoint(path, "00ff", url)
    for words in (str(path), url, "SHA-256 00ff", "put it there", "Connect to a network once"):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(path.parent.iterdir())


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


LIBRARY = {
    "timm/test_resnet": (1, 32, 32),
    "timm/test_vit": (1, 48, 48),
    "timm/vit_tiny_patch16_224": (3, 32, 32),
    "torchvision/shufflenet_v2_x0_5": (3, 40, 40),
    "torchvision/vit_b_16": (3, 48, 48),
}


def of_library(name: str, shape: models.Shape, classes: int = CLASSES, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return models.build(Model(architecture=name, **changes), shape, classes)


@pytest.mark.parametrize(("name", "shape"), LIBRARY.items(), ids=LIBRARY)
def test_a_librarys_network_is_built_for_the_images_and_classes_and_survives_the_disk(name, shape, tmp_path, generator):
    blocks = 1 if "vit" in name else None
    network = of_library(name, shape, blocks=blocks).eval()
    images = torch.randn(2, *shape, generator=generator)
    flat = models.classifier(network)
    assert flat.out_features == CLASSES
    nn.init.normal_(flat.weight)  # torchvision starts that of its ViT at zero
    logits = network(images)
    assert logits.shape == (2, CLASSES)
    assert not torch.allclose(logits[0], logits[1])
    write_network(tmp_path / "a.safetensors", network)
    loaded = models.load(tmp_path / "a.safetensors", Model(architecture=name, blocks=blocks), shape, CLASSES)
    torch.testing.assert_close(loaded(images), logits, rtol=1e-4, atol=1e-4)


VITS = {"timm/vit_tiny_patch16_224": "blocks.", "torchvision/vit_b_16": "encoder.layers.encoder_layer_"}


@pytest.mark.parametrize(("name", "block"), VITS.items(), ids=VITS)
def test_blocks_keeps_the_first_of_a_transformer_with_the_weights_that_they_have_in_the_whole(name, block):
    whole, cut = of_library(name, (3, 32, 32)).state_dict(), of_library(name, (3, 32, 32), blocks=2).state_dict()
    assert [key for key in whole if key not in cut] == [
        key for i in range(2, 12) for key in whole if key.startswith(f"{block}{i}.")
    ]
    assert all(torch.equal(tensor, whole[key]) for key, tensor in cut.items())


@pytest.mark.parametrize("qkv", ["fused", "split"])
@pytest.mark.parametrize("name", VITS)
def test_all_layers_of_a_loaded_vit_count_and_its_qkv_as_one_or_three(name, qkv, tmp_path):
    model, shape = Model(architecture=name, blocks=2), (3, 32, 32)
    write_network(tmp_path / "a.safetensors", models.build(model, shape, CLASSES))
    selection = countable(models.load(tmp_path / "a.safetensors", model, shape, CLASSES, qkv))
    assert selection.left_out == {}
    assert len(selection.layers) == 1 + 2 * (4 if qkv == "fused" else 6) + 1


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("timm/resnet1", (3, 32, 32), r"timm has no 'resnet1': did you mean .*resnet18"),
        ("timm/vit_tiny_patch16_22", (3, 32, 32), r"timm has no .*: did you mean vit_tiny_patch16_224 or "),
        ("timm/resnet18.nonsense", (3, 32, 32), r"timm has no 'resnet18\.nonsense'"),
        ("timm/xyzzyxx", (3, 32, 32), r"timm has no 'xyzzyxx'$"),
        ("torchvision/resnet9", (3, 32, 32), r"torchvision has no 'resnet9': did you mean .*resnet18"),
        ("torchvision/vit_b16", (3, 32, 32), r"did you mean vit_b_16 or "),
        ("torchvision/fasterrcnn_resnet50_fpn", (3, 32, 32), r"torchvision has no 'fasterrcnn_resnet50_fpn'"),
        ("torchvision/resnet18", (1, 32, 32), r"images of 3 channels, not 1"),
        ("torchvision/vit_b_16", (3, 40, 40), r"image_size"),
    ],
)
def test_what_a_library_does_not_have_is_refused_with_what_is_near(name, shape, told):
    with pytest.raises(StudyError, match=told):
        of_library(name, shape)


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/shufflenet_v2_x0_5"])
def test_a_network_without_blocks_cannot_be_cut(name):
    with pytest.raises(StudyError, match="has no list of blocks: leave blocks away"):
        of_library(name, (3, 32, 32), blocks=2)


def read(path: Path) -> dict[str, Tensor]:
    return models.read_checkpoint(path, file_hash(path))


TENSORS = {"x.weight": torch.arange(6.0).view(2, 3), "x.bias": torch.ones(2, dtype=torch.float16)}
PARALLEL = {f"module.{name}": tensor for name, tensor in TENSORS.items()}


@pytest.mark.parametrize(
    "held",
    [TENSORS, PARALLEL, {"state_dict": PARALLEL}, {"epoch": 3, "model": PARALLEL, "optimizer": {"lr": [0.1]}}],
    ids=["bare", "module.", "state_dict", "model"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_torch_is_what_the_same_tensors_as_safetensors_are(tmp_path, held, zipped):
    torch.save(held, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    write_tensors(tmp_path / "a.safetensors", TENSORS)
    tensors, expected = read(tmp_path / "a.pth"), read(tmp_path / "a.safetensors")
    assert tensors.keys() == expected.keys() == TENSORS.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


class Code:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_its_code_not_run(tmp_path):
    torch.save({"state_dict": TENSORS, "more": Code(tmp_path / "made")}, tmp_path / "a.pth")
    with pytest.raises(StudyError, match=r"checkpoint .*a\.pth cannot be read"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("held", [torch.ones(2), [TENSORS], {"epoch": 3}, {"model": {"x": [1.0]}}])
def test_a_file_of_torch_that_is_no_state_dict_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(StudyError, match=r"a\.pth holds no state dict"):
        read(tmp_path / "a.pth")


NO_TENSORS = {
    "nothing": b"",
    "a pointer to a file": b"version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 9\n",
    "a page": b"<!doctype html><title>404</title>",
    "an archive cut short": b"PK\x03\x04",
    "a pickle cut short": b"\x80\x02}q",
}


@pytest.mark.parametrize("content", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_is_no_tensors_at_all_is_refused(tmp_path, content, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(content)
    with pytest.raises(StudyError, match=rf"checkpoint .*a\.{suffix} cannot be read"):
        read(tmp_path / f"a.{suffix}")


def test_another_file_of_torch_is_noticed_before_it_is_read(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"none of torch's")
    with pytest.raises(StudyError, match=r"a\.pth has SHA-256 .*, not 00ff: it is another file"):
        models.read_checkpoint(tmp_path / "a.pth", "00ff")


@pytest.fixture
def cut_off(tmp_path, monkeypatch) -> Path:
    """No network and nothing in a cache; the folder of torchvision's cache."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "TORCH_HOME" / "hub" / "checkpoints"


def published(name: str, shape: models.Shape = (3, 32, 32), classes: int = CLASSES, weights: str | None = None):
    return models.published(Model(architecture=name), weights, shape, classes)


def test_published_weights_that_are_out_of_reach_are_refused_in_one_paragraph_that_says_what_to_do(cut_off):
    with pytest.raises(StudyError) as refused:
        published("torchvision/shufflenet_v2_x0_5")
    assert_out_of_reach(str(refused.value), "torchvision/shufflenet_v2_x0_5")
    assert not list(cut_off.glob("*"))


def assert_out_of_reach(message: str, name: str) -> None:
    for part in (name, "in no cache", "connect to a network once", "method: checkpoint"):
        assert part in message
    assert len(message.splitlines()) == 1


CACHED = "shufflenet_v2_x0_5"


@pytest.fixture
def cached(cut_off) -> dict[str, Tensor]:
    """What torchvision's cache holds for one architecture (a download alone checks the hash in the file's name)."""
    torch.manual_seed(3)
    tensors = torchvision.models.get_model(CACHED).state_dict()
    cut_off.mkdir(parents=True)
    torch.save(tensors, cut_off / Path(torchvision.models.get_model_weights(CACHED).DEFAULT.url).name)
    return tensors


@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V1"])
@pytest.mark.parametrize(("classes", "left_out"), [(1000, []), (7, ["fc.weight", "fc.bias"])])
def test_torchvisions_weights_come_from_its_cache_but_for_another_classifier(cached, classes, left_out, weights):
    tensors = published(f"torchvision/{CACHED}", classes=classes, weights=weights)
    assert [name for name in cached if name not in tensors] == left_out
    assert all(torch.equal(tensor, cached[name]) for name, tensor in tensors.items())
    network = of_library(f"torchvision/{CACHED}", (3, 32, 32), classes)
    assert models.start_from(network, tensors) == left_out


@pytest.mark.parametrize(
    ("name", "weights", "told"),
    [
        ("vgg11", None, "nobody publishes weights for vgg11"),
        ("torchvision/resnet9", None, "torchvision has no 'resnet9': did you mean"),
        ("timm/test_vitt", None, "timm has no 'test_vitt': did you mean test_vit"),
        (f"torchvision/{CACHED}", "IMAGENET1K_V9", "IMAGENET1K_V1"),
        ("torchvision/vit_b_16", None, "224"),
    ],
)
def test_weights_that_nobody_publishes_for_such_images_are_refused_for_that_reason(cut_off, name, weights, told):
    """No network would help."""
    with pytest.raises(StudyError, match=told) as refused:
        published(name, weights=weights)
    assert "network once" not in str(refused.value)


def by_timm(home: Path, *asked: tuple[models.Shape, int]) -> list[dict[str, Tensor] | str]:
    """The tensors, or why there are none, in a process of its own, which reads where the cache is."""
    code = f"""
from pathlib import Path
from utilized_rank.base import files
from utilized_rank.base.sections import StudyError
from utilized_rank.training.sections import Model
from utilized_rank.training import models
from utilized_rank.training.architectures import ResidualBlock
for i, asked in enumerate({asked}):
    try:
        tensors = models.published(Model(architecture="timm/test_vit"), None, *asked)
        files.write_tensors(Path({str(home)!r}) / f"{{i}}.safetensors", tensors)
    except StudyError as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, check=True).stdout
    return [told.strip() or read_tensors(home / f"{i}.safetensors")[0] for i in range(len(asked))]


def test_timms_weights_that_are_not_in_its_cache_are_out_of_reach(cut_off, tmp_path):
    (told,) = by_timm(tmp_path, ((3, 32, 32), CLASSES))
    assert_out_of_reach(told, "timm/test_vit")


def test_timms_weights_come_from_its_cache_fitted_to_the_images_but_for_another_classifier(cut_off, tmp_path):
    torch.manual_seed(3)
    own = timm.create_model("test_vit").state_dict()
    hub, commit = tmp_path / "HF_HOME/hub" / "models--timm--test_vit.r160_in1k", 40 * "0"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    write_tensors(hub / "snapshots" / commit / "model.safetensors", own)
    published_for, other = ((3, 160, 160), 1000), ((1, 32, 32), CLASSES)
    same, fitted = by_timm(tmp_path, published_for, other)
    assert same.keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in same.items())
    assert set(own) - set(fitted) == {"head.weight", "head.bias"}
    changed = {name for name, tensor in fitted.items() if not torch.equal(tensor, own[name])}
    assert changed == {"pos_embed", "patch_embed.proj.weight"}
    network = of_library("timm/test_vit", *other)
    assert models.start_from(network, fitted) == ["head.weight", "head.bias"]
