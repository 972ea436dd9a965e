"""Where studies lie in the project, how their parameters are composed, and how they are read.

The default study's ``params.yaml`` lies at the project's root, beside ``dvc.yaml``. Any other study has a home of its
own, ``reports/<study>/``, with its parameters, its lock, and a copy of the one ``dvc.yaml``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .config import Study, StudyError, parse_study, suggestion


def project_root() -> Path:
    """The working directory or the nearest folder above it that holds ``conf/`` and ``params.yaml``.

    Raises:
        StudyError: there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "conf").is_dir() and (folder / "params.yaml").is_file():
            return folder
    raise StudyError(f"no project in {here} or above it (a folder with conf/ and params.yaml): run this inside it")


def main_root(root: Path) -> Path:
    """The project that the paths of a study are relative to: ``root``, but for experiments in a folder of their own.

    What git ignores, as raw images and checkpoints, is not there when DVC runs an experiment from its queue or with
    ``--temp``: it stays in the project that DVC was called in, which DVC names in DVC_ROOT.
    """
    called_in = os.environ.get("DVC_ROOT")
    if called_in and root.resolve().is_relative_to(Path(called_in).resolve() / ".dvc" / "tmp"):
        return Path(called_in)
    return root


def study_home(root: Path, name: str | None = None) -> Path:
    """The folder with the ``params.yaml`` of a study: ``reports/<name>``, or ``root``, which has the default one's.

    Args:
        root: the project's root.
        name: of the study; without it, the one in whose folder (of ``reports/`` or ``data/``) the working directory
            lies, or the default one.

    Raises:
        StudyError: it was not laid out yet.
    """
    if name is None:
        inside = Path.cwd().relative_to(root).parts if Path.cwd().is_relative_to(root) else ()
        own = root / "reports" / inside[1] if len(inside) > 1 and inside[0] in ("data", "reports") else root
        return own if (own / "params.yaml").is_file() else root
    own = root / "reports" / name
    if (own / "params.yaml").is_file():
        return own
    default = _read_yaml(root / "params.yaml")
    if isinstance(default, dict) and default.get("name") == name:
        return root
    if name in known_studies(root):
        raise StudyError(f"study {name} is not laid out yet: run `utilized-rank study {name}`")
    raise StudyError(f"there is no study {name!r}{suggestion(name, known_studies(root))}")


def load_study(home: Path) -> Study:
    """Read and check the ``params.yaml`` in ``home``.

    Raises:
        StudyError: the file is missing, is not YAML, has an unknown key or a value out of range;
            the message has one line for each mistake.
    """
    path = home / "params.yaml"
    return parse_study(_read_yaml(path), _shown(path))


def _shown(path: Path) -> str:
    """A path as short as it can be told: from the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _read_yaml(path: Path) -> Any:
    try:
        # ruamel reads YAML 1.2, as DVC does; other loaders take 1e-3 for a string.
        return YAML(typ="safe").load(path.read_text())
    except OSError as error:
        raise StudyError(f"{_shown(path)} cannot be read: {error.strerror}") from error
    except YAMLError as error:
        raise StudyError(f"{_shown(path)} is not valid YAML: {error}") from error


def known_studies(root: Path) -> list[str]:
    """The studies of ``conf/study``, by name."""
    return sorted(path.stem for path in (root / "conf" / "study").glob("*.yaml"))


def compose(name: str | None, root: Path, home: Path = Path()) -> str:
    """The ``params.yaml`` of the study in ``conf/study/<name>.yaml``, composed by Hydra.

    Args:
        name: of the study; the default one of ``conf/config.yaml`` without it.
        root: the project's root.
        home: the study's home, from there.

    Raises:
        StudyError: there is no such study, or it has another name than its file; or as :func:`load_study`.
    """
    from dvc.utils.hydra import compose_and_dump
    from dvc.utils.serialize import modify_yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if name is not None and name not in known_studies(root):
        raise StudyError(f"conf/study has no {name!r}{suggestion(name, known_studies(root))}")
    place = [f"root={os.path.relpath('.', home)}", f"params={(home / 'params.yaml').as_posix()}"]
    overrides = [*place, *([f"study={name}"] if name else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        try:
            compose_and_dump(str(path), str(root.absolute() / "conf"), None, "config", "", overrides)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise StudyError(f"conf/study/{name}.yaml cannot be composed: {error}") from None
        with modify_yaml(str(path)):
            pass  # to the bytes that DVC writes, so that a parameter set and set back leaves no trace
        text = path.read_text()
    study = parse_study(YAML(typ="safe").load(text), f"conf/study/{name}.yaml")
    if name is not None and study.name != name:
        raise StudyError(f"conf/study/{name}.yaml says name: {study.name}, but a study is named as its file: {name}")
    return text


def composed(name: str, root: Path) -> Study:
    """The study in ``conf/study/<name>.yaml``, whatever is laid out.

    Raises:
        StudyError: as :func:`compose`.
    """
    return parse_study(YAML(typ="safe").load(compose(name, root)), f"conf/study/{name}.yaml")
