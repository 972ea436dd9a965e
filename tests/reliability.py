"""reports/reliability.md: what is left of what was killed or damaged, and what is said of mistakes.

From what ``pytest --junitxml`` writes of the tests that record it; only those that passed count.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from utilized_rank.base.files import write_text

REPORT = Path(__file__).parents[1] / "reports" / "reliability.md"
ANEW, ENDED = "began anew", "had ended before"
"""How an execution that follows a killed one went on, where it took up nothing."""


PAGE = """# Reliability

What `make test-faults` found. A shrunken study (64 images, two epochs) runs once; then each of its stages is killed at
random moments (seeded), again and again without ever coming to its end, and is left to end at last. Journals are
written at every chance here, and slowly, so that most kills meet work that has begun. After each stage every file of
the study, reports and data, is compared with what the first run had made: **{kills} kills of a running stage, 0 bytes
that differ**, no process left after ten seconds.

{stages}
By way: {ways}. "Went on" took up what had been done; "began anew" was killed before anything was, or is a stage that
keeps no journal; "had ended" was killed too late, and is not counted above.

## Damage

| what happened | what is said of it |
|---|---|
{faults}
After each the study was run again, without a hand, and every file is as before.

## Mistakes

{mistakes} wrong inputs and broken machines. Each ends with a status that is not zero, or an exception of the library,
and leaves nothing half-written.

{messages}"""


def report(xml: Path) -> str:
    """The whole page, in Markdown."""
    running = [its for its in _recorded(xml, "kill") if not its.endswith(ENDED)]
    ways, told = Counter(its.split("|")[1] for its in running), messages(xml)
    faults = [f"| {' | '.join(map(_cell, its.split('|', 1)))} |\n" for its in sorted({*_recorded(xml, "fault")})]
    return PAGE.format(
        kills=ways.total(),
        stages=kills(xml),
        ways=", ".join(f"{way} {count}" for way, count in sorted(ways.items())),
        faults="".join(faults),
        mistakes=len(told.splitlines()) - 2,
        messages=told,
    )


def kills(xml: Path) -> str:
    """A Markdown table: how often each stage was killed, and how it went on."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for stage, _, _, how in (its.split("|") for its in _recorded(xml, "kill")):
        found[stage][how if how in (ANEW, ENDED) else "went on"] += 1
    rows = [
        f"| {stage.replace('@', ' of ')} | {its.total()} | {its['went on']} | {its[ANEW]} | {its[ENDED]} |\n"
        for stage, its in found.items()
    ]
    return "| stage | kills | went on | began anew | had ended |\n|---|---|---|---|---|\n" + "".join(rows)


def messages(xml: Path) -> str:
    """A Markdown table, sorted, of what was wrong and what is said of it."""
    rows = set()
    for its in map(dict, _passed(xml)):
        if "message" in its:
            rows.add(tuple(_cell(its[name]) for name in ("kind", "wrong", "message")))
    lines = ["| kind | what was wrong | what is said |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in sorted(rows))]) + "\n"


def _recorded(xml: Path, name: str) -> list[str]:
    return [value for case in _passed(xml) for held, value in case if held == name]


def _passed(xml: Path) -> Iterator[list[tuple[str, str]]]:
    """What each test that passed recorded."""
    for case in ET.parse(xml).getroot().iter("testcase"):
        if not {part.tag for part in case} & {"failure", "error", "skipped"}:
            yield [(its.get("name", ""), its.get("value", "")) for its in case.iter("property")]


def _cell(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("`", "\\`")):
        text = text.replace(plain, escaped)
    return "<br>".join(" ".join(line.split()) for line in text.strip().splitlines())


if __name__ == "__main__":
    write_text(REPORT, report(Path(sys.argv[1])))
    print(REPORT)
