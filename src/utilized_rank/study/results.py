"""What stages leave for those after them to read: the columns of each table, the keys of each record.

A table that ends early, but after a whole row, is taken for one: that more was written, DVC's lock alone knows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..base.sections import Percent, Positive, Section

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, le=1)]
Points = Annotated[float, Field(ge=-100, le=100)]


class Result(Section):
    """A row of a table or a record; a number may be text, as in a table, and a whole one have a point."""

    model_config = ConfigDict(strict=False)


class Epoch(Result):
    """A row of a learning curve; without labels there is no accuracy."""

    epoch: Positive
    lr: Amount
    loss: float
    search_accuracy: Percent | None = None


class Utilized(Result):
    """A layer at a tolerance: its row as in ``Measurement.layers``."""

    layer: str
    m: Positive
    n: Positive
    groups: Positive
    epsilon: Amount
    k_s: Count
    k_t: Count
    k_s_alone: Count | None
    k_t_alone: Count | None
    r: Count
    utilization: Part
    r_low: Count | None = None
    r_high: Count | None = None

    @model_validator(mode="after")
    def _is_what_its_rank_says(self) -> Utilized:
        if f"{self.utilization:.10g}" != f"{self.r / min(self.m, self.n):.10g}":  # the digits that tables have
            raise ValueError(f"utilization {self.utilization:g} is not r / min(m, n)")
        return self


class Assessed(Result):
    """A network, as ``decompose.assess`` finds it."""

    form: Literal["original", "re-estimated", "projected", "decomposed", "fine-tuned"]
    method: Literal["dense", "projection", "optimal", "svd", "compensated", "scratch"]
    accuracy: Percent
    images: Positive
    change: Points
    change_low: Points
    change_high: Points
    parameters: Positive
    flops: Positive


class Made(Assessed):
    """A network that was made at the utilized ranks; what is not made so has no tolerance."""

    epsilon: Amount | None


class Beyond(Assessed):
    """A network of a frontier."""

    ranks: str
    search_accuracy: Percent | None
    seed: Count | None
    lr: Amount | None


class Kind(Result):
    """A kind of training at a tolerance: its row as in ``tables.training_kinds``."""

    kind: str
    run: str
    epsilon: Amount
    mlu: Part
    first: Part
    middle: Part
    last: Part
    rankme: Amount
    accuracy: Percent
    images: Positive


class Timed(Result):
    """A low-rank network beside its original: its row as in ``decompose.latency``."""

    epsilon: Amount | None = None
    ranks: str | None = None
    method: str
    images: Positive
    original: Amount
    decomposed: Amount
    flops_kept: Amount


class Trained(Result):
    """What training says of a run."""

    test_accuracy: Percent
    test_images: Positive
    search_accuracy: Percent
    search_images: Positive
    parameters: Positive
    flops: Positive


class Measured(Result):
    """What the measurement says of a run."""

    mlu: dict[str, Part]
    rankme: Amount
    layers_counted: Count
    left_out: dict[str, str]
    search_precision: str
    calibration_images: Positive
    search_images: Positive
    evaluations: Count
    passes_of_the_search_split: Amount


class Kept(Result):
    """What a smaller network keeps and loses."""

    parameters_kept: Amount
    flops_kept: Amount
    change: Points
    change_low: Points
    change_high: Points


class Headline(Result):
    """A run, as in ``summary.summary``."""

    label: str
    training: str
    supervision: str
    test_accuracy: Percent
    mlu: dict[str, Part]
    finetuned: dict[str, Kept]
    frontier: dict[str, dict[str, dict[str, Kept]]] | None = None


class Record(BaseModel):
    """Of a study's provenance, what is read again."""

    title: str


ROWS: dict[str, type[Section]] = {
    "pretrain": Epoch,
    "train": Epoch,
    "measure": Utilized,
    "ssl_vs_supervised": Kind,
    "decompose": Made,
    "finetune": Made,
    "frontier": Beyond,
}
"""Of the table of each stage."""
RESULTS: dict[str, Any] = {"train": Trained, "measure": Measured}
"""Of the record of each stage."""
SUMMARY = dict[str, Headline]
SPLITS = dict[str, list[Count]]
