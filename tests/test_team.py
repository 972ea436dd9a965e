"""Processes that train one network together: here two of them, on processors."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from conftest import toy_dataset
from torch import nn

from utilized_rank.base.files import read_tensors, write_tensors
from utilized_rank.base.sections import StudyError
from utilized_rank.datasets.sections import Augmentation
from utilized_rank.training import loop, selfsupervised, team
from utilized_rank.training.models import build
from utilized_rank.training.sections import Model, Pretrained, Recipe

RECIPE = Recipe(epochs=1, lr=0.05, batch_size=16, optimizer="sgd", warmup_epochs=0.5)
VIT = Model(architecture="vit", dim=24, depth=1, heads=3, patch_size=4)
CHANGED = Augmentation(shift=0.1, contrast=0.3, noise=0.3)
SIMCLR = Pretrained(method="simclr", model=VIT, epochs=6, lr=2e-3, batch_size=16, augmentation=CHANGED)
MAE = SIMCLR.model_copy(update={"method": "mae", "mask_ratio": 0.5})
PROCESSES = 2


def network() -> nn.Module:
    """Without batch norm, which sees a part of a batch alone."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


def supervised() -> tuple[nn.Module, list[float]]:
    its = network()
    curve = loop.train_supervised(its, toy_dataset(), RECIPE, seeded(), "float32", "trained")
    return its, curve.loss.tolist()


def pretrained(recipe: Pretrained) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(1)
    its = build(VIT, (1, 8, 8), 2)
    how = toy_dataset(), recipe, seeded(), "float32", Path()
    _, curve = selfsupervised.initial_weights(its, *how)
    return its, curve.loss.tolist()


def simclr() -> tuple[nn.Module, list[float]]:
    return pretrained(SIMCLR)


def mae() -> tuple[nn.Module, list[float]]:
    return pretrained(MAE)


def seeded() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


def one_of(rank: int, port: int, work, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    its, losses = work()
    write_tensors(folder / f"{rank}.safetensors", dict(its.state_dict()), {"losses": losses})
    dist.destroy_process_group()


def together(work, folder: Path):
    """The weights that each of some processes ends with, and its losses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(one_of, (port, work, folder), PROCESSES)
    return [read_tensors(folder / f"{rank}.safetensors") for rank in range(PROCESSES)]


def test_together_they_take_the_steps_of_one_process(tmp_path):
    """In the first epoch: the second has another order, as changes of images are drawn for a part of them in each."""
    alone, losses = supervised()
    for weights, about in together(supervised, tmp_path):
        torch.testing.assert_close(weights, dict(alone.state_dict()))
        assert about["losses"] == pytest.approx(losses)


@pytest.mark.parametrize("work", [simclr, mae])
def test_they_end_with_the_same_weights_whatever_their_images_changed_to(work, tmp_path):
    (first, about), (second, others) = together(work, tmp_path)
    trained = {name for name in first if "running" not in name and "tracked" not in name}
    torch.testing.assert_close({n: first[n] for n in trained}, {n: second[n] for n in trained}, rtol=0, atol=0)
    assert about == others
    assert about["losses"][-1] < about["losses"][0]


def test_parts_are_of_one_size_and_cover_every_batch(monkeypatch):
    batches = torch.arange(24).split(8)
    monkeypatch.setattr(team, "size", lambda: 4)
    found = []
    for rank in range(4):
        monkeypatch.setattr(team, "rank", lambda rank=rank: rank)
        found.append(team.parts(batches, 8))
    assert {len(part) for its in found for part in its} == {2}
    for number, batch in enumerate(batches):
        assert torch.cat([its[number] for its in found]).sort().values.equal(batch)
    with pytest.raises(StudyError, match="a batch of 6 images has no equal parts for 4 processes"):
        team.parts([], 6)
