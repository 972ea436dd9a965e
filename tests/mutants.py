"""reports/mutants.md: how many small mistakes in the library its tests notice.

cosmic-ray makes them: another operator or number, a condition turned around, a loop that is never entered. Places are
drawn (seeded), and of each one mistake. It is written into a copy of the sources, and the tests that ran its line run
again, the quickest files first, until one fails. What was killed is remembered while its file stays as it is.

This needs cosmic-ray alone; the tests run in the project's own Python: ``mutants.py PYTHON SAMPLE SEED``.
"""

from __future__ import annotations

import ast
import csv
import difflib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORT, EXPLAINED = ROOT / "reports" / "mutants.md", ROOT / "tests" / "mutants.csv"
HELD = ROOT / "data" / "mutants"
PACKAGES = [f"utilized_rank/{name}" for name in ("networks", "ranks", "compression")]
QUICK = "not slow and not large and not networks and not gpu and not faults"
ENOUGH = 100
"""Seconds of tests that a mutant is given, the quickest files first."""
PATIENCE = 40
"""Seconds that a test may take: twice what the slowest does."""
MEMORY = 8 * 2**30
"""Bytes that a run may take: a mutant asks for any amount."""

PAGE = """# Mutants

What `make mutants SAMPLE={sample} SEED={seed}` found: cosmic-ray {version} can change the library (`networks`, `ranks`,
`compression`) at {places} places; {sample} were drawn, and one mistake made at each.
**{killed} of {sample} are killed ({share:.0%})**: a test fails, or does not end. {left} survive, of which {explained}
are explained; of the others {rest:.0%} are killed. Annotations, which nothing evaluates, do not count. The hash of the
three packages is `{code}`.

| package | mutants | killed |
|---|---|---|
{packages}
## What survives

| where | as it is | as it was changed | why no test fails |
|---|---|---|---|
{survivors}"""


@dataclass(frozen=True)
class Mutant:
    """One file with one mistake."""

    path: str
    """From the folder of the sources."""
    line: int
    before: str
    """What was changed, by lines."""
    after: str
    code: str
    """The whole file."""

    @property
    def key(self) -> str:
        """Tells mutants of all revisions apart."""
        return hashlib.sha256(f"{self.path}\n{self.code}".encode()).hexdigest()


def bare(code: str) -> str:
    """The syntax without annotations, which are never evaluated here."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        for name in {"annotation", "returns"} & {*node._fields}:
            setattr(node, name, None)
    return ast.dump(tree)


def drawn(sources: Path, seed: int) -> Iterator[Mutant]:
    """Mutants in a random order, one a place."""
    from cosmic_ray.mutating import mutate_code

    draw = random.Random(seed)
    ways = places(sources)
    for path, place in draw.sample([*ways], len(ways)):
        operator, occurrence = draw.choice(ways[path, place])
        code = (sources / path).read_text()
        mutated = mutate_code(code, operator, occurrence)
        try:
            differs = bare(mutated) != bare(code)
        except SyntaxError:  # the slash in a signature is no operator
            continue
        if differs:
            yield Mutant(path, place[0], *changed(code, mutated), mutated)


def places(sources: Path) -> dict[tuple[str, tuple[int, int]], list[tuple[Any, int]]]:
    """Where files can be changed (line, column), and how: an operator of cosmic-ray, and which of its occurrences."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    operators = [get_operator(name) for name in operator_names()]
    simple = [operator() for operator in operators if not operator.arguments()]
    found = defaultdict(list)
    for file in sorted(its for package in PACKAGES for its in (sources / package).glob("*.py")):
        nodes = [*ast_nodes(get_ast(file.read_text()))]
        for operator in simple:
            at = [start for node in nodes for start, _ in operator.mutation_positions(node)]
            for occurrence, start in enumerate(at):
                found[file.relative_to(sources).as_posix(), start].append((operator, occurrence))
    return found


def changed(before: str, after: str) -> tuple[str, str]:
    """The lines that differ, as they were and as they are."""
    lines = [*difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)][3:]
    return tuple("\n".join(its[1:].strip() for its in lines if its[0] == sign and its[1:].strip()) for sign in "-+")


class Suite:
    """The tests of the library, and which of them ran which line of it.

    Args:
        python: that has the project's dependencies.
        sources: a copy of them, which is what is tested.
    """

    def __init__(self, python: str, sources: Path) -> None:
        self._python, self._sources = python, sources
        self._seconds: Counter[str] = Counter()
        self._lines: dict[str, dict[str, list[str]]] = {}

    def trace(self) -> None:
        """Run all that import one of the packages, without a mutant."""
        names = [name.replace("/", ".") for name in PACKAGES]
        files = [its for its in (ROOT / "tests").glob("test_*.py") if any(name in its.read_text() for name in names)]
        told, data = self._sources / "tests.xml", self._sources / "coverage"
        cov = ["--cov=utilized_rank", "--cov-config=/dev/null", "--cov-context=test", "--cov-report="]
        if not self.run([*sorted(map(str, files)), *cov, f"--junitxml={told}"], COVERAGE_FILE=str(data)):
            raise SystemExit("the tests fail without a mutant")
        for case in ET.parse(told).getroot().iter("testcase"):
            self._seconds[f"{case.get('file')}::{case.get('name')}"] = float(case.get("time", 0))
        lines = self._sources / "lines.json"
        how = ["json", "--quiet", "--rcfile=/dev/null", "--show-contexts", "--data-file", str(data), "-o", str(lines)]
        subprocess.run([self._python, "-m", "coverage", *how], cwd=ROOT, check=True)
        root = self._sources.relative_to(ROOT)
        files = json.loads(lines.read_text())["files"]
        self._lines = {Path(name).relative_to(root).as_posix(): its["contexts"] for name, its in files.items()}

    def of(self, mutant: Mutant) -> list[str]:
        """Those that ran its line, the quickest files, as far as there is time.

        All tests of a file where a fixture ran it, or an import.
        """
        lines = self._lines[mutant.path]
        # Of a statement of several lines not every one is recorded.
        seen = lines[max((its for its in lines if int(its) <= mutant.line), key=int)]
        if "" in seen:
            seen = [f"{its}|import" for of_line in lines.values() for its in of_line if its]
        by_file: dict[str, set[str]] = defaultdict(set)
        for name, phase in (its.rsplit("|", 1) for its in seen):
            by_file[_file(name)].add(name if phase == "run" else _file(name))
        asked = [[file] if file in names else sorted(names) for file, names in by_file.items()]
        asked.sort(key=lambda names: (self.seconds(names), names))
        spent = [*accumulate(map(self.seconds, asked))]
        return [name for names, its in zip(asked, spent, strict=True) if its <= max(ENOUGH, spent[0]) for name in names]

    def seconds(self, chosen: list[str]) -> float:
        """What they take without a mutant."""
        return sum(its for name, its in self._seconds.items() if {name, _file(name)} & {*chosen})

    def run(self, arguments: list[str], timeout: float | None = None, **environment: str) -> bool:
        """Whether pytest ends in time, and no test fails."""
        # Bytecode is told from old by the size and the second of its source, which a mutant may share.
        own = {"PYTHONPATH": str(self._sources), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        limit = ["-o", f"faulthandler_timeout={PATIENCE}", "-o", "faulthandler_exit_on_timeout=true"]
        process = subprocess.Popen(
            [self._python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", QUICK, *limit, *arguments],
            cwd=ROOT,
            env=os.environ | own | environment,
            stdout=(self._sources / "told.txt").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
        )
        try:
            return process.wait(timeout) == 0
        except subprocess.TimeoutExpired:  # one test has its limit, but not what is imported
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def notice(self, mutant: Mutant) -> bool:
        """Whether one of them fails."""
        chosen, file = self.of(mutant), self._sources / mutant.path
        before = file.read_text()
        try:
            file.write_text(mutant.code)
            return not self.run(chosen, 2 * (PATIENCE + self.seconds(chosen)))
        finally:
            file.write_text(before)


def _file(test: str) -> str:
    return test.split("::")[0]


def report(drawn: list[Mutant], killed: set[str], explained: dict[tuple[str, ...], str], **about: object) -> str:
    """The whole page, in Markdown."""
    left = [mutant for mutant in drawn if mutant.key not in killed]
    whys = [explained.get((mutant.path, mutant.before, mutant.after), "") for mutant in left]
    reasons = sum(map(bool, whys))
    packages = []
    for package in PACKAGES:
        its = [mutant.key in killed for mutant in drawn if mutant.path.startswith(package)]
        packages.append(f"| `{Path(package).name}` | {len(its)} | {sum(its)} |\n")
    rows = []
    for its, why in sorted(zip(left, whys, strict=True), key=lambda pair: (pair[0].path, pair[0].line)):
        where = f"{its.path.removeprefix('utilized_rank/')}:{its.line}"
        rows.append(f"| {where} | {_code(its.before)} | {_code(its.after)} | {why} |\n")
    sample = len(drawn)
    return PAGE.format(
        sample=sample,
        killed=sample - len(left),
        share=1 - len(left) / sample,
        left=len(left),
        explained=reasons,
        rest=(sample - len(left)) / (sample - reasons),
        packages="".join(packages),
        survivors="".join(rows),
        **about,
    )


def _code(text: str) -> str:
    return "<br>".join(f"`` {line} ``".replace("|", "\\|") for line in text.splitlines()) or "(nothing)"


def explanations() -> dict[tuple[str, ...], str]:
    """Why mutants survive, by file, the lines before and the lines after."""
    with EXPLAINED.open(newline="") as file:
        return {(its["file"], its["before"], its["after"]): its["why"] for its in csv.DictReader(file)}


def main(python: str, sample: int, seed: int) -> None:
    """Draw, run, and write the page."""
    from importlib.metadata import version

    sources, known = HELD / "src", HELD / "killed.json"
    shutil.rmtree(sources, ignore_errors=True)
    shutil.copytree(ROOT / "src", sources, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    killed = set(json.loads(known.read_text())) if known.is_file() else set()
    suite = Suite(python, sources)
    suite.trace()
    some = list(islice(drawn(sources, seed), sample))
    for i, mutant in enumerate(some):
        if mutant.key not in killed and suite.notice(mutant):
            killed.add(mutant.key)
            known.write_text(json.dumps(sorted(killed)))
        how = "killed" if mutant.key in killed else "survives"
        print(f"{i + 1} {how}: {mutant.path}:{mutant.line}\n- {mutant.before}\n+ {mutant.after}", flush=True)
    files = sorted(its for package in PACKAGES for its in (sources / package).glob("*.py"))
    about = {
        "seed": seed,
        "version": version("cosmic-ray"),
        "places": len(places(sources)),
        "code": hashlib.sha256(b"".join(its.read_bytes() for its in files)).hexdigest()[:12],
    }
    REPORT.write_text(report(some, killed, explanations(), **about))
    print(REPORT)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
