"""One import for a network of one's own: what may be given, what comes back, what is refused in one line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torchvision
from safetensors.torch import load_file
from test_scores import Two
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import utilized_rank as ur
from utilized_rank.api import folders
from utilized_rank.base.files import file_hash
from utilized_rank.networks.batches import gathered
from utilized_rank.networks.evaluation import Labelled, outputs
from utilized_rank.ranks import measure as library

INPUTS, EPSILON, ENERGY = 60, 5.0, 0.9
QUIET = {"progress": False, "losses": "energy"}


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def images(generator) -> Tensor:
    return torch.randn(INPUTS, 6, generator=generator)


@pytest.fixture
def labels(network, images) -> Tensor:
    return network(images).argmax(1)


class ByName(nn.Module):
    """As networks of Hugging Face: no argument is needed, and the logits have a name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        assert labels is None
        return {"logits": self.network(pixels)}


def encoding(given: dict[str, Tensor]) -> Any:
    return pytest.importorskip("transformers", reason="a dictionary of Hugging Face").BatchEncoding(given)


def assert_same(found: ur.Utilization, expected: pd.DataFrame) -> None:
    columns = ["m", "n", "k_s", "k_t", "r", "utilization"]
    pd.testing.assert_frame_equal(found.layers[columns], expected[columns])


LABELLED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
    "list of pairs": lambda x, y: [(x[:9], y[:9]), (x[9:], y[9:])],
    "list of lists": lambda x, y: [[x[:9], y[:9]], [x[9:], y[9:]]],
    "pair of tensors": lambda x, y: (x, y),
    "generator": lambda x, y: ((x[i : i + 20], y[i : i + 20]) for i in range(0, INPUTS, 20)),
    "library's own": Labelled,
    "bytes": lambda x, y: (x, y.byte()),
}
NAMED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dictionary": lambda x, y: {"pixels": x, "labels": y},
    "encoding": lambda x, y: encoding({"pixels": x, "labels": y}),
    "list of dictionaries": lambda x, y: [
        {"pixels": x[i : i + 9], "labels": y[i : i + 9]} for i in range(0, INPUTS, 9)
    ],
    "list of encodings": lambda x, y: [encoding({"pixels": x[i::2], "labels": y[i::2]}) for i in (0, 1)],
    "pair of a dictionary and labels": lambda x, y: ({"pixels": x}, y),
}
UNLABELLED: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "loader of tensors": lambda x: DataLoader(x, batch_size=7),
    "loader of single tensors": lambda x: DataLoader(TensorDataset(x), batch_size=7),
    "list of tensors": lambda x: list(x.split(9)),
    "single tensor": lambda x: (x,),
    "generator of tensors": lambda x: (its for its in x.split(9)),
}


@pytest.fixture
def expected(network, images, labels) -> library.Measurement:
    return library.measure(network, Labelled(images, labels), images, [EPSILON], precision="float32")


@pytest.mark.parametrize("form", LABELLED)
def test_a_search_on_labels_in_any_form_finds_what_the_library_finds(form, network, images, labels, expected):
    given = LABELLED[form](images, labels)
    found = ur.measure(network, given, images if form == "generator" else None, epsilon=EPSILON)
    assert_same(found, expected.layers)
    assert found.mlu == expected.mean_layer_utilization()[EPSILON] < 1
    assert (found.score, found.search, found.calibration) == (100, INPUTS, INPUTS)


@pytest.mark.parametrize("form", NAMED)
def test_a_search_on_arguments_by_name_finds_the_same(form, network, images, labels, expected):
    found = ur.measure(ByName(network), NAMED[form](images, labels), epsilon=EPSILON)
    assert_same(found, expected.layers)
    assert list(found.layers.layer) == ["network.0", "network.2", "network.4"]


@pytest.mark.parametrize("form", [*UNLABELLED, *LABELLED, *NAMED])
def test_labels_are_left_away_where_none_are_needed(form, network, images, labels):
    whole = ur.measure(network, images, energy=ENERGY)
    given = UNLABELLED[form](images) if form in UNLABELLED else (LABELLED | NAMED)[form](images, labels)
    of = ByName(network) if form in NAMED else network
    assert_same(ur.measure(of, calibration=given, energy=ENERGY), whole.layers)


@pytest.mark.parametrize("form", ["named", "in order", "loader", "pairs with labels", "loader with labels"])
def test_a_network_that_needs_two_arguments_is_given_pairs_as_they_are(form, generator):
    torch.manual_seed(0)
    network, a, b = Two().eval(), *(torch.randn(INPUTS, m, generator=generator) for m in (6, 4))
    labels = network(a, b)["logits"].argmax(1)
    given = {
        "named": {"a": a, "b": b},
        "in order": (a, b),
        "loader": DataLoader(TensorDataset(a, b), batch_size=7),
        "pairs with labels": [((a, b), labels)],
        "loader with labels": DataLoader([((a[i], b[i]), labels[i]) for i in range(INPUTS)], batch_size=7),
    }[form]
    score = Labelled(gathered((a, b)), labels)
    found = ur.measure(network, calibration=given, epsilon=EPSILON, score=score)
    assert_same(found, library.measure(network, score, (a, b), [EPSILON], precision="float32").layers)
    if "labels" in form:
        assert_same(ur.measure(network, given, epsilon=EPSILON), found.layers)


def test_a_score_of_ones_own_finds_what_its_labels_find(network, images, labels):
    by_labels = ur.measure(network, (images, labels), epsilon=EPSILON)

    def loss(its: nn.Module) -> float:
        return -100 + 100 * float((outputs(its, images).argmax(1) == labels).float().mean())

    by_score = ur.measure(network, calibration=images, epsilon=EPSILON, score=loss)
    assert_same(by_score, by_labels.layers)
    assert (by_labels.score, by_score.score) == (100, 0)
    assert by_score.search is None


def test_within_a_tolerance_the_smaller_network_keeps_its_accuracy(network, images, labels):
    small = ur.compress(network, images, epsilon=EPSILON, search=(images, labels), **QUIET)
    assert (outputs(small, images).argmax(1) == labels).float().mean() >= 0.95 - 1e-6
    before, after = small.utilized_rank["parameters"]
    assert after < before
    assert small.utilized_rank["budget"] == {"epsilon": EPSILON}


@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("method", ["compensated", "optimal", "svd", "projection"])
def test_a_budget_is_kept_by_every_method(network, images, budget, method):
    small = ur.compress(network, images, method=method, **{budget: 0.8}, **QUIET)
    before, after = small.utilized_rank["parameters" if budget == "params" else budget]
    assert after <= 0.8 * before
    assert outputs(small, images).shape == (INPUTS, 3)


MODES: dict[str, Callable[[Tensor, Tensor], dict[str, Any]]] = {
    "search": lambda x, y: {"search": (x, y), "epsilon": EPSILON},
    "energy": lambda x, y: {"calibration": x, "energy": ENERGY},
}


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_it_gives_back_what_is_done_and_names_the_others(mode, network, images, labels):
    how, rows = MODES[mode](images, labels), []
    whole = ur.measure(network, **how)

    def on_layer(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt

    found = ur.measure(network, **how, on_layer=on_layer)
    pd.testing.assert_frame_equal(found.layers, whole.layers[:2])
    assert found.layers.to_dict("records") == rows
    assert found.left_out == {"4": "the search was interrupted before it"}
    assert found.mlu == pytest.approx(whole.layers.utilization[:2].mean())


@pytest.mark.parametrize("mode", MODES)
def test_interrupted_before_the_first_layer_it_ends(mode, network, images, labels, monkeypatch):
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "layer_ranks" if mode == "search" else "energy_ranks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ur.measure(network, **MODES[mode](images, labels))


class Tagged(nn.Module):
    """Has a layer that is never called, under a name that HTML must not take as it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.add_module("<b>&never", nn.Linear(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.fixture
def found(network, images, labels) -> ur.Utilization:
    return ur.measure(Tagged(network), (images, labels), epsilon=EPSILON)


def test_the_mean_layer_utilization_is_the_mean_of_r_over_the_smaller_width(found):
    widths = found.layers[["m", "n"]].min(axis=1)
    assert found.mlu == pytest.approx((found.layers.r / widths).mean())
    assert list(found.layers["shape"]) == ["12×6", "10×12", "3×10"]
    assert list(found.layers.weight_rank) == [6, 10, 3]


def test_a_frame_is_a_copy(found):
    frame, mlu = found.to_frame(), found.mlu
    frame["utilization"] = 0.0
    assert found.mlu == mlu > 0


def test_it_is_shown_as_a_table_with_its_mean_and_what_was_left_out(found):
    shown = repr(found)
    for name in found.layers.layer:
        assert re.search(rf"^ *{re.escape(name)} ", shown, re.MULTILINE)
    assert f"MLU {100 * found.mlu:.1f}%, within 5 points of 100.00%, on 60 inputs" in shown
    assert "left out (1):\n<b>&never: its module is never called" in shown


def test_what_a_notebook_shows_has_its_names_escaped(images):
    network = nn.Sequential()
    network.add_module("<i>layer", nn.Linear(6, 3))
    shown = ur.measure(Tagged(network), images, energy=ENERGY)._repr_html_()
    assert "&lt;b&gt;&amp;never: its module is never called" in shown
    assert "network.&lt;i&gt;layer" in shown
    assert "<b>&never" not in shown
    assert "<i>layer" not in shown
    assert "at 0.9 of the variance of 60 inputs" in shown


def test_a_plot_is_one_bar_a_layer_on_axes_of_its_own_or_those_given(found):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, given = plt.subplots()
    axes = found.plot()
    assert found.plot(given) is given
    assert axes is not given
    for drawn in (axes, given):
        heights = [bar.get_height() for bar in drawn.patches]
        assert heights == pytest.approx(list(100 * found.layers.utilization))
        assert [text.get_text() for text in drawn.get_xticklabels()] == list(found.layers.layer)
        assert f"{100 * found.mlu:.1f}%" in drawn.get_legend().get_texts()[0].get_text()
    plt.close(axes.figure)
    plt.close(figure)


@pytest.mark.parametrize("mode", MODES)
def test_a_record_is_json_of_everything_but_the_moments(mode, network, images, labels):
    found = ur.measure(Tagged(network), **MODES[mode](images, labels))
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["mlu"] == found.mlu
    assert record["left_out"] == found.left_out
    assert pd.DataFrame(record["layers"]).equals(found.layers)
    assert record[mode] == (INPUTS if mode == "search" else ENERGY)
    assert "moments" not in record


@pytest.fixture
def small(network, images) -> nn.Module:
    return ur.compress(network, images, params=0.8, **QUIET)


def test_a_folder_that_has_something_in_it_is_left_alone(small, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ur.InputError, match="is not an empty folder: name another, or empty it"):
            ur.save(small, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("step", ["save_file", "_write_json", "_readme"])
def test_where_saving_fails_midway_nothing_is_there(step, small, tmp_path, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, step, fail)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(OSError, match="no space left"):
            ur.save(small, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    monkeypatch.undo()
    assert ur.save(small, tmp_path / "empty") == tmp_path / "empty"


def test_a_folder_says_what_was_done_and_is_loaded_with_that(network, small, images, tmp_path):
    folder = ur.save(small, tmp_path / "in" / "a" / "new" / "folder", about="Of six features.")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "compression.json",
        "layers.json",
        "network.safetensors",
    ]
    done = json.loads((folder / "compression.json").read_text())
    assert done.pop("sha256") == file_hash(folder / "network.safetensors")
    assert done == {name: told for name, told in small.utilized_rank.items() if name != "layers"}
    assert load_file(folder / "network.safetensors").keys() == small.state_dict().keys()
    assert "Of six features." in (folder / "README.md").read_text()
    loaded = ur.load(folder, network)
    assert loaded.utilized_rank == small.utilized_rank
    again = ur.save(loaded, tmp_path / "again")
    for path in folder.iterdir():
        if path.name != "README.md":
            assert (again / path.name).read_bytes() == path.read_bytes()
    assert torch.equal(loaded(images), small(images))


def test_a_network_trained_on_since_is_saved_as_it_is(network, small, images, tmp_path):
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.1
    assert torch.equal(ur.load(ur.save(small, tmp_path / "small"), network)(images), small(images))


OTHERS: dict[str, tuple[nn.Module, str]] = {
    "other widths": (
        nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3), nn.Linear(3, 3)),
        "Sequential: Error(s) in loading state_dict for Sequential:; Missing key(s) in state_dict: "
        '"5.weight", "5.bias".',
    ),
    "none of its layers": (nn.ReLU(), "ReLU: "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_network_is_refused_with_why(name, small, tmp_path):
    folder = ur.save(small, tmp_path / "small")
    other, why = OTHERS[name]
    with pytest.raises(ur.InputError, match=re.escape(f"is of another network than {why}")) as raised:
        ur.load(folder, other)
    assert len(str(raised.value).splitlines()) == 1


def test_of_why_a_folder_is_refused_three_lines_are_told(network, small, tmp_path):
    folder = ur.save(small, tmp_path / "small")
    for module in (network[0], network[2], network[4]):
        module.weight = nn.Parameter(torch.zeros(1, 1))
        module.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(ur.InputError, match=r"size mismatch for 0\.weight") as raised:
        ur.load(folder, network)
    assert len(str(raised.value).split("; ")) == 3


@pytest.mark.parametrize("name", ["network.safetensors", "layers.json", "compression.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_folder_that_is_none_is_refused(name, damage, network, small, tmp_path):
    folder = ur.save(small, tmp_path / "small")
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(ur.InputError, match="is no folder of a smaller network"):
        ur.load(folder, network)


ALONE = """
import sys
sys.modules["utilized_rank"] = None
{code}
import torch
torch.save(network(torch.load("inputs.pt")), "outputs.pt")
"""
EXPRESSIONS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "torchvision": (
        "import torchvision",
        "torchvision.models.mobilenet_v3_small(width_mult=0.25, num_classes=5)",
        (8, 3, 32, 32),
    ),
    "attention": (
        "",
        "nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(80, 5))",
        (8, 5, 16),
    ),
    "padding": (
        "import timm",
        "timm.create_model('test_efficientnet', num_classes=5, pad_type='same')",
        (8, 3, 48, 48),
    ),
}


@pytest.mark.parametrize("name", ["torchvision", "attention", pytest.param("padding", marks=pytest.mark.networks)])
def test_the_lines_of_a_folders_readme_load_it_without_this_package(name, tmp_path, generator):
    imports, expression, shape = EXPRESSIONS[name]
    torch.manual_seed(0)
    given = {"nn": nn, "torchvision": torchvision}
    exec(imports, given)
    network, inputs = eval(expression, given).eval(), torch.randn(shape, generator=generator)
    small = ur.compress(network, inputs, params=0.7, method="svd", **QUIET)
    folder = ur.save(small, tmp_path / "small", network=expression, imports=imports)
    assert (folder / "modules.py").exists() == (name != "torchvision")
    readme = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "utilized_rank" not in code
    torch.save(inputs, folder / "inputs.pt")
    run = [sys.executable, "-c", ALONE.format(code=code)]
    told = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    torch.testing.assert_close(torch.load(folder / "outputs.pt"), small(inputs), rtol=1e-5, atol=1e-5)


def exhausted(x: Tensor, y: Tensor) -> Any:
    batches = iter([(x, y)])
    assert len(list(batches)) == 1
    return batches


Given = dict[str, Any]
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Given], str]] = {
    "no goal": (lambda x, y: {"search": (x, y)}, r"^give epsilon=.* or energy=.* \(and not both\)$"),
    "both goals": (lambda x, y: {"search": (x, y), "epsilon": 1, "energy": 0.9}, r"^give epsilon=.*\(and not both\)$"),
    "no energy": (lambda x, y: {"calibration": x, "energy": 0}, "^energy=0 is no fraction: it lies above 0, up to 1$"),
    "energy in percent": (lambda x, y: {"calibration": x, "energy": 99}, "^energy=99 is no fraction"),
    "energy that is no number": (lambda x, y: {"calibration": x, "energy": float("nan")}, "^energy=nan is no fraction"),
    "negative": (lambda x, y: {"search": (x, y), "epsilon": -1}, "^epsilon=-1 is no tolerated loss: it is 0 or more$"),
    "read before": (lambda x, y: {"search": exhausted(x, y), "epsilon": 1}, "^search gave no batch .*read once only"),
    "read already": (lambda x, y: {"calibration": exhausted(x, y), "energy": 0.9}, "^calibration gave no batch"),
    "no inputs": (lambda x, y: {"calibration": x[:0], "energy": 0.9}, "^calibration gave no batch"),
    "one class": (lambda x, y: {"search": (x, 0 * y), "epsilon": 1}, "^all labels of search are 0: .* two classes$"),
    "fewer labels": (lambda x, y: {"search": (x, y[:5]), "epsilon": 1}, "^search gives 60 inputs, and 5 labels$"),
    "no labels": (lambda x, y: {"search": x, "epsilon": 1}, "^search gives no labels: give pairs .*, or score="),
    "real labels": (lambda x, y: {"search": (x, y.float()), "epsilon": 1}, "^search gives no labels"),
    "no search": (lambda x, y: {"calibration": x, "epsilon": 1}, "^a search needs search=, .*, or score="),
    "no calibration": (lambda x, y: {"energy": 0.9}, "^calibration is of NoneType: give a tensor, or"),
    "score of a word": (
        lambda x, y: {"calibration": x, "epsilon": 1, "score": lambda its: "good"},
        "^score gave good: it must give a number, the higher the better$",
    ),
    "score of a tensor": (
        lambda x, y: {"calibration": x, "epsilon": 1, "score": lambda its: its(x)},
        "^score gave .*: it must give a number, the higher the better$",
    ),
    "score without a value": (
        lambda x, y: {"calibration": x, "epsilon": 1, "score": lambda its: float("nan")},
        "^the score of the unaltered network is nan: nothing can be compared with it$",
    ),
    "other inputs": (lambda x, y: {"calibration": x[:, :4], "energy": 0.9}, r"^the network does not take .* \(1, 4\)"),
    "a number": (lambda x, y: {"calibration": 3, "energy": 0.9}, "^calibration is of int: give a tensor"),
    "a dataset": (
        lambda x, y: {"search": TensorDataset(x, y), "epsilon": 1},
        "^search is of TensorDataset: .*DataLoader",
    ),
    "a name": (lambda x, y: {"calibration": "images", "energy": 0.9}, "^calibration gives batches of str: .* tensors$"),
    "an array": (lambda x, y: {"calibration": x.numpy(), "energy": 0.9}, "^calibration gives batches of ndarray"),
    "list for a pair": (lambda x, y: {"search": [x, y], "epsilon": 1}, r"^batches .* together \(a pair is a tuple\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(name, network, images, labels, said):
    given, why = REFUSED[name]
    with pytest.raises(ur.InputError, match=why) as raised:
        ur.measure(network, **given(images, labels))
    assert len(str(raised.value).splitlines()) == 1
    said("library", f"measure: {name}", str(raised.value))


NOTHING: dict[str, tuple[nn.Module, str]] = {
    "no layer": (nn.ReLU(), r"no layer of the network .*: it has none$"),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3), r"no layer of the network .*depthwise convolution"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_network_without_layers_that_count_is_refused(name, generator):
    (layer, why), inputs = NOTHING[name], torch.randn(9, 3, 8, 8, generator=generator)
    network = nn.Sequential(layer)
    with pytest.raises(ur.InputError, match=why):
        ur.measure(network, inputs, energy=ENERGY)
    with pytest.raises(ur.InputError, match=why):
        ur.compress(network, inputs, params=0.5, **QUIET)


IMPOSSIBLE: dict[str, tuple[Given, str]] = {
    "no budget": ({}, "^give one of params=, flops= and latency= .* or epsilon="),
    "two budgets": ({"params": 0.5, "flops": 0.5}, "^give one of params="),
    "a budget and a tolerance": ({"params": 0.5, "epsilon": 1}, "^give one of params="),
    "nothing": ({"params": 0}, "^params=0: the part that may remain lies between 0 and 1$"),
    "all": ({"flops": 1.0}, "^flops=1: the part that may remain lies between 0 and 1$"),
    "in percent": ({"params": 50}, "^params=50: the part that may remain"),
    "below the smallest": ({"params": 0.1}, r"^a budget of 9\.\d% cannot be kept: the smallest network costs \d\d"),
    "negative tolerance": ({"epsilon": -1}, "^epsilon=-1 is no tolerated loss"),
    "a tolerance of nothing": ({"epsilon": 1}, "^a search needs search="),
    "unknown method": ({"params": 0.5, "method": "magic"}, r"^there is no method 'magic' \(compensated, "),
    "unknown losses": ({"params": 0.5, "losses": "none"}, "^there are no losses 'none' .*energy"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_made_smaller_is_refused_in_one_line(name, network, images, said):
    how, why = IMPOSSIBLE[name]
    with pytest.raises(ur.InputError, match=why) as raised:
        ur.compress(network, images, **QUIET | how)
    assert isinstance(raised.value, ValueError)
    assert len(str(raised.value).splitlines()) == 1
    said("library", f"compress: {name}", str(raised.value))


def test_only_what_compress_gives_is_saved(network, tmp_path):
    with pytest.raises(ur.InputError, match=r"^save takes what utilized_rank\.compress gives"):
        ur.save(network, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_what_is_exported_is_there_and_nothing_else_is_named():
    assert all(callable(getattr(ur, name)) for name in ur.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        ur.prune  # noqa: B018


def test_torch_is_imported_when_it_is_first_needed():
    asked = (
        "import sys, utilized_rank as ur; assert 'torch' not in sys.modules; ur.measure; assert 'torch' in sys.modules"
    )
    source = str(Path(ur.__file__).parents[1])
    subprocess.run([sys.executable, "-c", asked], check=True, env={"PYTHONPATH": source, "PATH": ""})
