"""Beyond the paper: what a study asks of one network, at every choice of ranks and kind of weights."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
from torch import nn

from ..base.journal import NOTHING_KEPT, Answers, Journal
from ..base.sections import StudyError
from ..compression.compressor import Compression
from ..compression.costs import Choices
from ..compression.decomposition import Decomposed
from ..compression.lowrank import weights_a_rank
from ..compression.pairs import restructure
from ..compression.policies import Joint
from ..datasets.data import Dataset
from ..networks.evaluation import Labelled
from ..ranks.layers import Layer
from ..ranks.moments import Moments
from ..study.sections import Frontier, Policy
from ..study.tolerances import check_resolution
from ..training import models
from ..training.sections import Model


def compression(
    network: nn.Module,
    moments: dict[str, Moments],
    dataset: Dataset,
    asked: Frontier,
    memory: int,
    journal: Journal = NOTHING_KEPT,
) -> Compression:
    """The low-rank networks of one measured network, as a study asks for them.

    Args:
        network: never changed.
        moments: of the inputs of its layers.
        dataset: its calibration images and its search split.
        asked: what is built, and how.
        memory: MiB that the values that flow into a layer may take.
        journal: of verdicts before an interruption.
    """
    return Compression(
        network,
        moments,
        dataset.inputs("train", asked.images),
        Labelled(dataset.inputs("search"), dataset.labels("search")),
        asked.forms,
        asked.losses,
        asked.loss_images,
        asked.latency_images,
        memory,
        recall=Answers(journal, "searches"),
    )


def built(
    made: Compression,
    method: str,
    policy: Policy,
    choices: Choices,
    dimensions: dict[str, tuple[int, int]],
    journal: Journal = NOTHING_KEPT,
) -> Decomposed:
    """The network of one kind of weights at the choices of a policy: built, or as it was before an interruption."""
    name = f"{method}-{policy.name}"
    kept = journal.get(name)
    if kept is not None:
        tensors, known = kept
        network = copy.deepcopy(made.network)
        restructure(network, known["forms"])
        network.load_state_dict(tensors)
        return Decomposed(network.eval(), known["forms"])
    small = made.build(method, choices, dimensions)
    tensors = {name: tensor.clone() for name, tensor in small.network.state_dict().items()}
    journal.put(name, tensors, {"forms": small.forms}, f"{name} built")
    return small


def choices(made: Compression, policy: Policy, ranks: pd.DataFrame) -> Choices:
    """The form and rank of each layer that ``policy`` puts in two.

    Args:
        made: of the network.
        policy: how ranks are chosen.
        ranks: the network's utilized ranks, as in ``Measurement.layers``.

    Raises:
        StudyError: a budget that not even the smallest network keeps, or a tolerance finer than one image.
    """
    if policy.budget is not None:
        try:
            return made.within(policy.kind, policy.amount)
        except ValueError as error:
            raise StudyError(str(error)) from None
    if policy.search == "independent":
        found = _found(policy, ranks)
        return made.independent({name: int(found.r[name]) for name in made.layers})
    if isinstance(made.score, Labelled):
        check_resolution(len(made.score), [policy.amount], f"the frontier's {policy.name}")
    if policy.search == "cumulative":
        return made.cumulative(policy.weights, policy.amount)
    return made.joint(policy.weights, policy.amount).choices


def dimensions(made: Compression, policy: Policy, ranks: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """k_S and k_T of P_S W P_T, where ``policy`` says more of them than the rank; arguments as of :func:`choices`."""
    if policy.search != "independent":
        return {}
    found = _found(policy, ranks)
    return {name: (int(found.k_s[name]), int(found.k_t[name])) for name in made.layers}


def _found(policy: Policy, ranks: pd.DataFrame) -> pd.DataFrame:
    return ranks[ranks.epsilon == policy.amount].set_index("layer")


def boundaries(made: Compression, policies: list[Policy]) -> dict[str, Joint]:
    """What joint searches found, by the name of the policy."""
    return {policy.name: made.joint(policy.weights, policy.amount) for policy in policies if policy.search == "joint"}


def untrained(
    model: Model, shape: tuple[int, int, int], classes: int, qkv: str, forms: dict[str, list[Any]]
) -> nn.Module:
    """A network in the forms of a decomposed one, with random weights.

    Args:
        model: of the original.
        shape: channels, height and width of an image.
        classes: how many.
        qkv: as of :func:`models.load`.
        forms: as in ``Decomposed.forms``.
    """
    network = models.callable_layers(models.build(model, shape, classes), shape, qkv)
    restructure(network, forms)
    return network


def boundaries_table(boundaries: dict[str, Joint], parameters: int) -> pd.DataFrame:
    """Every network that a joint search tried, in order: ranks, path, cuts, budget, kept, passes.

    On the path of budgets and the cumulative one no cut is named; on the descent from there, they are the layers that
    were made smaller, each with its form and rank. What the network costs is the budget, in parameters, and ``kept`` a
    part of all of them.

    Args:
        boundaries: by the name of the policy.
        parameters: of the original.
    """
    rows: list[dict[str, Any]] = []
    for name, found in boundaries.items():
        its: list[dict[str, Any]] = [
            {"path": "budgets", "budget": budget, "passes": passes} for budget, passes in sorted(found.tried.items())
        ]
        its += [{"path": "cumulative", "budget": found.cumulative, "passes": True}] if found.cumulative else []
        for step in found.descent:
            cuts = "; ".join(f"{layer} {form} {rank}" for layer, (form, rank) in step.cuts.items())
            its.append({"path": "descent", "cuts": cuts, "budget": step.cost, "passes": step.passes})
        rows += [{"ranks": name, **row, "kept": row["budget"] / parameters} for row in its]
    return pd.DataFrame(rows, columns=["ranks", "path", "cuts", "budget", "kept", "passes"])


def paths_table(tried: pd.DataFrame) -> pd.DataFrame:
    """The smallest network that had passed after each path of a joint search: ranks, path, kept, tried (how many).

    Args:
        tried: as of :func:`boundaries_table`.
    """
    kept = tried.kept.where(tried.passes.astype(bool), 1.0)  # the whole network passes
    paths = kept.groupby([tried.ranks, tried.path], sort=False).agg(kept="min", tried="size").reset_index()
    return paths.assign(kept=paths.groupby("ranks", sort=False).kept.cummin())


def choices_table(choices: dict[str, Choices], layers: dict[str, Layer]) -> pd.DataFrame:
    """Every layer at every way of choosing ranks: ranks, layer, m, n, groups, form, rank, weights.

    A whole layer has rank 0 and all of its weights.

    Args:
        choices: by the name of the policy.
        layers: all that might be put in two, by name.
    """
    rows = []
    for name, chosen in choices.items():
        for layer in layers.values():
            form, rank = chosen.get(layer.name, ("whole", 0))
            weights = rank * weights_a_rank(layer, form) if rank else layer.groups * layer.m * layer.n
            size = {"m": layer.m, "n": layer.n, "groups": layer.groups}
            rows.append({"ranks": name, "layer": layer.name, **size, "form": form, "rank": rank, "weights": weights})
    return pd.DataFrame(rows)
