"""Whether a run anew gives what is committed: number by number, each kind of number within a tolerance of its own.

On the machine that made them results come out the same to the byte. Elsewhere sums differ in the last digit, and
training makes another network of that: as far from the first as one of another seed. Tolerances were set above what was
measured: VGG11 of ``digits`` with AVX2 in place of AVX-512, and the three seeds of ``fashion_mnist``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..base.files import AGAIN, Damaged
from ..base.sections import StudyError
from ..base.store import Store
from ..study.config import Study
from ..study.provenance import provenance

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
VALUE = re.compile(rf"{NUMBER.pattern}(?: \[{NUMBER.pattern}, {NUMBER.pattern}\])?")
SIGMAS = 3
"""Of the difference of two accuracies: of a few hundred numbers, none or one is beyond by chance."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Value:
    """A number or a word of a result."""

    file: str
    """From the study's folder in ``reports/``."""
    place: str
    name: str
    """Of the column, or the key in a record."""
    row: Row
    """What stands beside it."""
    content: Any


@dataclass(frozen=True)
class Quantity:
    """A kind of number, and how far from it another machine may come."""

    name: str
    of: str
    """A pattern of ``file:name``."""
    allowed: Callable[[Value, float, int], float]
    """From a value, the number in it, and how many images the smallest split has."""
    tolerance: str
    reason: str


def _binomial(accuracy: float, images: int) -> float:
    """Points that two accuracies on so many images may differ by; two images more of each kind, for those near 100%."""
    p = (accuracy / 100 * images + 2) / (images + 4)
    return 100 * SIGMAS * math.sqrt(2 * p * (1 - p) / images)


def _lost(row: Row) -> float:
    """Points that the network of a row lost."""
    found = [NUMBER.match(str(cell)) for name, cell in row.items() if name.startswith("change")]
    return max((abs(float(number[0])) for number in found if number), default=0.0)


def _accuracy(value: Value, number: float, images: int) -> float:
    return _binomial(number, images) + _lost(value.row) / 2


def _on_the_way(value: Value, number: float, images: int) -> float:
    return _binomial(number, images) + (100 - number) / 2


def _change(value: Value, number: float, images: int) -> float:
    lost = _lost(value.row)
    known = next((float(cell) for name, cell in value.row.items() if name.startswith("accuracy")), 100 - lost)
    return _binomial(known, images) + lost / 2


def _width(value: Value, number: float, images: int) -> float:
    return min(float(value.row["m"]), float(value.row["n"])) / 4


def _size(value: Value, number: float, images: int) -> float:
    made = value.row.get("method", value.row.get("weights", "low-rank" if "change" in value.row else "dense"))
    return 0.0 if made == "dense" else abs(number) / 4


def _part(share: float) -> Callable[[Value, float, int], float]:
    return lambda value, number, images: share * abs(number)


def _fixed(share: float) -> Callable[[Value, float, int], float]:
    """Of a utilization; in tables it is in percent."""
    return lambda value, number, images: share * (100 if "%" in value.name else 1)


def _points(value: Value, number: float, images: int) -> float:
    return 5.0


def _any(value: Value, number: float, images: int) -> float:
    return math.inf


def _none(value: Value, number: float, images: int) -> float:
    return 0.0


FROM_SEEDS = "another network is found, as with another seed"
QUANTITIES = (
    Quantity(
        "what the search looked at, and choices among equals",
        r".*:(evaluations|passes_of_.*)|.*\.ranks\.csv:(form|rank|weights)|results/frontier.*:lr|.*:learning rate",
        _any,
        "none",
        "many ways lead to like networks: what these cost and keep is held to a tolerance instead",
    ),
    Quantity(
        "k_S, k_T",
        r".*:k_[st](_alone)?",
        _any,
        "none",
        "only the smaller of the two counts, which is r; over the larger one image decides, by dozens of dimensions",
    ),
    Quantity(
        "ranks r", r".*:r(_low|_high)?", _width, "min(m, n) / 4", f"{FROM_SEEDS}: 0.17 min(m, n) at most, measured"
    ),
    Quantity("utilization of a layer", r".*:utilization", _fixed(0.25), "0.25", "as the ranks"),
    Quantity("MLU", r".*:(mlu|MLU.*)", _fixed(0.05), "0.05", "a mean over layers: 0.032 at most, measured"),
    Quantity("MLU of a third", r".*:(first|middle|last).*", _fixed(0.1), "0.1", "a mean over a third of them"),
    Quantity(
        "accuracies while training",
        r"results/train-.*\.csv:search_accuracy",
        _on_the_way,
        "3 sigma, and half of what lacks",
        "binomial, and steep at first: 4.1 of 12 points, measured",
    ),
    Quantity(
        "accuracies",
        r".*:((test_|search_)?accuracy|(test )?accuracy %|search split %|(before|after), %)",
        _accuracy,
        "3 sigma, and half of what was lost",
        "binomial, of two networks on these images; what all ranks at once lose differs by 7 of 19 points, measured",
    ),
    Quantity("means over seeds", r"tables/repeats.*:(mean|standard deviation)", _points, "5 points", "as of MLU"),
    Quantity("changes of accuracy", r".*:(.*change.*|standard deviation)", _change, "as accuracies", "as accuracies"),
    Quantity(
        "sizes",
        r".*:(parameters|flops|MFLOPs|(parameters|flops|FLOPs)[_ ]kept( %)?)",
        _size,
        "a quarter; of dense networks none",
        "they follow from the ranks: 0.17 at most, measured",
    ),
    Quantity("RankMe", r".*:(rankme|RankMe)", _part(0.2), "a fifth", f"{FROM_SEEDS}: 0.02, measured of VGG11 alone"),
    Quantity("losses", r".*:loss", _part(0.25), "a quarter", f"{FROM_SEEDS}: 0.09 at most, measured"),
    Quantity("names and counts", r".*", _none, "none at all", "they follow from the parameters"),
)
"""The first that takes a number is its kind. Timings are no results, and not compared."""


@dataclass(frozen=True)
class Verified:
    """What a comparison found."""

    of: str
    """The revision."""
    stages: list[str]
    """That ran here since their results were committed."""
    values: int
    """How many are committed of the study."""
    table: pd.DataFrame
    """One row a quantity: values, identical, within, beyond, largest (difference), tolerance, why."""
    beyond: list[str]
    other: list[str]
    """What is not as it was when the committed results were made."""

    def __str__(self) -> str:
        compared = int(self.table["values"].sum())
        lines = [f"{compared:,} of {self.values:,} values of {self.of} were made anew, by {', '.join(self.stages)}:"]
        differ = self.table[self.table["values"] > self.table.identical]
        if differ.empty:
            return f"{lines[0]} identical"
        lines += [self.table.drop(columns="why").to_string(index=False), *self.beyond]
        lines += [f"{row.quantity}: {row.why}" for row in differ.itertuples()]
        if self.other:
            return "\n".join([*lines, f"a difference is expected, as these differ: {'; '.join(self.other)}"])
        return "\n".join([*lines, "no difference is expected: code, parameters, data and machine are the same"])


def verify(study: Study, store: Store, against: str = "HEAD") -> Verified:
    """Compare the results of the stages that ran here since theirs were committed with those of a revision of git.

    Args:
        study: its parameters.
        store: its folders.
        against: the revision.

    Raises:
        StudyError: there is no git, no such revision, no results of the study in it, or none that was made anew.
    """
    home = store.report().relative_to(store.root).as_posix()
    named = (f"{home}/summary.json", f"{home}/results", f"{home}/tables")
    listed = _git(store.root, against, "ls-tree", "-r", "--name-only", against, "--", *named).splitlines()
    if not listed:
        raise StudyError(f"{against} has no results of {study.name} to compare with")
    # Table 5 names parameters and machine, as the provenance does.
    before = {path: _git(store.root, against, "show", f"{against}:./{path}") for path in listed if "table5" not in path}
    made = [path for path in before if _made_anew(store, path, against)]
    if not made:
        raise StudyError(f"no stage of {study.name} ran here since its results were committed: `make verify` runs some")
    record = json.loads(_git(store.root, against, "show", f"{against}:./{home}/provenance.json"))
    data = [store.data("prepare", "dataset.safetensors"), store.data("prepare", "splits.json")]
    other = [*_differences(record, provenance(study, data, store.root))]
    images = _fewest_images(before)
    committed = {path: _values(path.removeprefix(f"{home}/"), text) for path, text in before.items()}
    rows, beyond = [], []
    for path in made:
        name, was = path.removeprefix(f"{home}/"), committed[path]
        now = _values(name, (store.root / path).read_text(errors="replace"))
        for place in was | now:
            row = _compared(was.get(place), now.get(place), images if other else None)
            rows.append(row)
            if row["difference"] > row["allowed"]:
                tolerance = f"tolerance {row['allowed']:.4g}"
                beyond.append(f"beyond: {name}, {place}: {row['now']}, and was {row['was']} ({tolerance})")
    return Verified(
        of=f"{study.name} in {against}",
        stages=sorted({_stage(path) for path in made}),
        values=sum(map(len, committed.values())),
        table=_by_quantity(pd.DataFrame(rows)),
        beyond=beyond,
        other=other,
    )


def _git(root: Path, revision: str, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True)
    except FileNotFoundError:
        raise StudyError("results are compared with those that git has, and git is not installed: install it") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()[0]
        raise StudyError(f"results are compared with those of {revision} in a clone of the project: {said}") from None
    return done.stdout.decode()


def _stage(path: str) -> str:
    """The stage that made a result, by the name of its notebook as it ran."""
    return Path(path).name.split(".")[0] if "/results/" in path else "report"


def _made_anew(store: Store, path: str, revision: str) -> bool:
    """Whether a result was written by an execution here, and after it was committed.

    What came from git or DVC's cache was written later than the stage's timings, which end its execution.
    """
    file, timing = store.root / path, store.data("timings", f"{_stage(path)}.json")
    if not file.is_file() or not timing.is_file():
        return False
    committed = int(_git(store.root, revision, "log", "-1", "--format=%ct", revision, "--", path))
    return committed < file.stat().st_mtime <= timing.stat().st_mtime


def _differences(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What differs in the provenance, in words; hashes say only that something does."""
    for key in now:
        if was.get(key) != now[key]:
            hashed = key in ("code", "parameters", "data")
            yield key if hashed else f"{key} ({now[key]}, then {was.get(key, 'unknown')})"


def _fewest_images(texts: dict[str, str]) -> int:
    trained = [json.loads(text) for path, text in texts.items() if re.search(r"/train-[^/]*\.json$", path)]
    return min(min(record["test_images"], record["search_images"]) for record in trained)


def _values(name: str, text: str) -> dict[str, Value]:
    """Every value of a file, by its place.

    Raises:
        Damaged: it should be JSON, and is not.
    """
    if name.endswith(".json"):
        try:
            return {value.place: value for value in _leaves(name, json.loads(text), "", "", {})}
        except ValueError as error:
            raise Damaged(f"{name} is no JSON ({error}): {AGAIN}") from None
    return {
        f"line {number}, {column}": Value(name, f"line {number}, {column}", column, row, cell)
        for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2)
        for column, cell in row.items()
    }


def _leaves(file: str, item: Any, place: str, name: str, row: Row) -> Iterator[Value]:
    """The values of a record: one is called by the nearest key that is no number."""
    if not isinstance(item, dict):
        yield Value(file, place, name, row, item)
        return
    for key, inner in item.items():
        called = name if NUMBER.fullmatch(key) else key
        yield from _leaves(file, inner, f"{place}.{key}".strip("."), called, item)


def _compared(was: Value | None, now: Value | None, images: int | None) -> dict[str, Any]:
    """One row of a value: quantity, was, now, difference, allowed. What is no number differs by nothing or by infinity.

    Args:
        was: what is committed; None: nothing is, there.
        now: what was made anew.
        images: of the smallest split; None where no difference is expected, and none allowed.
    """
    value = was or now
    assert value is not None
    kind = next(kind for kind in QUANTITIES if re.fullmatch(kind.of, f"{value.file}:{value.name}"))
    contents = [None if side is None else side.content for side in (was, now)]
    first, second = (_numbers(content) for content in contents)
    if contents[0] == contents[1]:
        difference = 0.0
    elif first and len(first) == len(second):
        difference = max(abs(one - other) for one, other in zip(first, second, strict=True))
    else:
        difference = math.inf
    allowed = 0.0
    if was and now and images is not None and (first or kind.allowed is _any):
        allowed = kind.allowed(value, first[0] if first else math.nan, images)
    return {"quantity": kind.name, "was": contents[0], "now": contents[1], "difference": difference, "allowed": allowed}


def _numbers(content: Any) -> list[float]:
    """The one number of a value, or the three of a change with its interval; none of a word."""
    text = str(content)
    return [float(number) for number in NUMBER.findall(text)] if VALUE.fullmatch(text) else []


def _by_quantity(rows: pd.DataFrame) -> pd.DataFrame:
    table = []
    for kind in QUANTITIES:
        its = rows[rows.quantity == kind.name]
        if len(its):
            same, beyond = its.difference == 0, its.difference > its.allowed
            table.append(
                {
                    "quantity": kind.name,
                    "values": len(its),
                    "identical": same.sum(),
                    "within": (~same & ~beyond).sum(),
                    "beyond": beyond.sum(),
                    "largest": f"{its.difference.max():.4g}",
                    "tolerance": kind.tolerance,
                    "why": kind.reason,
                }
            )
    return pd.DataFrame(table)
