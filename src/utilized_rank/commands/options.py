"""The commands for a network of one's own, as they are typed: see the other modules for what they do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MODELS = "timm/NAME, torchvision/NAME, resnet20 (32, 44, 56, 110), vgg11, or package.module:function"
FOLDER = "a folder with a directory of images for each class; or train/ and test/ with such"
SEARCHED = "which ranks are searched; predicted: none, soon, with a range"
MADE_OF = "what it was made of, where the folder does not say, or says package.module:function"
TRIPLE = "of each channel, in [0, 1], such as 0.485,0.456,0.406"
Model = Annotated[str, typer.Argument(help=MODELS)]
Images = Annotated[Path, typer.Option("--data", help=FOLDER)]
Checkpoint = Annotated[Path | None, typer.Option(help="a file of weights; published ones without it")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Calibration = Annotated[int, typer.Option("--images", min=2, help="calibration images")]
HeldOut = Annotated[int, typer.Option("--held-out", min=2, help="images that accuracy is taken on, at most")]
Side = Annotated[int | None, typer.Option("--image-size", min=8, help="pixels on a side, if not the network's own")]
Crop = Annotated[float | None, typer.Option(min=0.1, max=1, help="part of the shorter side that is kept")]
Channels = Annotated[str | None, typer.Option(help=TRIPLE)]
Part = Annotated[float | None, typer.Option(help="part of these that may remain, such as 0.5")]
Tolerated = Annotated[float | None, typer.Option(min=0, help="search ranks: tolerated loss, points of accuracy")]
Energy = Annotated[float | None, typer.Option(help="no search, no labels: part of the variance to hold (0.99)")]
Within = Annotated[float | None, typer.Option(min=0, help="the smallest network within so many points of accuracy")]
Criterion = Annotated[Literal["rank", "utilized", "energy", "predicted"], typer.Option(help=SEARCHED)]
Precision = Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="of the search")]
Method = Annotated[Literal["compensated", "optimal", "svd", "projection"], typer.Option(help="of the weights")]
Epochs = Annotated[int, typer.Option(min=0, help="train it on, on the training images")]
NETWORKS = "Networks of your own"


def _prepared(side: int | None, crop: float | None, mean: str | None, std: str | None) -> dict[str, Any]:
    """What of the images' preparation is not the network's own."""
    from ..base.sections import StudyError

    def numbers(text: str, option: str) -> tuple[float, ...]:
        try:
            found = tuple(float(part) for part in text.split(","))
        except ValueError:
            found = ()
        if len(found) != 3 or not all(map(math.isfinite, found)) or (option == "--std" and min(found) <= 0):
            raise StudyError(f"{option} {text}: it takes three numbers apart by commas, such as 0.485,0.456,0.406")
        return found

    given = {
        "side": side,
        "crop": crop,
        "mean": None if mean is None else numbers(mean, "--mean"),
        "std": None if std is None else numbers(std, "--std"),
    }
    return {name: value for name, value in given.items() if value is not None}


def measure(
    model: Model,
    data: Images,
    checkpoint: Checkpoint = None,
    epsilon: Tolerated = None,
    energy: Energy = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="a new folder for utilization.json, .csv and .svg")] = None,
    images: Calibration = 2000,
    held_out: HeldOut = 5000,
    criterion: Criterion = "rank",
    precision: Precision = "float32",
    image_size: Side = None,
    crop: Crop = None,
    mean: Channels = None,
    std: Channels = None,
) -> None:
    """How much of its space does each layer of a network use?

    Example: utilized-rank measure torchvision/resnet50 --data my/photos --energy 0.99
    """
    from ..base.runtime import device as found
    from .measuring import measure as measured

    prepared = _prepared(image_size, crop, mean, std)
    if epsilon is None and energy is None:
        energy = 0.99
    text = measured(
        model, data, checkpoint, out, found(device), prepared, epsilon, energy, images, held_out, criterion, precision
    )
    typer.echo(text)


def compress(
    model: Model,
    data: Images,
    out: Annotated[Path, typer.Option(help="a new folder")],
    checkpoint: Checkpoint = None,
    params: Part = None,
    flops: Part = None,
    latency: Part = None,
    epsilon: Within = None,
    method: Method = "compensated",
    finetune_epochs: Epochs = 0,
    lr: Annotated[float, typer.Option(help="learning rate of that")] = 1e-3,
    device: Device = None,
    images: Calibration = 1000,
    held_out: HeldOut = 10_000,
    onnx: Annotated[bool, typer.Option("--onnx", help="write network.onnx, too")] = False,
    export: Annotated[bool, typer.Option("--export", help="write network.pt2 (torch.export), too")] = False,
    image_size: Side = None,
    crop: Crop = None,
    mean: Channels = None,
    std: Channels = None,
) -> None:
    """Make a network smaller: two layers in place of one, wherever it can spare them.

    Example: utilized-rank compress resnet56 --checkpoint resnet56.th --data my/cifar10 --params 0.5 --out small
    """
    from ..base.runtime import device as found
    from .compressing import smaller

    text = smaller(
        model,
        data,
        checkpoint,
        out,
        found(device),
        _prepared(image_size, crop, mean, std),
        {"params": params, "flops": flops, "latency": latency, "epsilon": epsilon},
        method,
        finetune_epochs,
        lr,
        images,
        held_out,
        onnx,
        export,
    )
    typer.echo(text)


def compare(
    first: Annotated[Path, typer.Argument(help="a folder that `measure --out` wrote")],
    second: Annotated[Path, typer.Argument(help="another")],
    out: Annotated[Path | None, typer.Option(help="a figure of both, an SVG file")] = None,
) -> None:
    """Two networks' utilization side by side, with RankMe.

    Example: utilized-rank compare measured/supervised measured/dino --out both.svg
    """
    from .measuring import compare as compared

    typer.echo(compared(first, second, out))


def load(
    folder: Annotated[Path, typer.Argument(help="a folder that `compress` wrote")],
    data: Annotated[Path | None, typer.Option(help="the same images: its accuracy is taken again")] = None,
    model: Annotated[str | None, typer.Option(help=MADE_OF)] = None,
    device: Device = None,
) -> None:
    """Check a folder: does it load, and is it as accurate as it says?

    Example: utilized-rank load small --data my/cifar10
    """
    from ..base.runtime import device as found
    from .compressing import checked

    typer.echo(checked(folder, model, data, found(device)))


def doctor() -> None:
    """What this machine offers: devices, precision, threads, versions, caches.

    Example: utilized-rank doctor
    """
    from .doctor import report

    typer.echo(report())


def add_to(app: typer.Typer) -> None:
    """Make them commands of ``app``."""
    for command in (measure, compress, compare, load, doctor):
        app.command(rich_help_panel=NETWORKS)(command)
