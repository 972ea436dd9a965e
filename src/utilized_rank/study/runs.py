"""One run of a study: the images that it sees and the network that it trained, where the study runs."""

from __future__ import annotations

from torch import nn

from ..base.runtime import device
from ..base.store import Store
from ..datasets import data
from ..datasets.data import Dataset
from ..training import models
from .config import Study


def dataset_of(study: Study, store: Store, run: str) -> Dataset:
    """A study's data set as one run sees it: in its own splits, normalised as its model says."""
    model = study.runs[run].model
    dataset = data.load(store).on(device()).normalised_by(model.mean, model.std)
    return dataset.searching_test() if study.search_from(run) == "test" else dataset


def network_of(study: Study, store: Store, run: str, dataset: Dataset) -> nn.Module:
    """The network that ``run`` trained, where the study runs, in evaluation mode; all of its layers are called."""
    weights = store.data("train", run, "network.safetensors")
    shape, classes = dataset.shape, len(dataset.classes)
    return models.load(weights, study.runs[run].model, shape, classes, study.measure.qkv).to(device())
