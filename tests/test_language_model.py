"""The example of a language model, shrunk."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from examples import language_model as example
from utilized_rank.base.files import read_json, read_table

TINY = example.Settings(
    example.Training(search=0.2, test=0.2, layers=1, width=16, heads=2, context=16, steps=5, batch=4, every=5),
    calibration=16,
    search=4,
    kept=(0.8,),
    methods=("compensated", "svd"),
    loss_inputs=4,
    draws=100,
)


@pytest.fixture(scope="module")
def documents():
    """The shortest topics, and two that share a paragraph."""
    shortest = sorted(example.topics().items(), key=lambda item: len(item[1]))[:20]
    shared = "A paragraph that is long enough not to stand in two topics by coincidence."
    return {**dict(shortest), "one": f"One.\n\n{shared}", "other": f"{shared}\n\nOther."}


class Uniform(nn.Module):
    def forward(self, given):
        return torch.zeros(*given.shape, example.BYTES)


def test_no_topic_is_in_two_splits_and_none_that_shares_a_paragraph(documents):
    for seed in range(5):
        names = example.split(documents, {"search": 0.2, "test": 0.2}, seed)
        assert sorted(name for its in names.values() for name in its) == sorted(documents)
        assert all(names.values())
        assert sum({"one", "other"} <= set(its) for its in names.values()) == 1
    whole = example.split(example.topics(), {"search": 0.12, "test": 0.12}, 0)
    told = [{p for name in its for p in example.paragraphs(example.topics()[name])} for its in whole.values()]
    for i, its in enumerate(told):
        for other in told[:i]:
            assert all(len(paragraph) < example.PARAGRAPH for paragraph in its & other)


def test_every_byte_but_the_first_is_predicted_once():
    pieces = example.windows(bytes(range(41)), 10)
    assert pieces[:, 1:].flatten().tolist() == list(range(1, 41))


def test_a_uniform_network_has_the_perplexity_of_its_vocabulary(documents):
    pieces = example.windows(example.joined(documents.values()), 16)
    each = example.losses(Uniform(), pieces)
    assert each.shape == (len(pieces),)
    assert example.perplexity(each) == pytest.approx(256)
    assert example.bits(example.perplexity(each)) == pytest.approx(8)


def test_a_network_does_not_differ_from_itself_and_the_interval_holds_the_change():
    each = np.random.default_rng(0).normal(2, 0.3, 50)
    assert example.paired_change(each, each, 100, 0) == example.Change(0, 0, 0)
    shifted = example.paired_change(each, each + math.log(1.1), 100, 0)
    assert [shifted.percent, shifted.low, shifted.high] == pytest.approx([10, 10, 10])
    noisy = example.paired_change(each, each + np.random.default_rng(1).normal(0.1, 0.05, 50), 500, 0)
    assert noisy.low < noisy.percent < noisy.high


def test_a_text_that_repeats_the_training_text_costs_a_compressor_little():
    text = example.joined(example.topics().values())[:20_000]
    found = example.baselines(text, text[:5_000])
    assert found["xz, after the training text"] < 0.2 < found["xz"] < found["unigram"] < 8


def test_the_whole_example_runs(documents, tmp_path):
    weights, report = tmp_path / "gpt.safetensors", tmp_path / "report"
    example.run(TINY, documents, weights, report)
    tables = {path.stem: read_table(path) for path in report.glob("*.csv")}
    assert list(tables["training"]) == ["step", "train_bits", "search_bits", "seconds"]
    used = tables["utilization"]
    assert {"layer", "kind", "shape", "tolerance", "k_s", "k_t", "r", "utilization"} <= set(used)
    assert used.groupby("tolerance").kind.agg(set).map(lambda kinds: kinds == set(example.KINDS.values())).all()
    made = tables["compression"]
    assert {"asked", "method", "parameters_kept", "perplexity", "bits_per_byte", "change", "low", "high"} <= set(made)
    assert made.method.tolist() == ["none", "compensated", "svd", "compensated"]
    assert made.iloc[0][["change", "low", "high"]].tolist() == [0, 0, 0]
    assert (made.parameters_kept[1:3] <= 0.8).all()
    assert {"GPT", "ViT", "ResNet-20", "VGG11"} <= set(tables["beside"].network)
    assert read_json(report / "record.json")["perplexity"]["test"] == pytest.approx(made.perplexity[0])
    assert {path.name for path in report.glob("*.svg")} == {"utilization.svg", "compression.svg"}
    assert not (report / "summary.json").exists()  # it is no study of images


def test_weights_are_read_where_they_are_of_the_same_parameters(documents, tmp_path):
    text = example.joined(documents.values())
    pieces, path = example.windows(text, 16), tmp_path / "gpt.safetensors"
    first, curve = example.trained(text, pieces, TINY.training, "a", path)
    written = path.stat().st_mtime_ns
    again, same = example.trained(text, pieces, TINY.training, "a", path)
    assert path.stat().st_mtime_ns == written
    assert same.equals(curve)
    assert np.array_equal(example.losses(first, pieces), example.losses(again, pieces))
    example.trained(text, pieces, replace(TINY.training, steps=3), "a", path)
    assert path.stat().st_mtime_ns != written


def test_the_page_of_the_guide_runs_as_it_is_built(monkeypatch, capsys):
    root = Path(example.__file__).parents[1]
    blocks = re.findall(
        r'^```python exec="on".*?\n(.*?)^```', (root / "docs/language_model.md").read_text(), re.M | re.S
    )
    monkeypatch.chdir(root)
    exec("\n".join(blocks), {})
    page = capsys.readouterr().out
    made = read_table(root / "reports/language_model/compression.csv")
    assert page.count("data:image/svg+xml") == 2
    assert all(f"{change:+.1f}%" in page for change in made.change[1:])
