"""A study's parameters: checked whole, and frozen.

A mistyped key or a value out of range stops the first stage that runs, before it has done any work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..base.sections import Name, Positive, Section, StudyError, suggestion
from ..datasets.sections import Data
from ..networks.precision import Precision
from ..training.sections import Model, Pretrained
from .sections import FROM_SCRATCH, Comparison, Decompose, Frontier, Measure, Repeats, Run

TAKEN = ("raw", "benchmarks")
"""Folders of ``data/`` and ``reports/`` that are no study's."""


class Study(Section):
    """All parameters of a study."""

    root: str = Field(".", exclude=True)
    """The project's root, from the study's home: the folder of its parameters and its lock."""
    params: str = Field("params.yaml", exclude=True)
    """The file of its parameters, from the root. DVC needs both; neither is a parameter, nor listed as one."""
    name: Name
    title: str
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Positive = 2
    """Threads for torch; fixed, because sums over other counts differ in the last digit."""
    precision: Precision = "float32"
    """Of the arithmetic while training; reported accuracies are float32."""
    data: Data
    pretrained: dict[Name, Pretrained] = {}
    runs: Annotated[dict[Name, Run], Field(min_length=1)]
    measure: Measure
    decompose: Decompose
    frontier: dict[Name, Frontier] = {}
    """Of some of the runs, by their names."""
    comparisons: dict[Name, Comparison] = {}
    repeats: dict[Name, Repeats] = {}
    notes: list[str] = []
    """What was cut, and other choices of this study: the report lists them."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Study:
        mistakes = [*self._mistakes()]
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def home(self) -> Path:
        """The folder of its parameters and its lock, from the project's root."""
        return Path(self.params).parent

    def search_from(self, run: str) -> Literal["train", "test"]:
        """Which images the search split of ``run`` is of."""
        made = self.pretrained.get(self.runs[run].pretrained)
        return self.data.search_from if made is not None and made.given else "train"

    def _mistakes(self) -> Iterator[str]:
        if self.name in TAKEN:
            yield f"name: {self.name} is taken, since data/ or reports/ has a folder of that name: choose another"
        for name, frontier in self.frontier.items():
            if name not in self.runs:
                yield _undefined("frontier", name, self.runs)
            for policy in frontier.ranks:
                if policy.search == "independent" and policy.epsilon not in self.measure.epsilons:
                    yield f"frontier.{name}.ranks has {policy.name}, a tolerance that measure.epsilons does not name"
        if FROM_SCRATCH in self.pretrained:
            yield f"pretrained.{FROM_SCRATCH} is taken: it means random weights"
        for name, made in self.pretrained.items():
            yield from _misfit(f"pretrained.{name}.model", made.model, self.data.image_size)
        for name, run in self.runs.items():
            where = f"runs.{name}.pretrained"
            yield from _misfit(f"runs.{name}.model", run.model, self.data.image_size)
            if run.pretrained in self.pretrained:
                if self.pretrained[run.pretrained].model != run.model:
                    yield f"{where}: {run.pretrained} was made with another model"
            elif run.pretrained != FROM_SCRATCH:
                yield _undefined(where, run.pretrained, self.pretrained)
            elif run.train.method != "supervised":
                yield f"{where} is none, so train.method must be supervised"
        labels = [run.label for run in self.runs.values()]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            yield f"runs: {labels.count(label)} of them have the label {label!r}, and tables could not tell them apart"
        for name, comparison in self.comparisons.items():
            kinds = comparison.runs()
            unknown = {kind: run for kind, run in kinds.items() if run not in self.runs}
            for kind, run_name in unknown.items():
                yield _undefined(f"comparisons.{name}.{kind}", run_name, self.runs)
            if not unknown and len({self.runs[run].model.layout for run in kinds.values()}) > 1:
                yield f"comparisons.{name}: its runs do not share one model"
            elif not unknown and len({self.search_from(run) for run in kinds.values()}) > 1:
                yield (
                    f"comparisons.{name}: data.search_from is test, so some of its runs are reported on half of the "
                    "test images and others on all of them: compare runs that were all given, or none"
                )
        for name, repeats in self.repeats.items():
            missing = [run for run in repeats.runs if run not in self.runs]
            yield from (_undefined(f"repeats.{name}.runs", run, self.runs) for run in missing)
            if not missing and len({_but_label(self.runs[run]) for run in repeats.runs}) > 1:
                yield f"repeats.{name}: its runs differ in more than their labels"


def _but_label(run: Run) -> Run:
    return run.model_copy(update={"label": ""})


def _misfit(where: str, model: Model, side: int) -> Iterator[str]:
    if model.architecture == "vgg11" and side < 32:
        yield f"{where}: vgg11 halves the image five times, so data.image_size must be at least 32, not {side}"
    if model.architecture == "vit" and side % model.patch_size:
        yield f"{where}: patch_size {model.patch_size} does not divide data.image_size {side}"


def _undefined(where: str, name: str, known: dict[str, Any]) -> str:
    return f"{where}: there is no {name!r}{suggestion(name, known)}"


def parse_study(values: Any, where: str = "params.yaml") -> Study:
    """Check ``values``, the content of a ``params.yaml``.

    Args:
        values: what is checked.
        where: they come from, for messages.

    Raises:
        StudyError: an unknown key, or a value out of range; the message has one line for each mistake.
    """
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        mistakes = "\n".join(_explain(item) for item in error.errors()).splitlines()
        lines = [f"{where}: {mistake}" for mistake in mistakes]
        raise StudyError("\n".join(lines)) from error


def _explain(item: Any) -> str:
    """One line for one of pydantic's errors."""
    location = [part for part in item["loc"] if part != "[key]"]
    where = ".".join(str(part) for part in location) or "the study"
    if item["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        return f"unknown key {where}{suggestion(str(location[-1]), list(section.model_fields))}"
    if item["type"] == "value_error":
        return f"{where}: {item['ctx']['error']}" if location else str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{where} is missing"
    return f"{where} is {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _section_at(location: list[str | int]) -> type[Section]:
    """The section of the parameters that ``location`` points into."""
    section: type[Section] = Study
    parts = iter(location)
    for part in parts:
        annotation = section.model_fields[str(part)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
        section = found[0] if found else section
        if getattr(annotation, "__origin__", None) in (dict, list):
            next(parts, None)  # a user's own name, as in runs.NAME, or a place
    return section
