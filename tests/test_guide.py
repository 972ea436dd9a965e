"""The guide: its worked examples, word for word, the tutorial, and pages that a warning stops."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import nbformat
import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from running import README

from utilized_rank.base.store import Store
from utilized_rank.compression import lowrank
from utilized_rank.compression.decomposition import Decomposition
from utilized_rank.networks.evaluation import Labelled
from utilized_rank.ranks.measure import measure
from utilized_rank.report.figures import style
from utilized_rank.stages.notebooks import STAGES, strip_all
from utilized_rank.study.config import parse_study
from utilized_rank.training import models, sections

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r'^```python exec="on"[^\n]*session="(\w+)"[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.fixture
def example(monkeypatch):
    """Run the blocks of one session of a page in their order, as the build does; what they define."""
    monkeypatch.syspath_prepend(DOCS)
    monkeypatch.syspath_prepend(DOCS / "tools")
    monkeypatch.chdir(ROOT)

    def run(page: str, session: str) -> dict:
        blocks = [code for its, code in BLOCK.findall((DOCS / page).read_text()) if its == session]
        assert blocks
        scope: dict = {"__name__": f"{page} {session}"}
        for block in blocks:
            exec(compile(block, f"{page} ({session})", "exec", dont_inherit=True), scope)
        return scope

    return partial(run, "extend.md")


def test_own_data_is_the_five_line_study_of_the_readme_and_composes(example):
    """Which another test runs from its images to its report (test_folder_study)."""
    scope = example("data")
    assert scope["MINE"] == re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]
    study = scope["study"]
    assert (study.name, study.data.source, study.data.dataset) == ("mine", "folder", "data/raw/mine")
    assert "folder_resnet20" in study.runs


def test_own_network_is_in_a_study_by_its_name_and_goes_through_the_library(example, monkeypatch):
    monkeypatch.setattr(sections, "OWN_ARCHITECTURES", sections.OWN_ARCHITECTURES)
    with patch.dict(models.BUILDERS):
        scope = example("network")
        values = YAML(typ="safe").load((ROOT / "conf/study/folder.yaml").read_text())
        values["runs"]["folder_resnet20"]["model"] = {"architecture": "two_convolutions", "width": 0.5}
        model = parse_study(values).runs["folder_resnet20"].model
        network = models.callable_layers(models.build(model, (3, 32, 32), 4), (3, 32, 32), "fused")
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
        assert models.classifier(network).in_features == 16
        images = torch.randn(8, 3, 32, 32)
        found = measure(network, lambda its: 0.0, images, [1.0])
        assert list(found.layers.layer) == [layer.name for layer in scope["countable"](network).layers]


def test_own_method_goes_through_decomposition_budgets_and_searches(example):
    with patch.dict(lowrank.METHODS):
        scope = example("method")
        network, (images, _), search = scope["trained"](), scope["train"], scope["search"]
        small = scope["small"]  # by the last method of the example
        assert small.utilized_rank["method"] == "optimal"
        own = scope["ur"].compress(network, images, params=0.3, method="scaled", progress=False)
        before, after = own.utilized_rank["parameters"]
        assert after <= 0.3 * before
        assert scope["accuracy"](own, scope["test"]) > 80
        found = measure(network, Labelled(*search), images, [1.0])
        made = Decomposition(network, found.layers, found.moments, images[:2]).build("scaled", 1.0)
        assert made.forms
        assert scope["accuracy"](made.network, scope["test"]) > 50


def test_own_figure_is_the_same_bytes_each_time(example):
    scope = example("figure")
    saved = scope["out"] / "sides.svg"
    first = saved.read_bytes()
    assert first.startswith(b"<?xml")
    again = scope["sides"](scope["pd"].read_csv(ROOT / "reports/digits/results/measure-vgg11.csv"))
    style.save(again, saved)
    assert saved.read_bytes() == first
    assert {text.get_text() for text in again.axes[0].get_legend().get_texts()} == {"ε = 0.5 points", "ε = 1 points"}


def test_a_function_of_a_module_is_a_network_of_the_command_line(example, tmp_path):
    import shown  # of docs/tools, which the fixture puts on the path

    shown.photos(tmp_path / "photos", each=8)
    line = "utilized-rank measure example:of_photos --data photos --image-size 8 --energy 0.99"
    assert "conv3" in shown.run(line, tmp_path)
    with pytest.raises(RuntimeError, match="nowhere"):
        shown.run("utilized-rank measure example:of_photos --data nowhere", tmp_path)


def test_a_failing_example_stops_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    ours = YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text())
    config = {"site_name": "any", "theme": {"name": "mkdocs"}, "markdown_extensions": ["pymdownx.superfences"]}
    YAML().dump(config | {"strict": ours["strict"], "plugins": ["markdown-exec"]}, tmp_path / "mkdocs.yml")
    (called,) = re.findall(r"\$\(BIN\)/(mkdocs .*)", (ROOT / "Makefile").read_text())
    words = [sys.executable, "-m", *called.split()]
    for code, status in (("print(1)", 0), ("assert False", 1)):
        (tmp_path / "docs/index.md").write_text(f'# Page\n\n```python exec="on"\n{code}\n```\n')
        done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
        assert done.returncode == status, done.stderr


def test_every_page_is_in_the_guide_and_what_they_share_asks_no_other_host():
    config = (ROOT / "mkdocs.yml").read_text()
    pages = {path.name for path in DOCS.glob("*.md")}
    assert pages <= set(re.findall(r"\w+\.md", config))
    assert "font: false" in config
    for path in [ROOT / "mkdocs.yml", *DOCS.rglob("*.js"), *DOCS.rglob("*.css"), *DOCS.rglob("*.svg")]:
        assert not re.search(r"(src|href|url|import)\W{1,4}https?://", path.read_text()), path


def test_the_tutorial_runs(tmp_path):
    """nbval, lax: it is committed without outputs."""
    notebook = tmp_path / "your_network.ipynb"
    notebook.write_bytes((ROOT / "notebooks/your_network.ipynb").read_bytes())
    words = ["--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "--rootdir", ".", notebook.name]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    words = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(words, cwd=tmp_path, env=env, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = nbformat.read(notebook, as_version=4).cells
    assert f"{sum(cell.cell_type == 'code' for cell in cells)} passed" in done.stdout


def test_no_stage_sees_the_tutorial(tmp_path):
    store = Store("any", tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    strip_all(store)
    stripped = sorted(path.name for path in store.data("notebooks").glob("*"))
    assert stripped == [f"{i}_{stage}.ipynb" for i, stage in enumerate(STAGES, 1)]


def test_the_picture_is_to_scale(example):
    import shown

    found = shown.measured("vgg11")
    at = len(found) // 2
    svg = shown.pictures(found, at).split("</svg>")[0]
    sizes = re.findall(r'<rect class="(\w+)" x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', svg)
    (whole, corner, first, second) = [(float(width), float(height)) for _, width, height in sizes]
    layer = found.iloc[at]
    assert np.isclose(whole[0] / whole[1], layer.n / layer.m)
    assert np.allclose(np.divide(corner, whole), (layer.k_t / layer.n, layer.k_s / layer.m))
    assert np.allclose(np.divide(first, whole), (layer.r / layer.n, 1))
    assert np.allclose(np.divide(second, whole), (1, layer.r / layer.m))
