"""A study's parameters: checked whole, and frozen.

A mistyped key or a value out of range stops the first stage that runs, before it has done any work.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from ..networks.precision import Precision

Positive = Annotated[int, Field(gt=0)]


def _fraction_or_number(amount: float) -> float:
    if amount >= 1 and amount != int(amount):
        raise ValueError("a fraction is below 1, a number is whole")
    return amount


Amount = Annotated[float, Field(gt=0), AfterValidator(_fraction_or_number)]
"""A number of images, or below 1 a part of them."""
Percent = Annotated[float, Field(ge=0, le=100)]
# A run's name becomes a DVC stage name and a file name; DVC cannot resolve a dot in it.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FROM_SCRATCH = "none"


class StudyError(Exception):
    """A mistake that the user can mend: its message says what, where and how."""


class Section(BaseModel):
    """A part of the parameters: immutable, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """Which images, at which size, and how they are split."""

    source: Literal["sklearn", "torchvision", "folder"]
    dataset: str
    """``digits``; ``FashionMNIST``, ``CIFAR10`` or ``CIFAR100``; or the folder's path, from the project's root."""
    image_size: Annotated[int, Field(ge=8)]
    """Pixels on a side, to which every image is brought."""
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the shorter side that is kept, around the centre (folder)."""
    search: Amount = 0.2
    """Images held out of training for the rank search: how many, or which part of those that can be split."""
    test: Amount | None = None
    """Likewise for reported numbers only; null where the source has test images of its own."""
    search_from: Literal["train", "test"] = "train"
    """Where the search split of a run comes from whose weights are given, and may have seen every training image:
    ``test`` takes half of the test images, and reports the other half. Networks trained here keep theirs."""
    limit: Positive | None = None
    """Keep this many images, stratified (a shrunken study for tests); all where it is null."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Processes that decode images ahead (folder)."""

    @model_validator(mode="after")
    def _can_be_had(self) -> Data:
        known = {"sklearn": ["digits"], "torchvision": ["FashionMNIST", "CIFAR10", "CIFAR100"]}.get(self.source)
        if known is not None and self.dataset not in known:
            raise ValueError(f"{self.source} has no {self.dataset!r}{suggestion(self.dataset, known)}")
        if self.test is not None and self.search < 1 and self.test < 1 and self.search + self.test >= 1:
            raise ValueError("search + test must leave something to train on")
        return self


OWN_ARCHITECTURES = ("vgg11", "resnet20", "vit")


def _architecture(name: str) -> str:
    if name not in OWN_ARCHITECTURES and not name.startswith(("timm/", "torchvision/")):
        known = [*OWN_ARCHITECTURES, "timm/NAME", "torchvision/NAME"]
        raise ValueError(f"there is no {name!r}{suggestion(name, known)}")
    return name


class Model(Section):
    """An architecture and its size."""

    architecture: Annotated[str, AfterValidator(_architecture)]
    """``vgg11``, ``resnet20`` or ``vit``; ``timm/NAME`` or ``torchvision/NAME``."""
    width: Annotated[float, Field(gt=0)] = 1.0
    """Channels, as a multiple of the published network's (vgg11, resnet20)."""
    dim: Positive = 96
    """Embedding width (vit)."""
    depth: Positive = 6
    """Transformer blocks (vit)."""
    heads: Positive = 3
    """Attention heads (vit)."""
    patch_size: Positive = 8
    """Pixels on a side of one token (vit)."""
    blocks: Positive | None = None
    """Keep the first so many transformer blocks (timm, torchvision); all where it is null."""
    mean: tuple[float, ...] | None = None
    """What each channel is normalised with, in [0, 1]; that of the training images where it is null."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Model:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together")
        return self

    @property
    def layout(self) -> Model:
        """What networks have in common that differ in their weights: timm names those behind a dot."""
        architecture = self.architecture.partition(".")[0]
        return self.model_copy(update={"architecture": architecture, "mean": None, "std": None})


class Augmentation(Section):
    """Random changes to each training image, drawn anew at each step."""

    crop: Annotated[int, Field(ge=0)] = 0
    """Largest translation in whole pixels, black from outside: nothing is resampled (He et al. 2016)."""
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest translation, as a fraction of the image's side."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation, in degrees."""
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of size."""
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest relative change of contrast."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of added Gaussian noise, in units of the normalised image."""
    flip: bool = False
    """Mirror half of the images left to right."""


class Recipe(Section):
    """One optimisation: AdamW or SGD with momentum, linear warm-up, cosine decay to zero."""

    epochs: Positive
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=1)] = 64
    optimizer: Literal["sgd", "adamw"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augmentation: Augmentation = Augmentation()


class Pretrained(Recipe):
    """Weights to start from: made here by self-supervision, or read from a given checkpoint."""

    method: Literal["simclr", "mae", "checkpoint", "published"]
    """Made here without labels; read from a file; or what timm or torchvision publishes for the architecture."""
    model: Model
    title: str | None = None
    """What these weights are called in tables; the method's name where it is null."""
    supervision: Literal["supervised", "self-supervised", "weakly supervised"] | None = None
    """How they were made (checkpoint, published); those made here are self-supervised."""
    epochs: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """Of the contrastive loss (simclr)."""
    projection_dim: Positive = 64
    """Width of the projection head's output (simclr)."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Part of the tokens that are hidden (mae)."""
    decoder_depth: Positive = 2
    """Transformer blocks of the decoder, which is as wide as the encoder (mae)."""
    weights: str | None = None
    """The name that torchvision gives them; timm's is a part of the architecture's name (published)."""
    file: str | None = None
    """A safetensors file, or one that torch.load reads; its path from the project's root (checkpoint)."""
    url: str | None = None
    """Where the file is downloaded from when it is not there (checkpoint)."""
    sha256: str | None = None
    """The file's SHA-256, so that another file under its name is noticed (checkpoint)."""

    @model_validator(mode="after")
    def _checkpoint_names_its_file(self) -> Pretrained:
        given = [value is not None for value in (self.file, self.sha256)]
        if given != 2 * [self.method == "checkpoint"]:
            raise ValueError("file and sha256 belong to method: checkpoint, and it needs both")
        if self.url is not None and self.method != "checkpoint":
            raise ValueError("url belongs to method: checkpoint")
        if self.weights is not None and self.method != "published":
            raise ValueError("weights belongs to method: published")
        if (self.supervision is None) == self.given:
            raise ValueError("supervision belongs to method: checkpoint and published, which need it")
        return self

    @property
    def given(self) -> bool:
        """Whether the weights were made elsewhere, on images that this study does not know."""
        return self.method in ("checkpoint", "published")

    @property
    def name(self) -> str:
        """In tables."""
        return self.title or {"simclr": "SimCLR", "mae": "MAE"}.get(self.method, self.method)


class Train(Recipe):
    """How a run's network comes to be, from its initial weights."""

    method: Literal["supervised", "linear", "as_given"] = "supervised"
    """All weights; the classifier alone on a frozen encoder; or no training at all."""
    epochs: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3


class Finetune(Recipe):
    """How decomposed networks, and the dense one, are trained on."""

    lrs: list[Annotated[float, Field(gt=0)]] = []
    """Further learning rates; each network takes the one with the best accuracy on the search split."""
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the divergence from the original's predictions, beside that of the labels' cross-entropy."""
    seeds: Positive = 1
    """Networks that differ in their random numbers alone, at the learning rate that the first one took."""


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
    criterion: Literal["rank", "utilized", "energy"] = "rank"
    """Search k_S and k_T each on its own; only the smaller of them; or one energy threshold for both."""
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
Share = Annotated[float, Field(gt=0, lt=1)]


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
    losses: Literal["energy", "divergence"] = "divergence"
    """What a budget adds up over the layers: the lost part of their outputs' variance, or the measured
    divergence of the predictions."""
    images: Positive = 2000
    """Calibration images that weights are compensated on (all of them where there are fewer)."""
    loss_images: Positive = 500
    """Calibration images that the divergence is measured on."""
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


def suggestion(word: str, known: Iterable[str]) -> str:
    """The nearest of the ``known`` words, as the end of a message; all of them where none is near."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.5)
    return f"; did you mean {lower[close[0]]!r}?" if close else f" (known: {', '.join(sorted(known))})"


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
