"""A smaller network in a folder: its weights, its form, and how to load it without this package."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..networks import modules
from ..networks.exchange import undisturbed
from .given import InputError

NAMES = {"params": "parameters", "flops": "FLOPs", "latency": "latency"}
"""Of what a budget limits, in prose."""
RECORD = "utilized_rank"
"""The attribute of a smaller network that says what was done."""
WEIGHTS, LAYERS, DONE, ABOUT = "network.safetensors", "layers.json", "compression.json", "README.md"
ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.Conv2d: (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
        "padding_mode",
    ),
    nn.ZeroPad2d: ("padding",),
    modules.Attention: ("width", "heads", "bias", "dropout", "batch_first"),
    modules.SamePad: ("kernel", "stride", "dilation"),
}
"""Modules that may stand in place of others, and what each is made from."""
KINDS = {kind.__name__: kind for kind in ARGUMENTS}
Part = list[Any]
"""A module: its kind, and what it is made from, by name; of an ``nn.Sequential``, its parts by name."""
LOADING = """\
import json
from collections import OrderedDict
from safetensors.torch import load_file
from torch import nn
{imports}
network = {network}

def made(kind, how):
    if kind == "Sequential":
        return nn.Sequential(OrderedDict((name, made(*part)) for name, part in how.items()))
    return getattr({place}, kind)(**how)

new = {{}}  # a module under two names stays one
for name, part in json.load(open("layers.json")).items():
    network.set_submodule(name, new.setdefault(network.get_submodule(name), made(*part)))
network.load_state_dict(load_file("network.safetensors"))
network.eval()
"""


def save(
    small: nn.Module,
    folder: str | Path,
    *,
    network: str = "...  # the original network, of any weights",
    imports: str = "",
    sources: tuple[Path, ...] = (),
    about: str = "",
) -> Path:
    """Write what :func:`utilized_rank.compress` made (trained on since, or not) into a new folder.

    Args:
        small: the network.
        folder: is made; nothing may be in it.
        network: the Python expression that makes the original, for the folder's README.
        imports: what that expression needs.
        sources: Python files that are copied into the folder, for it to import.
        about: what else the README says, as Markdown.

    Returns:
        The folder.

    Raises:
        InputError: the network was not made by ``compress``, or the folder has something in it.
    """
    if not isinstance(getattr(small, RECORD, None), dict):
        raise InputError("save takes what utilized_rank.compress gives: this network has no record of it")
    folder = Path(folder)
    with new_folder(folder) as partial:
        write(small, partial, network, imports, sources, about)
    return folder


def write(small: nn.Module, folder: Path, network: str, imports: str, sources: tuple[Path, ...], about: str) -> None:
    """Write the files of :func:`save` into a folder that is there; arguments as of that."""
    done = getattr(small, RECORD)
    # A module under two names has its tensors twice in the file: safetensors takes no shared memory.
    tensors = {name: its.detach().cpu().clone().contiguous() for name, its in small.state_dict().items()}
    try:
        save_file(tensors, folder / WEIGHTS)
    except SafetensorError as error:
        raise OSError(f"{WEIGHTS} cannot be written ({error})") from None
    (folder / WEIGHTS).chmod(0o644)
    _write_json(folder / LAYERS, done["layers"])
    its_hash = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    _write_json(folder / DONE, {key: value for key, value in done.items() if key != "layers"} | {"sha256": its_hash})
    own = _own_kinds(done["layers"])
    for source in (*sources, *([Path(inspect.getfile(modules))] if own else [])):
        shutil.copy(source, folder)
    imports = "\n".join(filter(None, [imports, "import modules" if own else ""]))
    place = "modules if hasattr(modules, kind) else nn" if own else "nn"
    code = LOADING.format(imports=imports, network=network, place=place)
    (folder / ABOUT).write_text(_readme(done, code, about), encoding="utf-8")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``folder``; move it there when the block ends well, else drop it.

    Raises:
        InputError: ``folder`` has something in it.
    """
    check_free(folder)
    missing = [its for its in folder.parents if not its.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            partial = Path(name, folder.name)
            partial.mkdir()
            yield partial
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
    finally:
        for its in missing:
            with suppress(OSError):  # the folder is in it
                its.rmdir()


def check_free(folder: Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        InputError: it has, or no folder can be made there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: name another, or empty it")
    above = next(its for its in folder.absolute().parents if its.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder} cannot be made: {above} is no folder, or cannot be written to")


def load(folder: str | Path, network: nn.Module) -> nn.Module:
    """A copy of ``network`` in the form and with the weights that :func:`save` wrote, in evaluation mode.

    Args:
        folder: that was written.
        network: as the one that was made smaller; never changed, and of any weights.

    Raises:
        InputError: the folder is none, or of another network.
    """
    folder = Path(folder)
    try:
        layers, done = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (LAYERS, DONE))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} is no folder of a smaller network ({error})") from None
    small = copy.deepcopy(network)
    new: dict[nn.Module, nn.Module] = {}  # a module under two names stays one
    try:
        with undisturbed(small):  # layers are made with random weights
            for name, part in layers.items():
                old = small.get_submodule(name)
                small.set_submodule(name, new.setdefault(old, _like(old, made(*part))))
        small.load_state_dict(tensors)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        why = "; ".join(textwrap.shorten(line, 200, placeholder=" ...") for line in str(error).splitlines()[:3])
        raise InputError(f"{folder} is of another network than {type(network).__name__}: {why}") from None
    done.pop("sha256", None)  # of that file, not of the network
    setattr(small, RECORD, {**done, "layers": layers})
    return small.eval()


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    """The same ``new``, on the device and in the type of ``old``, and frozen where that is."""
    its = next(old.parameters(), None)
    return new if its is None else new.to(its).requires_grad_(its.requires_grad)


def different(given: nn.Module, other: nn.Module) -> Iterator[str]:
    """Names of the outermost modules of ``other`` that are not as those of ``given``."""
    for name, child in other._modules.items():  # also of a module under a second name
        old = given._modules.get(name)
        if child is None:
            continue
        if old is None or not _alike(old, child):
            yield name
        else:
            yield from (f"{name}.{below}" for below in different(old, child))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    return type(one) is type(other) and (one._parameters.keys(), one._buffers.keys(), one._modules.keys()) == (
        other._parameters.keys(),
        other._buffers.keys(),
        other._modules.keys(),
    )


def layers_of(given: nn.Module, small: nn.Module) -> dict[str, Part]:
    """What has to be put into ``given``, in this order, for it to have the form of ``small``."""
    found: dict[str, Part] = {}
    for name in different(given, small):
        module = small.get_submodule(name)
        found[name] = _part(module)
        found |= {f"{name}.{below}": part for below, part in layers_of(made(*found[name]), module).items()}
    return found


def _part(module: nn.Module) -> Part:
    if type(module) is nn.Sequential:
        return ["Sequential", {name: _part(child) for name, child in module.named_children()}]
    how = {name: getattr(module, name) for name in ARGUMENTS[type(module)]}
    if "bias" in how:
        how["bias"] = how["bias"] is not None and how["bias"] is not False
    return [type(module).__name__, how]


def made(kind: str, how: dict[str, Any]) -> nn.Module:
    """A module, as the README's lines make it.

    Raises:
        ValueError: of a kind that stands in place of no other.
    """
    if kind == "Sequential":
        return nn.Sequential(OrderedDict((name, made(*part)) for name, part in how.items()))
    if kind not in KINDS:
        raise ValueError(f"no layer is made of a {kind!r}")
    return KINDS[kind](**how)


def _own_kinds(layers: dict[str, Part]) -> bool:
    """Whether there are modules that torch.nn has not."""

    def kinds(part: Part) -> Iterator[str]:
        kind, how = part
        yield kind
        if kind == "Sequential":
            for child in how.values():
                yield from kinds(child)

    return any(not hasattr(nn, kind) for part in layers.values() for kind in kinds(part))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _readme(done: dict[str, Any], code: str, about: str) -> str:
    (kind, amount), ranks = next(iter(done["budget"].items())), done["ranks"]
    asked = f"within {amount:g} of the score" if kind == "epsilon" else f"to {amount:.0%} of the {NAMES[kind]}"
    costs = {NAMES[name]: done[key] for name, key in (("params", "parameters"), ("flops", "flops"))}
    rows = [f"| {name} | {before:,} | {after:,} | {after / before:.1%} |" for name, (before, after) in costs.items()]
    return "\n".join(
        [
            "# A smaller network",
            "",
            f"{len(ranks)} layers are two each, by the method `{done['method']}`, {asked}: their ranks are in "
            f"`{DONE}`, the layers that stand in place of others in `{LAYERS}`, the weights in `{WEIGHTS}`.",
            "",
            "| | before | after | kept |",
            "|---|---|---|---|",
            *rows,
            *(["", about] if about else []),
            "",
            "## Load it",
            "",
            "In this folder, with torch and safetensors alone:",
            "",
            "```python",
            code.rstrip(),
            "```",
            "",
        ]
    )
