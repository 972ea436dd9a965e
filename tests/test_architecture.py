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
TUTORIAL = ROOT / "notebooks" / "your_network.ipynb"

# The rooms: each uses those before it. The library comes first, so that it knows nothing of a study.
LIBRARY = ["networks", "ranks", "compression"]
ROOMS = [*LIBRARY, "api", "base", "datasets", "training", "study", "stages", "report", "commands", "cli"]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}


def imports(source: str, module: str = "") -> set[str]:
    """The modules of this package that a source imports; ``module`` is its own name, if it is one of them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("utilized_rank")):
            above = module.split(".")[: -node.level] if node.level else []
            base = [*above, *(node.module or "").removeprefix("utilized_rank").strip(".").split(".")]
            named = ".".join(part for part in base if part)
            found |= {named, *(f"{named}.{alias.name}".strip(".") for alias in node.names)}
    return found & MODULES.keys()


USED = {name: imports(path.read_text(), name) for name, path in MODULES.items()}


def reachable(names: set[str]) -> set[str]:
    everything, new = set(), set(names)
    while new:
        everything |= new
        new = set().union(*(USED[name] for name in new)) - everything
    return everything


def code(path: Path) -> str:
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


def test_every_module_lies_in_a_room_and_imports_only_from_its_own_and_those_before_it():
    for name, used in USED.items():
        room = name.partition(".")[0]
        assert {other.partition(".")[0] for other in used} <= set(ROOMS[: ROOMS.index(room) + 1]), name


def test_no_module_uses_itself_by_way_of_others():
    for name, used in USED.items():
        assert name not in reachable(used), name


def test_every_room_says_what_is_in_it_and_what_it_uses():
    for room in ROOMS[:-1]:
        said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert "Uses" in said
        told = {other for other in ROOMS if f"`{other}`" in said}
        told |= set(LIBRARY) if "the library," in said else set()
        used = {other.partition(".")[0] for name in USED if name.startswith(f"{room}.") for other in USED[name]} - {
            room
        }
        assert told == used, room


def test_rank_search_knows_nothing_of_what_it_measures():
    assert USED["ranks.rank_search"] == set()


def test_no_file_that_is_read_can_run_code():
    """A pickle can: torch reads its tensors alone, and nothing else reads one."""
    for source in [*(path.read_text() for path in PACKAGE.rglob("*.py")), *map(code, NOTEBOOKS)]:
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert not re.match(r"(pickle|cPickle|dill|joblib|marshal)\.", name), name
            assert not re.search(r"read_pickle$|(hub|jit)\.load$", name), name
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


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path != TUTORIAL], ids=lambda p: p.stem)
def test_a_stage_depends_on_every_module_that_its_notebook_uses_and_on_no_other(path):
    stage = STAGES[path.stem.partition("_")[2]]
    deps = stage.get("do", stage)["deps"]
    assert f"data/${{name}}/notebooks/{path.name}" in deps or "data/${name}/notebooks" in deps
    used = {MODULES[name].relative_to(ROOT) for name in reachable(imports(code(path)))}
    declared = [Path(dep) for dep in deps if dep.startswith("src/") and not dep.endswith(".csv")]
    covered = {dep: {module for module in used if module.is_relative_to(dep)} for dep in declared}
    assert set().union(*covered.values()) == used
    assert all(covered.values()), "it depends on what it does not use"


def test_the_tutorial_is_no_stage_and_none_depends_on_it():
    assert TUTORIAL in NOTEBOOKS
    assert TUTORIAL.relative_to(ROOT).as_posix() in (ROOT / ".dvcignore").read_text().splitlines()
    assert TUTORIAL.name not in (ROOT / "dvc.yaml").read_text()


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


def test_the_readme_names_every_room_in_its_order():
    told = (ROOT / "README.md").read_text().split("## How the code lies")[1]
    assert re.findall(r"^\| `(\w+)` \|", told, re.MULTILINE) == ROOMS[:-1]


def test_no_page_in_reports_asks_another_host():
    for page in (ROOT / "reports").rglob("*.html"):
        assert not re.search(
            r"""(src|href)\s*=\s*["'](https?:)?//|<script[^>]*\ssrc|@import|url\(\s*["']?http""", page.read_text()
        ), page
