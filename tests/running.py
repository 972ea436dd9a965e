"""A shrunken study in a copy of the project, and beside it the README's own: what the tests of both run once.

And the command, run in this process.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from dvc.utils.serialize import dump_yaml
from PIL import Image

from utilized_rank import cli
from utilized_rank.study.config import parse_study

ROOT = Path(__file__).parents[1]
VGG = {"architecture": "vgg11", "width": 0.0625}
TUNE = {"epochs": 2, "lr": 1e-3}
STUDY = {
    "name": "tiny",
    "title": "a shrunken study",
    "threads": 1,
    "data": {
        "source": "sklearn",
        "dataset": "digits",
        "image_size": 32,
        "search": 0.25,
        "test": 0.25,
        "limit": 64,
    },
    "pretrained": {"tiny_simclr": {"method": "simclr", "model": VGG, "epochs": 2, "batch_size": 16}},
    "runs": {
        "tiny_vgg": {"label": "VGG11", "model": VGG, "train": TUNE, "finetune": TUNE, "pretrained": "none"},
        "tiny_ssl": {
            "label": "VGG11, SSL",
            "model": VGG,
            "pretrained": "tiny_simclr",
            "train": {"method": "linear", **TUNE},
            "finetune": TUNE,
        },
    },
    "measure": {"calibration_images": 32, "epsilons": [7.0]},
    "decompose": {"methods": ["projection", "optimal", "svd"], "finetuned": ["optimal"], "sweep_points": 2},
    "frontier": {
        "tiny_vgg": {
            "methods": ["optimal", "compensated"],
            "ranks": [
                {"search": "cumulative", "epsilon": 7.0},
                {"search": "joint", "epsilon": 7.0},
                {"budget": {"params": 0.5}, "finetuned": ["compensated"]},
            ],
            "images": 32,
            "finetune": TUNE | {"lrs": [1e-2], "seeds": 2, "distillation": 0.5},
            "scratch": TUNE,
        }
    },
    "comparisons": {
        "tiny": {"label": "VGG11", "supervised": "tiny_vgg", "linear": "tiny_ssl", "finetuned": "tiny_ssl"}
    },
    "notes": ["Cut: two epochs."],
}


# DVC wants every parameter that a stage names to stand in params.yaml, defaults included.
STUDY = parse_study(STUDY).model_dump()


def with_run(name: str, **changes: object) -> dict:
    """The study with parts of one run replaced."""
    return STUDY | {"runs": STUDY["runs"] | {name: STUDY["runs"][name] | changes}}


def write_params(project: Path, study: dict) -> None:
    dump_yaml(project / "params.yaml", {"root": ".", "params": "params.yaml"} | study)  # to the bytes that DVC writes


def environment() -> dict[str, str]:
    """Of the commands of this environment, as make sets it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}


def command(project: Path, *words: str, ok: bool = True, env: dict[str, str] | None = None) -> str:
    """Run a command of this environment in ``project``; its output, after checking its exit status."""
    env = env or environment()
    done = subprocess.run(words, cwd=project, env=env, text=True, capture_output=True, check=False)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, output
    return output


def started(output: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", output)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but times, which another execution measures anew."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "latencies.html"]
    kept = [path.relative_to(folder) for path in files if "timings" not in path.parts]
    return {str(path): (folder / path).read_bytes() for path in kept}


def hashes(project: Path, *folders: str) -> dict[str, str]:
    """Of every file of some folders, as :func:`contents`: a difference is told by its name."""
    found = {f"{folder}/{name}": held for folder in folders for name, held in contents(project / folder).items()}
    return {name: hashlib.sha256(held).hexdigest() for name, held in found.items()}


def commit(project: Path, message: str) -> None:
    command(project, "git", "add", "--all")
    command(project, "git", "commit", "--quiet", "--message", message)


def copied(folder: Path) -> Path:
    """The project as a clone of it would be, under git and DVC."""
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("notebooks", "conf"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (folder / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, folder / ".dvc")
    command(folder, "git", "init", "--quiet")
    command(folder, "git", "config", "user.name", "someone")
    command(folder, "git", "config", "user.email", "someone@localhost")
    commit(folder, "a clone")
    return folder


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory) -> Path:
    """A copy of the project with the shrunken study in place, and every stage run."""
    folder = copied(tmp_path_factory.mktemp("project"))
    write_params(folder, STUDY)
    output = command(folder, "dvc", "repro")
    assert started(output)[0] == "check"
    return folder


README = (ROOT / "README.md").read_text().split("### Your own images")[1].split("\n## ")[0]
COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
EACH = 20
QUICKER = [
    "runs.folder_resnet20.train.epochs=10",
    "+runs.folder_resnet20.train.batch_size=12",
    "runs.folder_resnet20.finetune.epochs=2",
    "decompose.sweep_points=2",
    "threads=1",
]


def picture(colour: Sequence[float], size: Sequence[int], draw: np.random.Generator) -> Image.Image:
    """A plain colour under noise, of this height and width."""
    pixels = np.array(colour) + draw.normal(0, 25, (*size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def own_images(folder: Path) -> None:
    """Three classes of 20 images, PNG and JPEG; one image is grey-scale, one transparent."""
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(EACH):
            image = picture(colour, draw.integers(40, 130, 2), draw)
            if (name, i) == ("blue", 0):
                image = image.convert("L")
            if (name, i) == ("red", 0):
                image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(folder / name / (f"{i}.jpg" if i % 2 else f"{i}.png"))


@pytest.fixture(scope="session")
def folder_study(tiny_project) -> tuple[list[str], set[str]]:
    """What the README says, done beside the shrunken study: images, a study file, a command.

    The stages that ran, and what git then sees as new or changed: the folders and files of conf/ and reports/.
    """
    where = re.search(r"dataset: ([\w/]+)", README)[1]
    own_images(tiny_project / where / "train")
    file, block = re.search(r"`(conf/study/\w+\.yaml)`.*?```yaml\n(.*?)```", README, re.DOTALL).groups()
    assert len(block.splitlines()) == 5
    commit(tiny_project, "one study")
    before = hashes(tiny_project, "reports/tiny", "data/tiny")
    (tiny_project / file).write_text(block)
    (study,) = re.findall(r"`make repro STUDY=(\w+)`", README)
    pipeline, params = f"reports/{study}/dvc.yaml", f"reports/{study}/params.yaml"
    # As make does, and then `dvc repro` of it.
    assert f"dvc repro {pipeline}" in command(tiny_project, "utilized-rank", "study", study)
    quicker = [word for change in QUICKER for word in ("--set-param", f"{params}:{change}")]
    output = command(tiny_project, "dvc", "exp", "run", pipeline, *quicker)
    # One image of the 12 in the search split is 8.3 points: the default tolerances are finer.
    assert "tolerances are 8.34 points in place of 1 and 2: one of the 12 search images is worth 8.33" in output
    assert hashes(tiny_project, "reports/tiny", "data/tiny") == before
    new = command(tiny_project, "git", "status", "--short", "--untracked-files=all").splitlines()
    changed = {line[3:].split("/")[1] for line in new}
    return [name.partition("dvc.yaml:")[2] for name in started(output)], changed


def typed(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["utilized-rank", *words])
        try:
            cli.entry()
        except SystemExit as left:
            return left.code or 0
    return 0


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines of standard error but progress bars."""
        return [line for line in re.split(r"[\r\n]+", self.err) if line.strip() and not re.search(r"%\||\d \[\d", line)]


Call = Callable[..., Ended]


@pytest.fixture
def call(place, monkeypatch, capsys) -> Call:
    """Run the command in this process, in ``place``, which each file of tests has its own of."""
    monkeypatch.chdir(place)

    def called(*words: object) -> Ended:
        capsys.readouterr()
        return Ended(typed([*map(str, words)]), *capsys.readouterr())

    return called


def done(ended: Ended) -> str:
    assert ended.code == 0, ended.err
    return ended.out


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts}


def refused(ended: Ended) -> str:
    """The one line that a mistake ends in."""
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert "written" not in ended.out
    (line,) = ended.said
    return line
