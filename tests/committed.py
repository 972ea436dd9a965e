"""The reports that lie in the repository, and the parameters that they were made with."""

from pathlib import Path

from utilized_rank.study.config import Study
from utilized_rank.study.homes import compose

ROOT = Path(__file__).parents[1]
COMMITTED = sorted(path.parent.name for path in ROOT.glob("reports/*/summary.json"))
LOCKED = [name for name in COMMITTED if name == "digits" or (ROOT / "reports" / name / "dvc.lock").is_file()]
"""Those made by the pipeline as it is. The others are older: parameters that came since are not in their settings."""


def study_of(name: str) -> Study:
    """A study as it was when its report was made."""
    study = compose(name, ROOT)[0]
    if name in LOCKED:
        return study
    return study.model_copy(update={"data": study.data.model_copy(update={"search_from": "train"})})
