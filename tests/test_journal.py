"""Interrupted work goes on where it was, and ends in the very same numbers."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from utilized_rank.base import journal
from utilized_rank.base.files import Damaged, read_tensors, write_tensors
from utilized_rank.base.journal import Answers, Journal, random_state, restore_random_state
from utilized_rank.base.runtime import seeded
from utilized_rank.datasets.images import Split
from utilized_rank.training.loop import fit
from utilized_rank.training.sections import Recipe


class Interrupted(BaseException):
    """What a signal would do, at a place of our choosing."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    monkeypatch.setattr(journal, "EVERY", 0.0)
    monkeypatch.setattr(journal, "SHARE", float("inf"))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))


def split() -> Split:
    draw = torch.Generator().manual_seed(0)
    return Split(torch.randint(0, 256, (20, 3, 1, 1), generator=draw), torch.arange(20) % 2)


def trained(kept: Journal, optimizer: str, stop_at: int | None) -> tuple[nn.Module, object, float]:
    """A small network trained for twelve steps, unless it is interrupted before one of them."""
    generator = seeded(0, "test")
    its, steps = network(), 0

    def loss(images, labels):
        nonlocal steps
        if steps == stop_at:
            raise Interrupted
        steps += 1
        its.train()
        noise = torch.randn(len(images), 3, generator=generator) + random.random() + np.random.rand()  # noqa: NPY002
        return nn.functional.cross_entropy(its(images.flatten(1) / 255 + noise), labels)

    recipe = Recipe(epochs=3, batch_size=5, optimizer=optimizer, lr=0.1)
    curve = fit(its.parameters(), loss, split(), recipe, generator, title="a run", modules=[its], journal=kept)
    return its, curve, random.random()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop_at", [0, 1, 4, 6, 11])
def test_an_interrupted_training_ends_in_the_weights_of_one_that_was_not(tmp_path, optimizer, stop_at):
    whole, curve, after = trained(Journal(), optimizer, None)
    with pytest.raises(Interrupted):
        trained(Journal(tmp_path), optimizer, stop_at)
    again, its_curve, its_after = trained(Journal(tmp_path), optimizer, None)
    assert whole.state_dict().keys() == again.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert curve.equals(its_curve)
    assert after == its_after


def test_a_training_that_had_ended_is_not_run_again(tmp_path):
    whole, _, _ = trained(Journal(tmp_path), "sgd", None)
    again, _, _ = trained(Journal(tmp_path), "sgd", 0)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


def test_it_says_how_far_it_had_come(tmp_path):
    assert journal.where(tmp_path) is None
    with pytest.raises(Interrupted):
        trained(Journal(tmp_path), "sgd", 6)
    assert journal.where(tmp_path) == "a run, epoch 2 of 3, step 2 of 4"


def test_nothing_is_written_before_it_is_due(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "EVERY", 3600.0)
    kept = Journal(tmp_path)
    kept.put("a", {}, {"x": 1}, "a")
    assert not list(tmp_path.iterdir())
    assert kept.get("a") == ({}, {"x": 1})
    assert Journal(tmp_path).get("a") is None


def test_without_a_folder_nothing_is_kept():
    kept = Journal()
    kept.put("a", {}, {}, "a")
    assert kept.get("a") is None
    assert not kept.due
    assert not kept.keeps


@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_random_numbers_go_on_as_they_would_have(seed, drawn):
    generator = seeded(seed, "test")
    for _ in range(drawn):
        random.gauss(0, 1), np.random.randn()  # noqa: NPY002
    state = copy.deepcopy(random_state(generator))

    def draw() -> list[float]:
        own = torch.rand(3, generator=generator).tolist()
        legacy = [np.random.randn(), np.random.rand()]  # noqa: NPY002
        return [random.gauss(0, 1), random.random(), *legacy, *torch.rand(2).tolist(), *own]

    first = draw()
    restore_random_state(state, generator)
    assert draw() == first


def asked(answers: Answers, work: list[int], stop_at: int | None = None) -> list[int]:
    """Six questions, each of which depends on the last answer."""
    found = [1]
    for i in range(6):
        if i == stop_at:
            raise Interrupted

        def work_out(i: int = i) -> int:
            work.append(i)
            return (3 * found[-1] + i) % 7

        found.append(answers([i, found[-1]], work_out))
    return found


@given(st.integers(0, 6))
def test_what_was_answered_is_not_worked_out_again(tmp_path_factory, stop_at):
    folder = tmp_path_factory.mktemp("journal")
    expected = asked(Answers(Journal(), "search"), [])
    with pytest.raises(Interrupted) if stop_at < 6 else _nothing():
        asked(Answers(Journal(folder), "search"), [], stop_at)
    work: list[int] = []
    assert asked(Answers(Journal(folder), "search"), work) == expected
    assert work == list(range(stop_at, 6))


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_answers_to_other_questions_are_worth_nothing(tmp_path):
    Answers(Journal(tmp_path), "search")(["a"], lambda: 1)
    assert Answers(Journal(tmp_path), "search")(["b"], lambda: 2) == 2


@given(st.data())
def test_a_file_with_one_other_byte_is_never_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.tensor(3)}, {"x": [1, "two"]})
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    try:
        tensors, known = read_tensors(path)
    except (Damaged, ValueError):
        return
    # Only a space of the header's padding, or the name of the hash itself, can be another without a word.
    assert torch.equal(tensors["a"], torch.arange(5.0))
    assert int(tensors["b"]) == 3
    assert known == {"x": [1, "two"]}


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_a_file_that_is_cut_short_is_named(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.arange(5.0)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(Damaged, match=r"a\.safetensors"):
        read_tensors(path)


def test_a_damaged_entry_is_named_and_begun_anew(tmp_path, capsys):
    Journal(tmp_path).put("a", {"x": torch.ones(3)}, {}, "a")
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert Journal(tmp_path).get("a") is None
    assert file.name in capsys.readouterr().err
    assert not file.is_file()
