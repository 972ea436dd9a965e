"""The command ``utilized-rank``: for a network of one's own, and what the DVC stages call."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from .base.sections import StudyError
from .base.store import Store
from .commands.options import add_to
from .study.config import Study
from .study.homes import compose, known_studies, load_study, project_root, study_home
from .study.opened import open_study

# jsonschema, which reading a notebook imports, would spend a second on the grammar of internationalised
# addresses. No notebook has one, and every stage would pay.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """How much of its space does each layer of a network use? Measure it, make it smaller, or run the study."""


add_to(app)


STUDY = "The study, as DVC runs it"
StudyName = Annotated[
    str | None, typer.Option("--study", help="its name; by default the study around the working directory")
]


@app.command(rich_help_panel=STUDY)
def study(
    name: Annotated[str | None, typer.Argument(help="a study of conf/study; without it, they are listed")] = None,
) -> None:
    """Lay a study out, or compose its parameters anew after editing conf/."""
    from .stages.layout import lay_out

    root = project_root()
    if name is None:
        typer.echo("\n".join(known_studies(root)))
        return
    home, changes = lay_out(root, name)
    for change in changes:
        typer.echo(change)
    place = home.relative_to(root).as_posix()
    target, params = ("", "") if home == root else (f" {place}/dvc.yaml", f"{place}/params.yaml:")
    typer.echo(f"study {name}: {'the project itself' if home == root else place}")
    typer.echo(f"run it:      dvc repro{target}")
    typer.echo(f"an ablation: dvc exp run{target} -S {params}KEY=VALUE")
    if home != root:
        typer.echo(f"git first:   git add conf/study/{name}.yaml {place}  (experiments in a queue see what git knows)")


@app.command(rich_help_panel=STUDY)
def check(name: StudyName = None) -> None:
    """Check parameters, lock and cache of a study, strip the notebooks, and drop the results of runs that left."""
    from .stages import cache, lock
    from .stages.notebooks import prune, strip_all

    study, store = _opened(name)
    if mended := lock.mend(store.root / study.home):
        typer.echo(mended)
    for dropped in cache.drop_damaged(store.root, store.root / study.home):
        typer.echo(dropped)
    strip_all(store)
    for path in prune(study, store):
        typer.echo(f"removed {path.relative_to(store.root)}: its run is no longer in study {study.name}")


@app.command(rich_help_panel=STUDY)
def plan(
    name: Annotated[str | None, typer.Argument(help="a study of conf/study; the one laid out here by default")] = None,
    device: Annotated[str | None, typer.Option(help="say hours too: auto, cpu, cuda, cuda:1, mps")] = None,
) -> None:
    """Print what a study will take, before anything runs."""
    from .stages import hours
    from .stages.plan import plan as planned
    from .stages.plan import scale_of, text

    root = project_root()
    study = load_study(study_home(root)) if name is None else compose(name, root)[0]
    typer.echo(f"study {study.name}: {study.title}")
    table = planned(study, root)
    if device is not None:
        rates, known_by = hours.rates(study, scale_of(study, root), device, root)
        table = hours.with_hours(table, study, rates)
    typer.echo(text(table))
    if device is not None:
        typer.echo(f"hours: forward passes at the rate of {known_by}; reading images and everything else come on top")


@app.command(rich_help_panel=STUDY)
def stage(
    name: Annotated[str, typer.Argument(help="prepare, pretrain, train, measure, ...")],
    key: Annotated[str | None, typer.Argument(help="the run, encoder or comparison that it is for")] = None,
    of: StudyName = None,
) -> None:
    """Execute the notebook of one stage."""
    study, store = _opened(of)
    from .stages.notebooks import STAGES, execute

    if name not in STAGES:
        raise StudyError(f"there is no stage {name!r} (known: {', '.join(STAGES)})")
    execute(study, store, name, key)


@app.command(rich_help_panel=STUDY)
def publish(name: StudyName = None) -> None:
    """Put a study's pages into reports/, and write reports/index.html anew, which compares all studies there."""
    from .report import overview
    from .report import pages as report
    from .report.figures import style

    study, store = _opened(name)
    style.use()
    report.publish(study, store)
    overview.write(store.root)


@app.command(rich_help_panel=STUDY)
def verify(
    name: StudyName = None,
    against: Annotated[str, typer.Option(help="a revision of git")] = "HEAD",
) -> None:
    """Compare results of stages that ran here with the committed ones; exit status 1: one is beyond its tolerance."""
    from .report.verify import verify as verified

    found = verified(*open_study(name), against)
    typer.echo(found)
    raise typer.Exit(1 if found.beyond else 0)


cluster = typer.Typer(no_args_is_help=True, help="Many machines: where UTILIZED_RANK_ENGINE=ray runs a study's work.")
app.add_typer(cluster, name="cluster", rich_help_panel=STUDY)


@cluster.command()
def status(name: StudyName = None) -> None:
    """Say which engine, and which machines, a study would use."""
    from .stages.cluster import status as found

    typer.echo(found(open_study(name)[0].threads))


def _opened(name: str | None) -> tuple[Study, Store]:
    """A study that is run by the project's pipeline."""
    from .stages.layout import check_pipeline

    study, store = open_study(name)
    check_pipeline(store.root, store.root / study.home)
    return study, store


def entry() -> None:
    """Run the command; a user's mistake ends in its message and exit status 2."""
    try:
        app()
    except (StudyError, OSError, FloatingPointError) as error:
        _refuse(error)
    except ValueError as error:
        from .api.given import InputError  # torch takes seconds

        if not isinstance(error, InputError):
            raise
        _refuse(error)


def _refuse(error: Exception) -> NoReturn:
    typer.secho(str(error), fg=typer.colors.RED, err=True)
    raise SystemExit(2) from None


if __name__ == "__main__":
    entry()
