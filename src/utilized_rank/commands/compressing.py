"""The commands ``compress`` and ``load``."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..api.compressing import Method, compress
from ..api.folders import DONE, RECORD, WEIGHTS, check_free, load, new_folder, write
from ..api.given import InputError, line
from ..base.files import file_hash
from ..base.sections import StudyError
from ..datasets.data import Dataset
from ..networks import cost
from ..networks.evaluation import Labelled, is_correct, outputs
from ..networks.intervals import paired_change
from ..training.loop import finetune
from ..training.sections import Finetune
from .folder import SEED, images, provenance
from .models import Named, check_classes, named

TOGETHER = 64
"""Images at a time, where latency is measured."""
SAME = 1e-4
"""How far an exported network may be off, over the largest output."""
ONNX, EXPORTED = "network.onnx", "network.pt2"


def smaller(
    model: str,
    folder: Path,
    checkpoint: Path | None,
    out: Path,
    device: torch.device,
    prepared: dict[str, Any],
    budget: dict[str, float | None],
    method: Method,
    epochs: int,
    lr: float,
    calibration: int,
    held_out: int,
    onnx: bool,
    exported: bool,
) -> str:
    """Make a named network smaller, on a folder of images, into another folder; returns what the terminal shows.

    Args:
        model: as of :func:`.models.named`, like ``checkpoint`` and ``prepared``.
        folder: of images.
        checkpoint: of weights.
        out: is made.
        device: where all is computed.
        prepared: how images are prepared, where not as the network says.
        budget: one of ``params``, ``flops``, ``latency`` and ``epsilon`` has a value.
        method: of the weights.
        epochs: of fine-tuning; none where it is 0.
        lr: of that.
        calibration: images that weights are fitted to.
        held_out: images that accuracy is taken on.
        onnx: write an ONNX file, too.
        exported: write a file of ``torch.export``, too.

    Raises:
        StudyError: what was named cannot be made smaller, or not so small; or it was, but a further file cannot be
            written.
        InputError: likewise.
    """
    check_free(out)
    if not 0 < lr < math.inf:
        raise StudyError(f"--lr {lr:g} is no learning rate: it lies above 0")
    if onnx:
        _check_onnx()
    its = named(model, checkpoint, prepared)
    # Where something is chosen on held-out images, others are reported.
    halves = budget["epsilon"] is not None or epochs > 0
    train = None if epochs else calibration
    dataset = images(folder, its.preparation, device, train=train, held_out=held_out, halves=halves)
    network = its.network.to(device)
    check_classes(its, dataset.classes, folder)
    search = Labelled(dataset.inputs("search"), dataset.labels("search")) if budget["epsilon"] is not None else None
    small = compress(network, dataset.inputs("train", calibration), search=search, method=method, **cast(Any, budget))
    if epochs:
        recipe = Finetune(epochs=epochs, lr=lr, distillation=0.5)
        small = finetune(small, network, dataset, recipe, SEED, "finetune", "float32", "fine-tuning")[0].network.eval()
    done = getattr(small, RECORD)
    done["classes"] = len(dataset.classes)
    done["accuracy"] = _accuracy(network, small, dataset) | {"held_out": held_out, "halves": halves}
    done["latency"] = _latency(network, small, dataset)
    done["finetuned"] = {"epochs": epochs, "lr": lr, "distillation": 0.5} if epochs else None
    done["provenance"] = provenance(model, checkpoint, folder, its.preparation, device)
    sample, failed = dataset.inputs("test")[:2], []
    further = {"onnx": (onnx, _onnx, ONNX), "export": (exported, _exported, EXPORTED)}
    with new_folder(out) as partial:
        for kind, (is_asked, make, name) in further.items():
            try:
                done |= {kind: make(small, sample, partial / name)} if is_asked else {}
            except StudyError as error:  # what was computed is kept
                (partial / name).unlink(missing_ok=True)
                failed.append(str(error))
        write(small, partial, its.expression, its.imports, its.sources, about(done, its))
    if failed:
        raise StudyError(f"written: {out}, but {'; '.join(failed)}")
    return "\n".join([*_lines(done), f"written: {out}"])


def _accuracy(network: nn.Module, small: nn.Module, dataset: Dataset) -> dict[str, Any]:
    before, after = (is_correct(of, dataset.inputs("test"), dataset.labels("test")) for of in (network, small))
    change = paired_change(before, after)
    return {
        "images": len(before),
        "before": 100 * float(np.mean(before)),
        "after": 100 * float(np.mean(after)),
        "change": [change.points, change.low, change.high],
    }


def _latency(network: nn.Module, small: nn.Module, dataset: Dataset) -> dict[str, Any]:
    some = dataset.inputs("test")[:TOGETHER]
    before, after = cost.latencies([network, small], some, 1.0)
    return {"images": len(some), "before_ms": 1000 * before, "after_ms": 1000 * after}


def _check_onnx() -> None:
    """Refuse an ONNX file where its packages are not installed.

    Raises:
        StudyError: they are not.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise StudyError(f"--onnx needs {error.name}: pip install 'utilized-rank[export]'") from None


def _onnx(small: nn.Module, sample: Tensor, path: Path) -> dict[str, float]:
    """Write an ONNX file; returns how far it is off in onnxruntime.

    Raises:
        StudyError: it cannot be written, or does not compute the same.
    """
    import onnxruntime

    small, sample = copy.deepcopy(small).cpu(), sample.cpu()
    batch = torch.export.Dim("batch")
    try:
        torch.onnx.export(
            small, (sample,), str(path), dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False
        )
    except Exception as error:  # torch's exporter, on the network's own code
        raise StudyError(f"the network cannot be exported to ONNX: {line(error.__cause__ or error)}") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: sample.numpy()})[0]
    return {"off": _same(torch.from_numpy(found), small, sample, "the ONNX file")}


def _exported(small: nn.Module, sample: Tensor, path: Path) -> dict[str, float]:
    """Write a file of ``torch.export``; returns how far it is off.

    Raises:
        StudyError: the network cannot be exported, or does not compute the same.
    """
    small, sample = copy.deepcopy(small).cpu(), sample.cpu()
    try:
        program = torch.export.export(small, (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # torch's exporter, on the network's own code
        raise StudyError(f"the network cannot be exported: {line(error)}") from None
    torch.export.save(program, str(path))
    with torch.inference_mode():
        found = torch.export.load(str(path)).module()(sample)
    return {"off": _same(found, small, sample, "the exported network")}


def _same(found: Tensor, small: nn.Module, sample: Tensor, what: str) -> float:
    expected = outputs(small, sample)
    off = float((found - expected).abs().max() / expected.abs().max())
    if off > SAME:
        raise StudyError(f"{what} is off by {off:.1e} of the largest output: more than {SAME:g}")
    return off


def _lines(done: dict[str, Any]) -> list[str]:
    """What was done, in lines: parameters, FLOPs, accuracy and latency, before and after."""
    accuracy, latency = done["accuracy"], done["latency"]
    change, low, high = accuracy["change"]
    kept = {name: done[name][1] / done[name][0] for name in ("parameters", "flops")}
    trained = f", fine-tuned for {done['finetuned']['epochs']} epochs" if done["finetuned"] else ""
    return [
        f"parameters  {done['parameters'][0]:,} to {done['parameters'][1]:,} ({kept['parameters']:.1%})",
        f"FLOPs       {done['flops'][0]:,} to {done['flops'][1]:,} ({kept['flops']:.1%}), for one image",
        f"accuracy    {accuracy['before']:.2f} to {accuracy['after']:.2f}% of {accuracy['images']:,} images{trained}: "
        f"{change:+.2f} points, 95% interval [{low:+.2f}, {high:+.2f}]",
        f"latency     {latency['before_ms']:.1f} to {latency['after_ms']:.1f} ms for {latency['images']} images, here",
    ]


def about(done: dict[str, Any], its: Named) -> str:
    """What the folder's README says beside its own: accuracy with its interval, latency, images, other files."""
    how, origin = its.preparation, done["provenance"]
    lines = [f"Made of `{its.name}`. The interval is of paired differences (Agresti and Min 2005).", "", "```"]
    lines += [*_lines(done), "```", ""]
    lines += [
        f"Images: {how.side} x {how.side} pixels of the middle {how.crop:.1%} of the shorter side, "
        f"{how.interpolation}, scaled to [0, 1], less {tuple(how.mean)}, over {tuple(how.std)}.",
        f"On {origin['device']}, torch {origin['versions']['torch']}.",
    ]
    files = {"onnx": (ONNX, "onnxruntime"), "export": (EXPORTED, "torch.export")}
    lines += [
        f"`{file}`: the same for {by}, off by {done[kind]['off']:.0e} of the largest output at most."
        for kind, (file, by) in files.items()
        if kind in done
    ]
    return "\n".join(lines)


def checked(out: Path, model: str | None, folder: Path | None, device: torch.device) -> str:
    """Load a folder that ``compress`` wrote, and look whether it does what it says; returns what the terminal shows.

    Args:
        out: the folder.
        model: the network that it was made of; as the folder says where it is None.
        folder: of the same images, to take the accuracy on again; not done where it is None.
        device: where that is computed.

    Raises:
        StudyError: it does not, or cannot be loaded.
        InputError: likewise.
    """
    done = _done(out)
    origin = done.get("provenance", {})
    name = model or origin.get("model")
    if name is None:
        raise StudyError(f"{out} does not say what network it was made of: name it with --model")
    if model is None and ":" in name:
        raise StudyError(f"{out} was made of {name}, whose code would run: name it with --model if you trust it")
    its = named(name, None, origin.get("images", {}), done.get("classes", 1000))
    if "sha256" in done and file_hash(out / WEIGHTS) != done["sha256"]:
        raise StudyError(f"{out / WEIGHTS} is not the file that was written: its SHA-256 is another")
    small = load(out, its.network).to(device)
    held = cost.parameters(small)
    if held != done["parameters"][1]:
        raise StudyError(f"{out} says {done['parameters'][1]:,} parameters, and has {held:,}")
    lines = [f"{out}: {name} with {len(done['ranks'])} layers in two, {held:,} parameters: loads"]
    if folder is not None and "accuracy" in done:
        said = done["accuracy"]
        dataset = images(folder, its.preparation, device, train=0, held_out=said["held_out"], halves=said["halves"])
        right = is_correct(small, dataset.inputs("test"), dataset.labels("test"))
        found = 100 * float(np.mean(right))
        if abs(found - said["after"]) * len(right) > 50:
            raise StudyError(f"{out} says {said['after']:.2f}% accuracy, and has {found:.2f}% of {len(right):,} images")
        lines.append(f"accuracy {found:.2f}% of {len(right):,} images: as it says")
    return "\n".join(lines)


def _done(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out} is no folder of a smaller network ({error})") from None
    if not isinstance(found, dict) or not {"parameters", "ranks"} <= found.keys():
        raise InputError(f"{out} is no folder of a smaller network ({DONE} does not say what was done)")
    return found
