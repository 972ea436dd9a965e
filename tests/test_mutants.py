"""Mistakes in the library: which tests are asked, what they say, and the page of what survives."""

from __future__ import annotations

import sys
from pathlib import Path

import mutants
import pytest
from mutants import Mutant, Suite

LIBRARY = """from __future__ import annotations


def half(number: int) -> int:
    return number // 2


def counted(most: int) -> int:
    found = 0
    while found < most:
        found += 1
    return found


def never() -> None:
    raise ValueError
"""
TESTS = """import pytest
from utilized_rank.ranks.numbers import counted, half


@pytest.fixture(scope="module")
def three():
    return counted(3)


def test_half():
    assert half(4) == 2


def test_counted(three):
    assert three == 3


def test_counted_too(three):
    assert three == 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """One file and its tests; the folder of its sources."""
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    sources, tests = tmp_path / "src", tmp_path / "tests"
    ranks = sources / "utilized_rank" / "ranks"
    ranks.mkdir(parents=True)
    tests.mkdir()
    for package in (ranks, ranks.parent):
        (package / "__init__.py").touch()
    (ranks / "numbers.py").write_text(LIBRARY)
    (tests / "test_numbers.py").write_text(TESTS)
    (tests / "test_strangers.py").write_text("def test_of_another_room():\n    assert False\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\njunit_family = xunit1\n")
    return sources


def mutant(before: str, after: str) -> Mutant:
    line = LIBRARY.splitlines().index(before) + 1
    return Mutant("utilized_rank/ranks/numbers.py", line, before, after, LIBRARY.replace(before, after))


def test_those_that_ran_a_line_are_asked_and_tell_a_mistake_from_none(project, monkeypatch):
    suite = Suite(sys.executable, project)
    suite.trace()
    wrong = mutant("    return number // 2", "    return number // 3")
    alike = mutant("    found = 0", "    found = 0 * 1")
    assert suite.of(wrong) == ["tests/test_numbers.py::test_half"]
    assert suite.of(alike) == ["tests/test_numbers.py"]  # a fixture ran it, for any of them
    assert suite.of(mutant("def half(number: int) -> int:", "def third():")) == ["tests/test_numbers.py"]
    assert [suite.notice(wrong), suite.notice(alike)] == [True, False]
    monkeypatch.setattr(mutants, "PATIENCE", 1)
    assert suite.notice(mutant("        found += 1", "        found += 0"))
    assert (project / wrong.path).read_text() == LIBRARY


def test_tests_that_fail_anyway_tell_nothing(project):
    (project.parent / "tests" / "test_numbers.py").write_text(TESTS.replace("== 2", "== 3"))
    with pytest.raises(SystemExit, match="fail without a mutant"):
        Suite(sys.executable, project).trace()


def test_annotations_are_left_out_and_nothing_else():
    code = "def f(x: int | None = 1) -> int | None:\n    y: int | None = 1 | x\n    return y\n"
    assert mutants.bare(code.replace("int | None", "int & None")) == mutants.bare(code)
    assert mutants.bare(code.replace("1 | x", "1 & x")) != mutants.bare(code)
    assert mutants.bare(code.replace("= 1)", "= 2)")) != mutants.bare(code)


def test_a_change_is_told_by_the_lines_that_differ():
    assert mutants.changed("a = 1\n  b = 2\n", "a = 1\n  b = 3\n") == ("b = 2", "b = 3")
    assert mutants.changed("a\n\n@its\ndef f():", "a\ndef f():") == ("@its", "")


def test_the_page_counts_what_is_killed_and_explains_what_is_not():
    drawn = [Mutant("utilized_rank/ranks/a.py", i, "x = a | b", f"x = {i}", str(i)) for i in (30, 4, 5, 6)]
    explained = {("utilized_rank/ranks/a.py", "x = a | b", "x = 30"): "it is the same"}
    page = mutants.report(drawn, {its.key for its in drawn[2:]}, explained, seed=7, version="8", places=9, code="abc")
    assert "SAMPLE=4 SEED=7" in page
    assert "**2 of 4 are killed (50%)**" in page
    assert "2 survive, of which 1\nare explained; of the others 67%" in page
    assert "| `ranks` | 4 | 2 |\n" in page
    assert page.splitlines()[-2:] == [
        r"| ranks/a.py:4 | `` x = a \| b `` | `` x = 4 `` |  |",
        r"| ranks/a.py:30 | `` x = a \| b `` | `` x = 30 `` | it is the same |",
    ]
