"""What holds the project together: one direction of imports, bare notebooks, honest dependencies."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "utilized_rank"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A module imports only from those before it.
ORDER = [
    "config",
    "studies",
    "store",
    "intervals",
    "runtime",
    "provenance",
    "images",
    "data",
    "sources",
    "prepare",
    "attention",
    "models",
    "cost",
    "evaluation",
    "training",
    "selfsupervised",
    "layers",
    "correlations",
    "moments",
    "subspaces",
    "projection",
    "rank_search",
    "suffix",
    "trials",
    "measure",
    "lowrank",
    "allocation",
    "compensation",
    "policies",
    "decompose",
    "frontier",
    "tables",
    "figures.style",
    "figures.images",
    "figures.training",
    "figures.layers",
    "figures.study",
    "figures.frontier",
    "notebooks",
    "report",
    "overview",
    "plan",
    "layout",
    "cli",
]


def module_path(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def imports(source: str, package: list[str]) -> set[str]:
    """The modules of this package that a source imports, in the form of ORDER."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
        elif (node.module or "").split(".")[0] == "utilized_rank":
            base = node.module.split(".")[1:]
        else:
            continue
        base = [part for part in base if part]
        for alias in node.names:
            found |= {".".join([*base, alias.name]), ".".join(base)}
    return {name for name in found if name in ORDER}


def module_imports(name: str) -> set[str]:
    return imports(module_path(name).read_text(), name.split(".")[:-1])


def reachable(names: set[str]) -> set[str]:
    everything, new = set(), set(names)
    while new:
        everything |= new
        new = set().union(*(module_imports(name) for name in new)) - everything
    return everything


def code(path: Path) -> str:
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


def test_every_module_has_its_place_in_the_order():
    files = {".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")}
    assert {f for f in files if not f.endswith("__init__")} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_from_those_before_it(name):
    assert module_imports(name) <= set(ORDER[: ORDER.index(name)])


def test_rank_search_knows_nothing_of_what_it_measures():
    assert module_imports("rank_search") == set()


def test_no_file_that_is_read_can_run_code():
    """A pickle can: torch reads its tensors alone, and nothing else reads one."""
    for source in [*(path.read_text() for path in PACKAGE.rglob("*.py")), *map(code, NOTEBOOKS)]:
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert not re.match(r"(pickle|cPickle|dill|joblib|marshal)\.", name), name
            assert given.get("allow_pickle", "False") == "False", name
            assert not name.endswith("torch.load") or given.get("weights_only") == "True", name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_bare_and_holds_no_logic(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    tree = ast.parse(code(path))
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
    assert len([line for line in code(path).splitlines() if line.strip()]) <= 100


STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_stage_depends_on_every_module_that_its_notebook_uses_and_on_no_other(path):
    stage = STAGES[path.stem.partition("_")[2]]
    deps = stage.get("do", stage)["deps"]
    assert f"data/${{name}}/notebooks/{path.name}" in deps or "data/${name}/notebooks" in deps
    used = {f"src/utilized_rank/{name.replace('.', '/')}.py" for name in reachable(imports(code(path), []))}
    declared = {dep for dep in deps if dep.startswith("src/") and not dep.endswith(".csv")}
    assert declared == used or declared == {"src/utilized_rank"}


@pytest.mark.parametrize("name", STAGES)
def test_the_run_cache_takes_every_stage_but_the_one_that_copies_to_git(name):
    """DVC refuses those with an output that neither it caches nor is a metric or a plot (dvc.stage.Stage.run)."""
    stage = STAGES[name].get("do", STAGES[name])
    plain = [out for out in stage.get("outs", []) if isinstance(out, dict)]
    assert bool(plain) == (name == "publish")
    assert all(list(out.values()) == [{"cache": False}] for out in plain)
    assert not {"persist", "always_changed"} & stage.keys()


@pytest.mark.parametrize("name", STAGES)
def test_no_path_of_a_stage_is_shared_by_two_studies(name):
    stage = STAGES[name].get("do", STAGES[name])
    for kind in ("outs", "plots", "metrics"):
        for out in stage.get(kind, []):
            path = out if isinstance(out, str) else next(iter(out))
            assert path.startswith(("data/${name}/", "reports/${name}/")), path


def test_the_readme_shows_both_commands_early_and_names_only_targets_that_exist():
    readme = (ROOT / "README.md").read_text()
    start = "\n".join(readme.splitlines()[:24])
    assert "make repro" in start
    assert "make test" in start
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", readme)) <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_readme_names_every_study_and_what_it_takes():
    table = (ROOT / "README.md").read_text().split("## The studies")[1].split("```")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "conf" / "study").glob("*.yaml"))
    for row in rows:
        assert re.search(r"[a-z0-9]", row[-1]), f"say how long {row[0].strip()} takes"


def test_the_readme_tells_the_modules_in_their_order():
    told = (ROOT / "README.md").read_text().split("## How the code lies")[1]
    chain = re.findall(r"`(\w+)`", re.search(r"(?:`\w+`\s*→\s*)+`\w+`", told)[0])
    packages = [name.partition(".")[0] for name in ORDER]
    places = [packages.index(name) for name in chain]
    assert len(chain) > 20
    assert places == sorted(places)


def test_no_page_in_reports_asks_another_host():
    for page in (ROOT / "reports").rglob("*.html"):
        assert not re.search(
            r"""(src|href)\s*=\s*["'](https?:)?//|<script|@import|url\(\s*["']?http""", page.read_text()
        ), page
