"""The command ``utilized-rank``: what the DVC stages call."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .config import StudyError, composed, load_study, project_root

# jsonschema, which reading a notebook imports, would spend a second on the grammar of internationalised
# addresses. No notebook has one, and every stage would pay.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Measure the utilized rank of trained networks (the stages of the study, as DVC runs them)."""


@app.command()
def check() -> None:
    """Check params.yaml, strip the notebooks, and drop results of runs that left the study."""
    from .notebooks import prune, strip_all

    root = project_root()
    study = load_study(root)
    strip_all(root)
    for path in prune(study, root):
        typer.echo(f"removed {path.relative_to(root)}: its run is no longer in study {study.name}")


@app.command()
def plan(
    name: Annotated[str | None, typer.Argument(help="a study of conf/study; that of params.yaml by default")] = None,
) -> None:
    """Print what a study will take, before anything runs."""
    from .plan import plan as planned
    from .plan import text

    root = project_root()
    study = load_study(root) if name is None else composed(name, root)
    typer.echo(f"study {study.name}: {study.title}")
    typer.echo(text(planned(study, root)))


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="prepare, pretrain, train, measure, ...")],
    key: Annotated[str | None, typer.Argument(help="the run, encoder or comparison that it is for")] = None,
) -> None:
    """Execute the notebook of one stage."""
    root = project_root()
    study = load_study(root)
    from .notebooks import STAGES, execute

    if name not in STAGES:
        raise StudyError(f"there is no stage {name!r} (known: {', '.join(STAGES)})")
    execute(root, study, name, key)


def entry() -> None:
    """Run the command; a user's mistake ends in its message and exit status 1."""
    try:
        app()
    except StudyError as error:
        typer.secho(str(error), fg=typer.colors.RED, err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    entry()
