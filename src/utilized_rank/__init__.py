"""How much of its space does each layer of a trained network use?

A library to measure and use it (``networks``, ``ranks``, ``compression``), and above it the study of trained networks.
"""


def command() -> None:
    """The command ``utilized-rank``; where the study's packages are not installed, say so in one line."""
    try:
        from .cli import entry
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'utilized-rank[study]' brings it") from None
    entry()
