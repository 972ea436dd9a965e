import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer
from timm.models.xcit import Xcit
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from utilized_rank.base.files import file_hash, write_tensors
from utilized_rank.base.sections import StudyError
from utilized_rank.datasets.data import Dataset
from utilized_rank.datasets.images import Split
from utilized_rank.datasets.sections import Augmentation
from utilized_rank.networks.evaluation import features, outputs
from utilized_rank.training import selfsupervised
from utilized_rank.training.models import build, classifier
from utilized_rank.training.sections import Model, Pretrained

MODEL = Model(architecture="resnet20", width=0.25)
SIMCLR = Pretrained(
    method="simclr",
    model=MODEL,
    epochs=3,
    lr=3e-3,
    batch_size=32,
    augmentation=Augmentation(shift=0.1, contrast=0.2, noise=0.1),
)


def network(name: str = "resnet20") -> nn.Module:
    torch.manual_seed(0)
    model = MODEL if name == "resnet20" else Model(architecture="vit", dim=24, depth=1, heads=3, patch_size=4)
    return build(model, (1, 8, 8), 2)


def pretrain(dataset, how=SIMCLR, encoder=None):
    """The encoder's tensors, and the curve."""
    encoder = encoder or network()
    torch.manual_seed(0)
    curve = selfsupervised.pretrain_simclr(encoder, dataset, how, torch.Generator().manual_seed(0), "float32")
    return selfsupervised.encoder_tensors(encoder), curve


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_an_encoder_gives_what_flows_into_the_classifier(name, dataset):
    whole = network(name).eval()
    images = dataset.inputs("search")
    expected = features(whole, classifier(whole), images)
    torch.testing.assert_close(outputs(selfsupervised.Encoder(whole), images), expected)


def test_pretraining_lowers_the_loss(dataset):
    _, curve = pretrain(dataset, SIMCLR.model_copy(update={"epochs": 8}))
    assert curve.loss.iloc[-1] < 0.9 * curve.loss.iloc[0]


@pytest.mark.parametrize("name", ["resnet20", "vit"])
def test_pretraining_gives_the_encoder_without_its_classifier(name, dataset):
    before = network(name)
    encoder = network(name)
    tensors, _ = pretrain(dataset, encoder=encoder)
    head = "linear" if name == "resnet20" else "head"
    assert set(encoder.state_dict()) - set(tensors) == {f"{head}.weight", f"{head}.bias"}
    assert torch.equal(classifier(encoder).weight, classifier(before).weight)
    moved = [n for n, p in before.named_parameters() if n in tensors and not torch.equal(p, tensors[n])]
    assert len(moved) == len(list(before.named_parameters())) - 2


def test_pretraining_reads_no_label_and_no_test_image(dataset):
    train = dataset.splits["train"]
    blind = {"train": Split(train.images, 1 - train.labels)}
    tensors, _ = pretrain(dataset)
    same, _ = pretrain(dataclasses.replace(dataset, splits=blind))
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)


def test_pretraining_leaves_no_hook_behind(dataset):
    encoder = network()
    pretrain(dataset, encoder=encoder)
    assert not classifier(encoder)._forward_pre_hooks


def test_images_without_any_difference_cannot_be_told_apart(dataset):
    """NT-Xent of 2 B equal views is log(2 B - 1): each has all others as likely partners."""
    flat = {"train": Split(torch.full_like(dataset.splits["train"].images, 9), dataset.labels("train"))}
    how = SIMCLR.model_copy(update={"epochs": 1, "lr": 1e-12, "augmentation": Augmentation()})
    _, curve = pretrain(dataclasses.replace(dataset, splits=flat), how)
    assert curve.loss[0] == pytest.approx(torch.log(torch.tensor(63.0)).item(), abs=1e-3)


def checkpoint(path, tensors) -> Pretrained:
    write_tensors(path, tensors)
    given = {"file": path.name, "sha256": file_hash(path), "supervision": "supervised"}
    return Pretrained(method="checkpoint", model=MODEL, **given)


def test_the_weights_of_a_checkpoint_are_its_tensors_and_cost_no_training(tmp_path, dataset):
    given = network().state_dict()
    how = checkpoint(tmp_path / "a.safetensors", given)
    untouched = network()
    before = copy.deepcopy(untouched.state_dict())
    tensors, curve = selfsupervised.initial_weights(untouched, dataset, how, torch.Generator(), "float32", tmp_path)
    assert len(curve) == 0
    assert all(torch.equal(tensors[name], given[name]) for name in given)
    assert all(torch.equal(before[name], value) for name, value in untouched.state_dict().items())


def test_a_changed_checkpoint_is_refused(tmp_path, dataset):
    how = checkpoint(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    with pytest.raises(StudyError, match="another file"):
        selfsupervised.initial_weights(network(), dataset, how, torch.Generator(), "float32", tmp_path)


def test_initial_weights_of_simclr_are_pretrained(dataset):
    expected, _ = pretrain(dataset)
    encoder = network()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tensors, curve = selfsupervised.initial_weights(encoder, dataset, SIMCLR, generator, "float32", Path())
    assert len(curve) == SIMCLR.epochs
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


VIT = Model(architecture="vit", dim=24, depth=2, heads=3, patch_size=2)
MAE = Pretrained(method="mae", model=VIT, epochs=3, lr=3e-3, batch_size=32, mask_ratio=0.5, decoder_depth=1)


def vit() -> nn.Module:
    """16 patches of 2 x 2 pixels."""
    torch.manual_seed(0)
    return build(VIT, (1, 8, 8), 2)


def mask(dataset: Dataset, how: Pretrained = MAE, encoder: nn.Module | None = None, seed: int = 0):
    """The encoder's tensors, and the curve."""
    encoder = encoder or vit()
    torch.manual_seed(seed)
    curve = selfsupervised.pretrain_mae(encoder, dataset, how, torch.Generator().manual_seed(seed), "float32")
    return selfsupervised.encoder_tensors(encoder), curve


def unlabelled(images: Tensor) -> Dataset:
    pixels = images.clamp(0, 255).byte()
    return Dataset({"train": Split(pixels, torch.zeros(len(pixels), dtype=torch.int64))}, ["one"], [0.5], [0.25])


@pytest.fixture
def ramps(generator) -> Dataset:
    """Each image grows brighter in a direction of its own: so does each of its patches, once normalised."""
    angle = torch.rand(256, 1, 1, 1, generator=generator) * 2 * torch.pi
    y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
    return unlabelled(128 + 20 * (angle.cos() * x + angle.sin() * y))


@pytest.fixture
def noise(generator) -> Dataset:
    """No pixel tells anything of another."""
    return unlabelled(torch.randint(0, 256, (256, 1, 8, 8), generator=generator))


def test_hidden_patches_are_guessed_from_the_others_where_they_follow_from_them_and_not_where_they_do_not(ramps, noise):
    """Whoever knows nothing loses 3/4 a pixel: the variance, by 4 - 1, of a patch of four is 1."""
    how = MAE.model_copy(update={"epochs": 6})
    (_, learnt), (_, blind) = mask(ramps, how), mask(noise, how)
    assert blind.loss.min() > 0.98 * 0.75
    assert learnt.loss[0] > 0.6
    assert learnt.loss.iloc[-1] < 0.2


@pytest.mark.parametrize(("ratio", "seen"), [(0.25, 12), (0.5, 8), (0.75, 4), (0.9, 1)])
def test_the_encoder_sees_the_part_of_the_patches_that_the_ratio_leaves_and_the_class_token(dataset, ratio, seen):
    """Each as the network itself embeds it, at its own place, none twice."""
    encoder, patches, inputs = vit(), [], []
    encoder.patch_embed.register_forward_hook(lambda *call: patches.append(call[2] + encoder.pos_embed[:, 1:]))
    encoder.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    mask(dataset, MAE.model_copy(update={"mask_ratio": ratio, "epochs": 1, "lr": 1e-12}), encoder)
    assert len(inputs) == len(patches) == 3
    for tokens, embedded in zip(inputs, patches, strict=True):
        assert tokens.shape == (32, 1 + seen, 24)
        torch.testing.assert_close(tokens[:, :1], (encoder.cls_token + encoder.pos_embed[:, :1]).expand(32, -1, -1))
        distances, places = torch.cdist(tokens[:, 1:], embedded).min(-1)
        assert distances.max() < 1e-4
        assert all(len(set(own)) == seen for own in places.tolist())
        assert len({tuple(sorted(own)) for own in places.tolist()}) > 1  # each image has its own hidden


def test_masked_pretraining_changes_all_tensors_but_the_classifiers_which_it_leaves_out(dataset):
    before, encoder = vit(), vit()
    tensors, curve = mask(dataset, encoder=encoder)
    after = encoder.state_dict()
    assert len(curve) == MAE.epochs
    assert set(after) - set(tensors) == {"head.weight", "head.bias"}
    same = {name for name, tensor in before.state_dict().items() if torch.equal(tensor, after[name])}
    assert same == {"head.weight", "head.bias"}
    assert after.keys() == before.state_dict().keys()  # the decoder is gone
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


def test_masked_pretraining_is_reproducible_to_the_bit_and_reads_no_label_and_no_test_image(dataset):
    train = dataset.splits["train"]
    blind = dataclasses.replace(dataset, splits={"train": Split(train.images, 1 - train.labels)})
    (tensors, curve), (same, again), (_, other) = mask(dataset), mask(blind), mask(dataset, seed=1)
    assert curve.equals(again)
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    assert not curve.equals(other)


def test_a_mask_over_every_patch_is_refused_before_any_training(dataset):
    with pytest.raises(StudyError, match=r"mask_ratio 0\.95 hides all of \d+ patches"):
        mask(dataset, MAE.model_copy(update={"mask_ratio": 0.95}))


SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 2, "embed_dim": 24, "depth": 1, "num_heads": 3}
OTHERS = {
    "ResNet20": network,
    "VGG": lambda: build(Model(architecture="vgg11", width=0.1), (1, 32, 32), 2),
    "torchvision's ViT": lambda: TorchvisionViT(8, 2, 1, 3, 24, 48, num_classes=2),
    "no class token": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "registers": lambda: VisionTransformer(**SMALL, reg_tokens=2),
    "Beit": lambda: Beit(**SMALL),
    "Cait": lambda: Cait(**SMALL),
    "Xcit": lambda: Xcit(**SMALL | {"img_size": 16, "patch_size": 8}),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_network_that_is_no_vit_of_timm_with_one_class_token_cannot_be_masked(dataset, make):
    with pytest.raises(StudyError, match="MAE hides patches of a vision transformer with one class token"):
        mask(dataset, encoder=make())


def test_initial_weights_of_mae_are_pretrained(dataset):
    expected, _ = mask(dataset)
    encoder = vit()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tensors, curve = selfsupervised.initial_weights(encoder, dataset, MAE, generator, "float32", Path())
    assert len(curve) == MAE.epochs
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
