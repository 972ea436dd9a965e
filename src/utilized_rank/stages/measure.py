"""Utilization of a study's network on its data set."""

from __future__ import annotations

from torch import nn

from ..base.journal import NOTHING_KEPT, Answers, Journal
from ..base.sections import StudyError
from ..datasets.data import Dataset
from ..networks.evaluation import Labelled
from ..ranks import measure as library
from ..ranks.measure import Measurement
from ..study.sections import Measure
from ..study.tolerances import check_resolution
from .cluster import engine


def measure(network: nn.Module, dataset: Dataset, parameters: Measure, journal: Journal = NOTHING_KEPT) -> Measurement:
    """Measure the utilized rank of every layer that counts, as ``parameters`` say, and as far as the journal does not.

    Raises:
        StudyError: an epsilon is finer than one image of the search split; ranks are to be predicted of a network
            without a gradient; or as of :func:`utilized_rank.stages.cluster.engine`.
        FloatingPointError: a layer receives NaN or Inf.
    """
    check_resolution(len(dataset.splits["search"]), parameters.epsilons)
    how = parameters.model_dump(exclude={"calibration_images", "epsilons", "qkv"})
    calibration = dataset.inputs("train", parameters.calibration_images)
    answers, each = Answers(journal, "rank search"), engine()
    search = Labelled(dataset.inputs("search"), dataset.labels("search"))
    try:
        return library.measure(network, search, calibration, parameters.epsilons, recall=answers, each=each, **how)
    except library.Unpredictable as error:
        raise StudyError(f"measure.criterion predicted: {error}") from None
