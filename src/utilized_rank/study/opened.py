"""A study as it is opened: its parameters, its folders, and what one of its runs sees."""

from __future__ import annotations

from ..base.files import read_json
from ..base.sections import StudyError
from ..base.store import Store
from ..datasets import data
from ..datasets.data import Dataset
from .config import Study
from .homes import load_study, project_root, study_home


def open_study(name: str | None = None) -> tuple[Study, Store]:
    """The parameters and folders of a study: the one around the working directory, or the one of that name.

    Tolerances that it leaves to its search split are in place as soon as the images are split.

    Raises:
        StudyError: as :func:`utilized_rank.study.homes.study_home` and ``load_study`` there; or the parameters are
            another study's.
    """
    root = project_root()
    home = study_home(root, name)
    study = load_study(home)
    params = (home / "params.yaml").relative_to(root).as_posix()
    if study.params != params or study.name != (name or study.name):
        raise StudyError(
            f"{params} says name: {study.name} and params: {study.params}, which it is not: "
            f"run `utilized-rank study {name or home.name}`"
        )
    store = Store(study.name, root)
    splits = store.data("prepare", "splits.json")
    if not study.measure.epsilons and splits.is_file():
        indices = read_json(splits)
        smallest = min(len(indices[name]) for name in ("search", "test_searched") if name in indices)
        measure = study.measure.resolved(smallest)
        study = study.model_copy(update={"measure": measure})
    return study, store


def dataset_of(study: Study, store: Store, run: str) -> Dataset:
    """A study's data set as one run sees it: in its own splits, normalised as its model says."""
    model = study.runs[run].model
    dataset = data.load(store).normalised_by(model.mean, model.std)
    return dataset.searching_test() if study.search_from(run) == "test" else dataset
