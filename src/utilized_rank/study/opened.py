"""A study as it is opened: its parameters and its folders."""

from __future__ import annotations

from ..base.files import read_json
from ..base.sections import StudyError
from ..base.store import Store
from .config import Study
from .homes import load_study, project_root, study_home
from .results import SPLITS
from .tolerances import search_images


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
        measure = study.measure.resolved(search_images(read_json(splits, SPLITS)))
        study = study.model_copy(update={"measure": measure})
    return study, store
