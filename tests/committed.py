"""The reports that lie in the repository, and the parameters that they were made with."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from utilized_rank.study.config import Study
from utilized_rank.study.homes import compose

ROOT = Path(__file__).parents[1]
COMMITTED = sorted(path.parent.name for path in ROOT.glob("reports/*/summary.json"))
LOCKED = [name for name in COMMITTED if name == "digits" or (ROOT / "reports" / name / "dvc.lock").is_file()]
"""Those made by the pipeline as it is. The others are older: parameters that came since are not in their settings."""

DRAWN_WITH = re.search(r"^matplotlib==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]
AS_DRAWN = pytest.mark.skipif(
    version("matplotlib") != DRAWN_WITH, reason=f"the committed figures were drawn with matplotlib {DRAWN_WITH}"
)
"""For tests that compare figures to the byte."""


def study_of(name: str) -> Study:
    """A study as it was when its report was made."""
    study = compose(name, ROOT)[0]
    if name in LOCKED:
        return study
    return study.model_copy(update={"data": study.data.model_copy(update={"search_from": "train"})})
