"""A part of a study's parameters: immutable, checked, and errors that say what to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]


def _fraction_or_number(amount: float) -> float:
    if amount >= 1 and amount != int(amount):
        raise ValueError(f"{amount:g} is neither a fraction, below 1, nor a whole number")
    return amount


Amount = Annotated[float, Field(gt=0), AfterValidator(_fraction_or_number)]
"""A number of images, or below 1 a part of them."""


Percent = Annotated[float, Field(ge=0, le=100)]


Share = Annotated[float, Field(gt=0, lt=1)]


# A run's name becomes a DVC stage name and a file name; DVC cannot resolve a dot in it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class StudyError(Exception):
    """A mistake that the user can mend: its message says what, where and how."""


class Section(BaseModel):
    """A part of the parameters: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


def suggestion(word: str, known: Iterable[str]) -> str:
    """The nearest of the ``known`` words, as the end of a message; all of them where none is near."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)
    return f"; did you mean {lower[close[0]]!r}?" if close else f" (known: {', '.join(sorted(known))})"
