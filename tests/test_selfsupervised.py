import copy
import dataclasses

import pytest
import torch
from torch import nn

from utilized_rank import selfsupervised
from utilized_rank.config import Augmentation, Model, Pretrained, StudyError
from utilized_rank.data import Split
from utilized_rank.evaluation import features, outputs
from utilized_rank.models import build, classifier
from utilized_rank.provenance import file_hash
from utilized_rank.store import write_tensors

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
    encoder = encoder or network()
    torch.manual_seed(0)
    return selfsupervised.pretrain_simclr(encoder, dataset, how, torch.Generator().manual_seed(0), "float32")


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
    return Pretrained(method="checkpoint", model=MODEL, file=str(path), sha256=file_hash(path))


def test_the_weights_of_a_checkpoint_are_its_tensors_and_cost_no_training(tmp_path, dataset):
    given = network().state_dict()
    how = checkpoint(tmp_path / "a.safetensors", given)
    untouched = network()
    before = copy.deepcopy(untouched.state_dict())
    tensors, curve = selfsupervised.initial_weights(untouched, dataset, how, torch.Generator(), "float32")
    assert len(curve) == 0
    assert all(torch.equal(tensors[name], given[name]) for name in given)
    assert all(torch.equal(before[name], value) for name, value in untouched.state_dict().items())


def test_a_changed_checkpoint_is_refused(tmp_path, dataset):
    how = checkpoint(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    with pytest.raises(StudyError, match="another file"):
        selfsupervised.initial_weights(network(), dataset, how, torch.Generator(), "float32")


def test_initial_weights_of_simclr_are_pretrained(dataset):
    expected, _ = pretrain(dataset)
    encoder = network()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tensors, curve = selfsupervised.initial_weights(encoder, dataset, SIMCLR, generator, "float32")
    assert len(curve) == SIMCLR.epochs
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
