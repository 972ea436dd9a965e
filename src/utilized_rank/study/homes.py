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
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ..base.sections import StudyError, suggestion
from .config import Study, parse_study


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
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise StudyError(f"{_shown(path)} is not valid YAML: {error.problem}{line}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{_shown(path)} is not valid YAML: {str(error).splitlines()[0]}") from error


def default_study(root: Path) -> str:
    """The name of the study whose home is ``root``, from ``conf/config.yaml``."""
    defaults = _read_yaml(root / "conf" / "config.yaml")["defaults"]
    return next(str(item["study"]) for item in defaults if isinstance(item, dict) and "study" in item)


def known_studies(root: Path) -> list[str]:
    """The studies of ``conf/study``, by name."""
    return sorted(path.stem for path in (root / "conf" / "study").glob("*.yaml"))


def compose(name: str, root: Path, home: Path = Path()) -> tuple[Study, str]:
    """The study in ``conf/study/<name>.yaml``, and its ``params.yaml`` as Hydra composes it.

    Args:
        name: of the study.
        root: the project's root.
        home: the study's home, from there.

    Raises:
        StudyError: there is no such study, or it has another name than its file; or as :func:`load_study`.
    """
    from dvc.utils.hydra import compose_and_dump
    from dvc.utils.serialize import modify_yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if name not in known_studies(root):
        raise StudyError(f"conf/study has no {name!r}{suggestion(name, known_studies(root))}")
    place = [f"root={os.path.relpath('.', home)}", f"params={(home / 'params.yaml').as_posix()}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        try:
            compose_and_dump(str(path), str(root.absolute() / "conf"), None, "config", "", [*place, f"study={name}"])
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise StudyError(f"conf/study/{name}.yaml cannot be composed: {error}") from None
        with modify_yaml(str(path)):
            pass  # to the bytes that DVC writes, so that a parameter set and set back leaves no trace
        text = path.read_text()
    study = parse_study(YAML(typ="safe").load(text), f"conf/study/{name}.yaml")
    if study.name != name:
        raise StudyError(f"conf/study/{name}.yaml says name: {study.name}, but a study is named as its file: {name}")
    return study, text
