"""Parameters of what is measured and made of the networks, and of how they are compared."""

from __future__ import annotations

import math
from typing import Annotated, Literal, cast

from pydantic import Field, PrivateAttr, model_validator

from ..base.sections import Name, Percent, Positive, Section, Share
from ..networks.precision import Precision
from ..training.sections import Finetune, Model, Recipe, Train

FROM_SCRATCH = "none"


class Run(Section):
    """One network of the study."""

    label: str
    """Its name in tables and figures."""
    model: Model
    pretrained: str = FROM_SCRATCH
    """A key of ``pretrained``, or ``none`` to start from random weights."""
    train: Train
    finetune: Recipe


DEFAULT_EPSILONS = (1.0, 2.0)
"""Tolerances, in points, of a study that names none."""


class Measure(Section):
    """The moment pass and the rank search."""

    calibration_images: Positive
    """Training images over which the second moments are taken (all of them where there are fewer)."""
    _by_default: bool = PrivateAttr(False)
    epsilons: list[Percent] = []
    """Tolerated loss of accuracy on the search split, in percentage points; where none is named, 1 and 2, or the finest
    that the search split resolves (:meth:`resolved`)."""
    criterion: Literal["rank", "utilized", "energy", "predicted"] = "rank"
    """Search k_S and k_T each on its own; only the smaller of them; or one energy threshold for both. Or predict what
    the first of these would find, where it would take too long: nothing is certified."""
    precision: Precision = "auto"
    """Of the network's arithmetic in the rank search, the unaltered one's too."""
    rows: Positive | None = 4
    """Rows that a layer's second moment is taken over, as a multiple of its input width m; all where it is null."""
    batch_size: Positive = 128
    """Images a batch in the moment pass."""
    qkv: Literal["fused", "split"] = "fused"
    """Count the common projection of queries, keys and values as one layer or as three."""
    memory: Positive = 2048
    """MiB that the rank search may use to keep what flows into a layer."""

    @model_validator(mode="after")
    def _epsilons_differ(self) -> Measure:
        if len(set(self.epsilons)) < len(self.epsilons):
            raise ValueError(f"epsilons {self.epsilons} names one twice")
        return self

    def resolved(self, images: int) -> Measure:
        """With tolerances in place, where none is named: the default ones, none finer than one of ``images``.

        What one image is worth is rounded up to a hundredth of a point.
        """
        if self.epsilons:
            return self
        finest = math.ceil(100 * 100 / images) / 100
        found = self.model_copy(update={"epsilons": sorted({max(epsilon, finest) for epsilon in DEFAULT_EPSILONS})})
        found._by_default = True
        return found

    @property
    def by_default(self) -> bool:
        """Whether the tolerances are the default ones, as :meth:`resolved` found them."""
        return self._by_default


Method = Literal["projection", "optimal", "svd", "compensated"]
"""Low-rank weights: the paper's, the closed-form optimum, plain SVD, and the optimum fitted front to back."""


class Policy(Section):
    """How the ranks of all layers are chosen: by a tolerance, or by a budget."""

    search: Literal["independent", "cumulative", "joint"] | None = None
    """One layer altered at a time (Garg et al. 2024); front to back, what is before a layer replaced already; or
    the smallest network whose accuracy stays within the tolerance with all layers replaced."""
    epsilon: Percent | None = None
    """Tolerated loss of accuracy on the search split, in percentage points (of a search)."""
    budget: dict[Literal["params", "flops", "latency"], Share] | None = None
    """The part of the network's parameters, FLOPs or measured time that may remain: one of them."""
    weights: Method = "compensated"
    """What layers are replaced with in the search (cumulative, joint)."""
    finetuned: list[Method] = []
    """Those of ``methods`` that are trained on at these ranks."""

    @model_validator(mode="after")
    def _says_how(self) -> Policy:
        if (self.search is None) != (self.epsilon is None):
            raise ValueError("search and epsilon belong together")
        if (self.search is None) == (self.budget is None):
            raise ValueError("give either search and epsilon, or budget")
        if self.search == "cumulative" and self.weights == "projection":
            raise ValueError("cumulative cuts one matrix at every rank, and P_S W P_T is another at each")
        if self.budget is not None and len(self.budget) != 1:
            raise ValueError(f"a budget is of one kind, not of {len(self.budget)}")
        return self

    @property
    def kind(self) -> str:
        """The search, or what the budget is of."""
        return self.search or next(iter(self.budget or {}))

    @property
    def amount(self) -> float:
        """The tolerance in points, or the part that may remain."""
        return next(iter(self.budget.values())) if self.budget else cast(float, self.epsilon)

    @property
    def name(self) -> str:
        """Of its networks' files and in tables, as ``joint-0.5``."""
        return f"{self.kind}-{self.amount:g}"


class Decompose(Section):
    """Which low-rank weights are built at the ranks found."""

    methods: Annotated[list[Literal["projection", "optimal", "svd"]], Field(min_length=1)]
    finetuned: Annotated[list[Literal["projection", "optimal", "svd"]], Field(min_length=1)]
    """Those of ``methods`` that are trained on."""
    objective: Literal["parameters", "latency"] = "parameters"
    """Put a layer in two where that saves weights; or only where it is also faster, as measured on this machine."""
    latency_images: Positive = 64
    """Images at a time, where latency is measured."""
    sweep_points: Annotated[int, Field(ge=2)] = 8
    """Kept dimensions tried for each curve of Figure 1."""
    sweep_images: Positive = 2000
    """Search images that the curves of Figure 1 are taken over (all of them where there are fewer)."""

    @model_validator(mode="after")
    def _finetunes_what_it_builds(self) -> Decompose:
        if missing := sorted(set(self.finetuned) - set(self.methods)):
            raise ValueError(f"finetuned names {missing}, which methods does not build")
        return self


class Frontier(Section):
    """One run beyond the paper: ranks that compose, weights that are fitted front to back, fair fine-tuning."""

    methods: Annotated[list[Method], Field(min_length=1)]
    """Low-rank weights that are built."""
    ranks: Annotated[list[Policy], Field(min_length=1)]
    """At which ranks."""
    forms: Annotated[list[Literal["channel", "spatial"]], Field(min_length=1)] = ["channel", "spatial"]
    """In two how: k x k then 1 x 1; and k x 1 then 1 x k, chosen layer by layer."""
    losses: Literal["curvature", "divergence", "energy"] = "curvature"
    """What a budget adds up over the layers: the divergence of the predictions, from their curvature and measured where
    the budget cuts, or measured throughout; or the lost part of the variance of their outputs."""
    images: Positive = 2000
    """Calibration images that weights are compensated on (all of them where there are fewer)."""
    loss_images: Positive = 128
    """How many of ``images`` divergences are taken on: drawn so that most are such as the network is least sure of."""
    latency_images: Positive = 64
    """Images at a time, where latency is measured."""
    finetune: Finetune
    statistics: Annotated[int, Field(ge=0)] = 0
    """Training images, changed as in ``finetune``, that the statistics of batch norm are taken over anew: every
    network is looked at with them too. None where it is 0."""
    scratch: Finetune | None = None
    """How networks of the same forms are trained from random weights, at ranks where any is trained on; null: none."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Frontier:
        if "channel" not in self.forms:
            raise ValueError("forms needs channel: not every layer can take another")
        for policy in self.ranks:
            if missing := sorted(set(policy.finetuned) - set(self.methods)):
                raise ValueError(f"ranks {policy.name}: finetuned names {missing}, which methods does not build")
            if policy.search in ("cumulative", "joint") and policy.weights not in self.methods:
                raise ValueError(f"ranks {policy.name}: weights is {policy.weights}, which methods does not build")
        names = [policy.name for policy in self.ranks]
        for name in sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"ranks has {name} {names.count(name)} times")
        return self


class Comparison(Section):
    """Three runs of one architecture that differ in how they were trained."""

    label: str
    supervised: Name
    linear: Name
    finetuned: Name

    def runs(self) -> dict[str, str]:
        """The kind of training and the run that had it."""
        return {"supervised": self.supervised, "linear": self.linear, "finetuned": self.finetuned}


class Repeats(Section):
    """Runs that differ in their random numbers alone."""

    label: str
    runs: Annotated[list[Name], Field(min_length=2)]

    @model_validator(mode="after")
    def _runs_differ(self) -> Repeats:
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"runs {self.runs} names one twice")
        return self
