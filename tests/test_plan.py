import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from timm.layers import PatchEmbed
from torch import nn
from typer.testing import CliRunner

from utilized_rank import cli
from utilized_rank.base.files import read_json, write_table
from utilized_rank.base.sections import StudyError
from utilized_rank.base.store import Store
from utilized_rank.networks import cost
from utilized_rank.networks.attention import explicit
from utilized_rank.ranks.layers import countable
from utilized_rank.stages import hours
from utilized_rank.stages.plan import BACKWARD, PASSES, network_shape, plan, scale_of, text
from utilized_rank.study.config import Study, parse_study
from utilized_rank.study.homes import compose
from utilized_rank.training.architectures import ResNet
from utilized_rank.training.models import build
from utilized_rank.training.sections import Model

ROOT = Path(__file__).parents[1]
DIGITS = compose("digits", ROOT)[0]
LOCKED = YAML(typ="safe").load((ROOT / "dvc.lock").read_text())["stages"]


@pytest.fixture(scope="module")
def digits() -> pd.DataFrame:
    """The plan of the default study, by stage and run."""
    return plan(DIGITS, ROOT).set_index(["stage", "run"])


def written(stage: str) -> int:
    """Bytes of data that a stage of the default study has left, without its notebook."""
    outs = LOCKED[stage]["outs"]
    return sum(out["size"] for out in outs if out["path"].startswith("data/digits/") and "executed" not in out["path"])


@pytest.mark.parametrize("run", DIGITS.runs)
def test_the_search_of_the_default_study_took_what_was_planned_within_a_factor_of_two(digits, run):
    """Planned are PASSES for each layer and tolerance, beside the calibration images and two looks at the split."""
    found = read_json(Store("digits", ROOT).report("results", f"measure-{run}.json"))
    split = read_json(Store("digits", ROOT).report("results", f"train-{run}.json"))["search_images"]
    planned = digits.passes["measure", run] - DIGITS.measure.calibration_images - 2 * split
    assert planned == PASSES * found["layers_counted"] * len(DIGITS.measure.epsilons) * split
    assert 0.5 < found["passes_of_the_search_split"] * split / planned < 2


def test_the_disk_that_the_default_study_takes_was_planned(digits):
    """Networks and moments nearly to the byte; decomposed networks as if no layer were smaller."""
    sizes = [written(f"{stage}@{run}" if run else stage) for stage, run in digits.index]
    found = pd.Series(sizes, digits.index) / 2**20
    ratio = digits.disk / found
    exact = ratio.drop(["decompose", "finetune", "frontier"], level="stage")
    assert exact.between(0.9, 1.1).all(), exact
    assert ratio["decompose"].between(0.95, 20).all()
    assert ratio["frontier"].between(0.95, 20).all()
    assert ratio["finetune"].between(0.95, 3).all()
    assert 0.5 < found.sum() / digits.disk.sum() < 2


def test_the_memory_that_the_default_study_took_was_planned_within_a_factor_of_two(digits):
    peaks = {}
    for stage, run in digits.index:
        file = Store("digits", ROOT).data("timings", f"{stage}-{run}.json" if run else f"{stage}.json")
        peak = read_json(file).get("peak_memory_mib") if file.is_file() else None
        if peak is not None:
            peaks[stage, run] = peak
    if not peaks:
        pytest.skip("the default study has not been run here since peak memory is noted")
    ratio = pd.Series(peaks) / digits.memory[list(peaks)]
    assert ratio.between(0.5, 2).all(), ratio


VIT = {"architecture": "vit", "dim": 12, "depth": 2, "heads": 2, "patch_size": 8}
RESNET = {"architecture": "resnet20", "width": 0.125}
ONCE = {"epochs": 1, "lr": 1e-3, "batch_size": 60}
TOY = {
    "name": "planned",
    "title": "Planned",
    "threads": 1,
    "data": {"source": "sklearn", "dataset": "digits", "image_size": 16, "search": 70, "test": 50, "limit": 300},
    "pretrained": {
        "simclr": {"method": "simclr", "model": VIT, "epochs": 3, "batch_size": 60},
        "mae": {"method": "mae", "model": VIT, "epochs": 2, "batch_size": 60, "mask_ratio": 0.5},
    },
    "runs": {
        "supervised": {"label": "A", "model": RESNET, "train": ONCE | {"epochs": 4}, "finetune": ONCE},
        "linear": {
            "label": "B",
            "model": VIT,
            "pretrained": "mae",
            "train": ONCE | {"method": "linear"},
            "finetune": ONCE | {"epochs": 2},
        },
        "given": {
            "label": "C",
            "model": VIT,
            "pretrained": "simclr",
            "train": {"method": "as_given"},
            "finetune": ONCE,
        },
    },
    "measure": {"calibration_images": 100, "epsilons": [5.0, 20.0]},
    "decompose": {
        "methods": ["projection", "optimal", "svd"],
        "finetuned": ["optimal", "svd"],
        "sweep_points": 2,
        "sweep_images": 40,
    },
}
TRAIN, SEARCH, TEST = 180, 70, 50


@pytest.fixture(scope="module")
def toy() -> Study:
    return parse_study(TOY)


@pytest.fixture(scope="module")
def planned(toy, tmp_path_factory) -> pd.DataFrame:
    return plan(toy, tmp_path_factory.mktemp("nowhere")).set_index(["stage", "run"])


def executed(notebook: str, **parameters: str) -> Counter:
    """Run a notebook's cells here; how many images went through whole networks, in training and in evaluation."""
    passed: Counter = Counter()

    def count(module: nn.Module, args: tuple) -> None:
        if isinstance(module, ResNet | PatchEmbed) and len(args[0]) > 1:  # one image at a time, FLOPs are counted
            passed["training" if module.training else "evaluation"] += len(args[0])

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    scope: dict = {}
    try:
        cells = nbformat.read(ROOT / "notebooks" / notebook, as_version=4).cells
        for cell in (cell for cell in cells if cell.cell_type == "code"):
            exec(cell.source, scope)
            scope.update(parameters)
    finally:
        handle.remove()
        plt.close("all")
    return passed


@pytest.fixture(scope="module")
def happened(toy, tmp_path_factory) -> dict[tuple[str, str], Counter]:
    """Images that went through the networks of the small study, by stage and run: the notebooks' own code."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "conf").mkdir()
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(toy.model_dump(), file)
    threads, rc = torch.get_num_threads(), plt.rcParams.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # How often a network runs there depends on the clock.
        patch.setattr(cost, "latencies", lambda modules, inputs, seconds=0.2: [1.0] * len(modules))
        passed = {("prepare", ""): executed("1_prepare.ipynb")}
        for encoder in toy.pretrained:
            passed["pretrain", encoder] = executed("2_pretrain.ipynb", encoder=encoder)
        for run in toy.runs:
            for number, stage in ((3, "train"), (4, "measure"), (6, "decompose"), (7, "finetune")):
                passed[stage, run] = executed(f"{number}_{stage}.ipynb", run=run)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    plt.rcParams.update(rc)
    return passed


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "train", "finetune"])
def test_forward_passes_are_planned_exactly_where_they_do_not_depend_on_what_is_found(planned, happened, stage):
    """A training step counts as BACKWARD passes; MAE's encoder sees the patches that are not hidden, here half."""
    for run, row in planned.loc[stage].iterrows():
        share = 0.5 if run == "mae" else 1.0
        found = happened[stage, run]
        assert row.passes == BACKWARD * share * found["training"] + found["evaluation"], run
        if run != "simclr":  # which looks at two views of each image that it reads
            assert row.images == found.total() or stage == "prepare", run


def test_images_read_in_training_are_the_epochs_times_the_images(planned):
    """And the search split after each epoch, and both other splits at the end."""
    after = SEARCH + TEST
    assert planned.images["prepare", ""] == TRAIN + SEARCH + TEST
    assert planned.images["pretrain", "simclr"] == 3 * TRAIN
    assert planned.images["pretrain", "mae"] == 2 * TRAIN
    assert planned.images["train", "supervised"] == 4 * (TRAIN + SEARCH) + after
    assert planned.images["train", "linear"] == TRAIN + SEARCH + after  # features once, not once an epoch
    assert planned.images["train", "given"] == after
    # Variants are the dense network and two methods at two tolerances.
    assert planned.images["finetune", "supervised"] == 5 * (TRAIN + SEARCH) + 6 * TEST
    assert planned.images["finetune", "linear"] == 2 * 5 * (TRAIN + SEARCH) + 6 * TEST


def test_decomposing_looks_at_the_images_that_were_planned(planned, happened):
    """With two numbers of dimensions tried, 1 and min(m, n): of more, some may fall together."""
    for run, row in planned.loc["decompose"].iterrows():
        assert happened["decompose", run] == {"evaluation": row.images}, run
        assert row.passes == row.images


OTHERS = [
    {"architecture": "timm/vit_tiny_patch16_224", "blocks": 2},
    {"architecture": "torchvision/vit_b_16", "blocks": 1},
    {"architecture": "torchvision/resnet18"},
]


@pytest.mark.parametrize("qkv", ["fused", "split"])
@pytest.mark.parametrize("model", [RESNET, VIT, *OTHERS], ids=lambda model: model["architecture"])
def test_the_shape_of_a_network_is_that_of_the_network(model, qkv):
    shape = (3, 32, 32)
    of = network_shape(Model(**model), shape, 7, qkv)
    network = explicit(build(Model(**model), shape, 7), split=qkv == "split").eval()
    layers, flows = countable(network).layers, {}
    for layer in layers:
        layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: flows.update({name: args[0].nbytes}))
    network(torch.zeros(1, *shape))
    assert of.layers == len(layers)
    assert of.parameters == cost.parameters(network)
    assert of.moments == sum(8 * layer.groups * layer.m**2 for layer in layers)
    assert of.largest == max(layer.m**2 for layer in layers)
    assert (of.inputs, of.widest) == (sum(flows.values()), max(flows.values()))


def test_a_run_that_searches_half_of_the_test_images_reports_the_other_half():
    study = compose("cifar10", ROOT)[0]
    halved = plan(study, ROOT).set_index(["stage", "run"]).images
    data = study.data.model_copy(update={"search_from": "train"})
    whole = plan(study.model_copy(update={"data": data}), ROOT).set_index(["stage", "run"]).images
    assert halved["train", "cifar_resnet20"] == 5000 + 5000
    assert whole["train", "cifar_resnet20"] == 5000 + 10_000
    assert halved["train", "cifar_vgg11"] == whole["train", "cifar_vgg11"]


def test_a_plan_needs_no_image_and_leaves_no_file(tmp_path):
    table = plan(compose("cifar10", ROOT)[0], tmp_path)
    assert not list(tmp_path.iterdir())
    assert table[table.stage == "prepare"].images.item() == 60_000
    assert (table.select_dtypes("number") >= 0).all(axis=None)


def test_the_text_ends_in_totals_and_the_largest_memory(digits):
    lines = text(digits.reset_index()).splitlines()
    assert len(lines) == len(digits) + 2
    last = lines[-1].split()
    assert last[0] == "all"
    numbers = [int(number.replace(",", "")) for number in last[1:]]
    by_hand = [digits.images.sum(), digits.passes.sum(), digits.memory.max(), digits.disk.sum()]
    assert numbers == pytest.approx(by_hand, abs=1)


@pytest.mark.parametrize(
    ("words", "title"),
    [(["plan"], "study digits: "), (["plan", "fashion_mnist"], "study fashion_mnist: Fashion-MNIST")],
)
def test_the_command_prints_the_plan_of_the_study_that_is_set_or_named(monkeypatch, words, title):
    monkeypatch.chdir(ROOT / "tests")
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    first, head, *rows = done.stdout.splitlines()
    assert first.startswith(title)
    for column in ("stage", "run", "images read", "forward passes", "peak memory, MiB", "disk, MiB"):
        assert column in head
    study = compose(words[1] if len(words) > 1 else "digits", ROOT)[0]
    assert len(rows) == 2 + len(study.pretrained) + 4 * len(study.runs) + len(study.frontier)
    assert len({len(row) for row in [head, *rows]}) == 1


def test_a_study_that_is_not_there_is_an_error_of_one_line_with_the_nearest(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["utilized-rank", "plan", "fashion_mnits"])
    with pytest.raises(SystemExit) as left:
        cli.entry()
    assert left.value.code == 2
    assert capsys.readouterr().err == "conf/study has no 'fashion_mnits'; did you mean 'fashion_mnist'?\n"


def test_an_image_folder_that_is_not_there_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["utilized-rank", "plan", "folder"])
    with pytest.raises(SystemExit):
        cli.entry()
    assert "data/raw/folder is no image folder: it needs train/" in capsys.readouterr().err


def benchmark(root: Path, name: str, speed: float) -> None:
    rows = [
        {"device": name, "kind": "cuda", "network": network, "work": work, "flops_a_second": flops}
        for network in ("resnet50", "vit")
        for work, flops in (("forward", speed), ("moments", float("nan")))
    ]
    write_table(root / hours.BENCHMARK, pd.DataFrame(rows))


def test_hours_are_passes_at_the_rate_of_the_networks_architecture(tmp_path):
    benchmark(tmp_path, "a card", 1e12)
    table = plan(DIGITS, ROOT)
    rates, known_by = hours.rates(DIGITS, scale_of(DIGITS, ROOT), "cuda", tmp_path)
    assert known_by == "the benchmark of a card"
    timed = hours.with_hours(table, DIGITS, rates).set_index(["stage", "run"])
    for name, run in DIGITS.runs.items():
        network = build(run.model, (1, 32, 32), 10)
        per_image = cost.flops(network, torch.zeros(1, 1, 32, 32))
        row = timed.loc["train", name]
        assert row.hours == pytest.approx(row.passes * per_image / 1e12 / 3600)
    assert timed.hours.loc["prepare", ""] == 0
    assert "hours" in text(timed.reset_index()).splitlines()[0]


def test_passes_are_timed_where_no_benchmark_is_of_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(hours.cost, "latencies", lambda networks, images, seconds: [len(images) / 50])
    rates, known_by = hours.rates(DIGITS, scale_of(DIGITS, ROOT), "cpu", tmp_path)
    assert known_by.startswith("passes that were timed on ")
    assert set(rates.values()) == {50.0}


def test_a_device_that_is_neither_here_nor_was_measured_is_named(tmp_path):
    with pytest.raises(StudyError, match="has no cuda:7"):
        hours.rates(DIGITS, scale_of(DIGITS, ROOT), "cuda:7", tmp_path)


def test_the_command_says_hours_where_a_device_is_named(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hours.cost, "latencies", lambda networks, images, seconds: [len(images) / 50])
    done = CliRunner().invoke(cli.app, ["plan", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    _, head, *rows, last = done.stdout.splitlines()
    assert head.split()[-1] == "hours"
    passes, told = (float(word.replace(",", "")) for word in (rows[-1].split()[2], rows[-1].split()[-1]))
    assert told == pytest.approx(passes / 50 / 3600, abs=0.01)
    assert last.startswith("hours: forward passes at the rate of passes that were timed on ")
