"""What is said of every mistake that the tests make."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path


def messages(xml: Path) -> str:
    """A Markdown table, sorted, of what was wrong and what is said of it.

    Args:
        xml: what ``pytest --junitxml`` wrote; tests that passed count, and of those what they recorded with the
            fixture ``said``.
    """
    rows = set()
    for case in ET.parse(xml).getroot().iter("testcase"):
        its = {found.get("name"): found.get("value", "") for found in case.iter("property")}
        if "message" in its and not {part.tag for part in case} & {"failure", "error", "skipped"}:
            rows.add(tuple(_cell(its[name]) for name in ("kind", "wrong", "message")))
    lines = ["| kind | what was wrong | what is said |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in sorted(rows))]) + "\n"


def _cell(text: str) -> str:
    for plain, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("_", "\\_"), ("`", "\\`")):
        text = text.replace(plain, escaped)
    return "<br>".join(" ".join(line.split()) for line in text.strip().splitlines())
