"""The report of kills, damage and mistakes follows from what the tests recorded, and from those that passed alone."""

from __future__ import annotations

from pathlib import Path

import reliability


def case(inside: str = "", **named: str) -> str:
    properties = "".join(f'<property name="{name}" value="{value}"/>' for name, value in named.items())
    return f"<testcase><properties>{properties}</properties>{inside}</testcase>"


def found(tmp_path: Path, *cases: str) -> Path:
    path = tmp_path / "found.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    return path


SEED = case(kind="parameters", wrong="seed: -1", message="seed is -1: too small&#10;and so on")
IMAGES = case(kind="images", wrong="a|b", message="data/a_b has no image")
FAILED = case("<failure/>", kind="images", wrong="c", message="is never said")


def test_what_is_said_becomes_a_table_without_what_failed(tmp_path):
    xml = found(tmp_path, SEED, IMAGES, IMAGES, FAILED, "<testcase/>")
    assert reliability.messages(xml).splitlines()[2:] == [
        r"| images | a\|b | data/a\_b has no image |",
        "| parameters | seed: -1 | seed is -1: too small<br>and so on |",
    ]


def test_kills_are_counted_by_stage_and_by_how_it_went_on(tmp_path):
    killed = [
        case(kill="train@a|kill dvc|1.0|a run, epoch 1 of 2"),
        case(kill=f"train@a|kill the kernel|2.0|{reliability.ANEW}"),
        case(kill=f"report|kill dvc|3.0|{reliability.ENDED}"),
        case("<failure/>", kill="report|kill dvc|3.0|not so"),
    ]
    xml = found(tmp_path, *killed, SEED, case(fault="a file cut short|it is damaged"))
    assert reliability.kills(xml).splitlines()[2:] == ["| train of a | 2 | 1 | 1 | 0 |", "| report | 1 | 0 | 0 | 1 |"]
    page = reliability.report(xml)
    assert "**2 kills" in page
    assert "kill dvc 1, kill the kernel 1" in page
    assert "| a file cut short | it is damaged |" in page
    assert "1 wrong inputs" in page
