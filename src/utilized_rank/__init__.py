"""How much of its space does each layer of a trained network use?

``import utilized_rank as ur``: :func:`measure`, :func:`compress`, :func:`save` and :func:`load` are for a network of
one's own. Below them lies a library (``networks``, ``ranks``, ``compression``), above it the study of trained networks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api.compressing import compress
    from .api.folders import load, save
    from .api.given import InputError
    from .api.measuring import measure
    from .api.utilization import Utilization

__all__ = ["InputError", "Utilization", "compress", "load", "measure", "save"]
PLACES = {
    "InputError": "given",
    "Utilization": "utilization",
    "compress": "compressing",
    "load": "folders",
    "measure": "measuring",
    "save": "folders",
}


def __getattr__(name: str) -> Any:
    """What is exported, imported when it is first asked for: torch takes seconds."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".api.{PLACES[name]}", __name__), name)


def command() -> None:
    """The command ``utilized-rank``; where the study's packages are not installed, say so in one line."""
    try:
        from .cli import entry
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'utilized-rank[study]' brings it") from None
    entry()
