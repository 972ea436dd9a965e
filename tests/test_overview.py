import re
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from committed import AS_DRAWN
from matplotlib import pyplot as plt
from written import library_apart, reports

from utilized_rank.base.files import read_table
from utilized_rank.report import overview, tables
from utilized_rank.report.figures import study as figures
from utilized_rank.report.figures import style
from utilized_rank.report.overview import NOT_UPHELD, UNTESTABLE, UPHELD, Study

ROOT = Path(__file__).parents[1]
FRACTION, IMAGENET, HALF, LINEAR, TUNED, RISES = (
    "Trained networks use a fraction",
    "ViT-B/16 on ImageNet",
    "Half of the parameters",
    "of a frozen encoder",
    "after fine-tuning on the labels",
    "It rises up to 70%",
)
PROBE = "SimCLR (self-supervised), linear probe"


@pytest.fixture
def styled():
    """The style of every page's figures, for one test."""
    with mpl.rc_context():
        style.use()
        yield
    plt.close("all")


def network(*mlu: float, training: str = "supervised", kept: float = 0.4, change: float = 0.0, low: float = -1.0):
    """One run of a summary: its utilization at tolerances 0.1, 1, ..., and one decomposed network."""
    epsilons = ["0.1", "1", "10"][: len(mlu)]
    made = {"parameters_kept": kept, "flops_kept": kept, "change": change, "change_low": low, "change_high": 1.0}
    return {
        "label": "network",
        "training": training,
        "supervision": "self-supervised" if training == PROBE else "supervised",
        "test_accuracy": 90.0,
        "mlu": dict(zip(epsilons, mlu, strict=True)),
        "finetuned": {"1": made},
    }


def either(*changes: float) -> dict:
    """A network that was cut to half at several tolerances, with these changes."""
    made = [network(0.4, kept=0.5, change=change)["finetuned"]["1"] for change in changes]
    return network(0.4) | {"finetuned": {f"{i}": one for i, one in enumerate(made)}}


def study(*networks: dict, name: str = "toy", compared: dict[str, float] | None = None) -> Study:
    """A study of these networks, and where given one comparison: the utilization of each kind of training."""
    kinds = [{"comparison": "vit", "epsilon": 1.0, "kind": kind, "mlu": mlu} for kind, mlu in (compared or {}).items()]
    runs = dict(zip("abcdef", networks, strict=False))
    return Study(name, name, runs, pd.DataFrame(kinds))


def imagenet(b16: tuple[float, ...], l16: tuple[float, ...]) -> Study:
    runs = {"imagenet_vit_b16": network(*b16), "imagenet_vit_l16": network(*l16)}
    return Study("imagenet", "ImageNet", runs, pd.DataFrame())


def compared(linear: float, finetuned: float) -> Study:
    mlu = {"supervised": 0.4, "linear": linear, "finetuned": finetuned}
    return study(network(0.5, 0.4), network(0.6, linear, training=PROBE), compared=mlu)


def claim(found: list[Study], words: str) -> tuple[str, str]:
    """What was measured, and the verdict, of the claim that has these words."""
    table = overview.claims(found)
    (row,) = table[table["the paper's abstract"].str.contains(words, regex=False)].itertuples()
    return row[2], row.verdict


@pytest.mark.parametrize(
    ("found", "words", "verdict"),
    [
        pytest.param([study(network(0.6, 0.49), network(0.3, 0.2))], FRACTION, UPHELD, id="each below half"),
        pytest.param([study(network(0.6, 0.5), network(0.3, 0.2))], FRACTION, NOT_UPHELD, id="one at half"),
        pytest.param([study(network(0.4)), study(network(0.9), name="b")], FRACTION, NOT_UPHELD, id="in one study"),
        pytest.param([study(network(0.4))], IMAGENET, UNTESTABLE, id="no ImageNet"),
        pytest.param([imagenet((0.6, 0.39, 0.2), (0.5, 0.16, 0.1))], IMAGENET, UPHELD, id="near at some tolerance"),
        pytest.param([imagenet((0.6, 0.41, 0.29), (0.2,))], IMAGENET, NOT_UPHELD, id="ViT-B never near"),
        pytest.param([imagenet((0.35,), (0.26, 0.14))], IMAGENET, NOT_UPHELD, id="ViT-L never near"),
        pytest.param([study(network(0.4, kept=0.5, change=-0.19))], HALF, UPHELD, id="half, at little loss"),
        pytest.param([study(network(0.4, kept=0.5, change=-0.2))], HALF, NOT_UPHELD, id="half, at the loss named"),
        pytest.param(
            [study(network(0.4, change=0.3), network(0.4, change=-3))], HALF, NOT_UPHELD, id="one network loses more"
        ),
        pytest.param(
            [study(network(0.4), network(0.4, kept=0.6, change=-3))], HALF, UPHELD, id="more than half is not asked for"
        ),
        pytest.param([study(network(0.4, kept=0.51))], HALF, UNTESTABLE, id="none is cut to half"),
        pytest.param([study(either(-3.0, -0.1))], HALF, UPHELD, id="at one tolerance of two"),
        pytest.param([study(either(-3.0, -0.3))], HALF, NOT_UPHELD, id="at neither tolerance"),
        pytest.param([compared(0.41, 0.3)], LINEAR, UPHELD, id="probe above labels"),
        pytest.param([compared(0.41, 0.3)], TUNED, NOT_UPHELD, id="tuned below labels"),
        pytest.param([compared(0.4, 0.5)], LINEAR, NOT_UPHELD, id="probe at labels"),
        pytest.param([compared(0.4, 0.5)], TUNED, UPHELD, id="tuned above labels"),
        pytest.param([compared(0.41, 0.3), compared(0.39, 0.5)], LINEAR, NOT_UPHELD, id="in one of two studies"),
        pytest.param([compared(0.7, 0.3)], RISES, UPHELD, id="as high as the paper"),
        pytest.param([compared(0.69, 0.3)], RISES, NOT_UPHELD, id="never as high"),
        pytest.param([study(network(0.4, 0.3))], LINEAR, UNTESTABLE, id="no comparison, linear"),
        pytest.param([study(network(0.4, 0.3))], TUNED, UNTESTABLE, id="no comparison, tuned"),
        pytest.param([study(network(0.4, 0.3))], RISES, UNTESTABLE, id="no comparison, rise"),
    ],
)
def test_a_verdict_follows_from_the_summaries(found, words, verdict):
    assert claim(found, words)[1] == verdict


def test_labels_make_a_network_supervised_whoever_trained_it():
    """A public checkpoint that was trained with labels says nothing of self-supervision."""
    given = network(0.9, 0.8, training="public checkpoint (supervised), as given")
    probe = network(0.5, 0.4, training=PROBE)
    assert overview.utilizations([study(given, probe)]).supervised.tolist() == [True, True, False, False]
    found = [study(network(0.4, 0.3), given, probe)]
    assert claim(found, FRACTION)[1] == NOT_UPHELD
    assert claim(found, RISES)[1] == NOT_UPHELD


def test_every_network_counts_however_loose_the_tolerances_of_another_study():
    found = [study(network(0.9, 0.8), network(0.4, 0.3)), study(network(0.4, 0.3, 0.2), name="loose")]
    measured, verdict = claim(found, FRACTION)
    assert "of 3 networks" in measured
    assert verdict == NOT_UPHELD


def test_what_was_measured_is_said_in_counts():
    cheap, sure, dear = network(0.4, change=0, low=-1), network(0.4, change=0, low=-0.1), network(0.4, change=-2)
    found = [study(cheap, sure), study(dear, network(0.4, kept=0.9), name="other")]
    measured, _ = claim(found, HALF)
    assert "3 of 4 networks were cut to half" in measured
    assert "2 of them lost less than 0.2 points" in measured
    assert "1 with a 95% interval" in measured
    assert "in 1 of 2 networks" in claim([compared(0.5, 0.5), compared(0.3, 0.5)], LINEAR)[0]


def test_utilizations_have_a_row_for_every_network_and_tolerance():
    found = [study(network(0.6, 0.5), network(0.4, training=PROBE)), study(network(0.3), name="other")]
    table = overview.utilizations(found)
    assert table[["study", "epsilon", "mlu"]].to_records(index=False).tolist() == [
        ("toy", 0.1, 0.6),
        ("toy", 1.0, 0.5),
        ("toy", 0.1, 0.4),
        ("other", 0.1, 0.3),
    ]
    assert table.supervised.tolist() == [True, True, False, True]


@pytest.mark.parametrize("count", [1, 6, 9])
def test_the_figure_has_a_mark_for_every_network_and_tolerance_in_a_colour_of_its_own(styled, count):
    """However many tolerances the studies have between them."""
    epsilons = np.linspace(0.1, 5, count)
    about = {"study": "toy", "title": "Toy", "training": "supervised", "accuracy": 90.0}
    used = pd.DataFrame(
        [
            about | {"network": name, "epsilon": epsilon, "mlu": top / (1 + epsilon)}
            for name, top in (("ViT", 0.5), ("VGG11", 0.9))
            for epsilon in epsilons
        ]
    )
    axes = figures.overview(used).axes[0]
    marks = np.concatenate([mark.get_offsets() for mark in axes.collections])
    named = [tick.get_text().partition(" ")[0] for tick in axes.get_yticklabels()]
    expected = zip(100 * used.mlu, [named.index(network) for network in used.network], strict=True)
    np.testing.assert_allclose(np.array(sorted(marks.tolist())), np.array(sorted(expected)))
    colours = {tuple(colour) for mark in axes.collections for colour in mark.get_facecolor()}
    assert len(colours) == count


def test_the_overview_reads_every_study_and_links_it(studied, styled):
    made, store = studied
    folder = reports(made, store, {"toy": "<Toys> & more", "another": "Another"})
    for name in ("toy", "another"):
        (folder / name / "index.html").write_text("a page")
    page = library_apart((folder / "index.html").read_text())[0]
    assert "&lt;Toys&gt; &amp; more</a>, 5 networks" in page
    links = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert {"another/index.html", "toy/index.html", "utilization.svg", "claims.csv"} <= set(links)
    assert all((folder / link).is_file() for link in links)
    found = overview.studies(store.root)
    assert [one.title for one in found] == ["Another", "<Toys> & more"]
    pd.testing.assert_frame_equal(read_table(folder / "claims.csv"), overview.claims(found))
    for row in read_table(folder / "utilization.csv").itertuples():
        key = next(key for key, run in made.runs.items() if run.label == row.network)
        assert row.mlu == pytest.approx(tables.result(store, "measure", key)["mlu"][f"{row.epsilon:g}"])


@AS_DRAWN
def test_the_committed_overview_follows_from_the_committed_reports(tmp_path, styled):
    names = ("index.html", "utilization.svg", "utilization.csv", "claims.csv")
    shutil.copytree(ROOT / "reports", tmp_path / "reports", ignore=shutil.ignore_patterns("notebooks", *names[1:]))
    overview.write(tmp_path)
    made, committed = ((root / "reports" / "index.html").read_text() for root in (tmp_path, ROOT))
    assert library_apart(made)[0] == library_apart(committed)[0]
    for name in names[1:]:
        assert (tmp_path / "reports" / name).read_bytes() == (ROOT / "reports" / name).read_bytes(), name


def test_the_committed_overview_has_every_committed_study():
    page = (ROOT / "reports" / "index.html").read_text()
    for path in ROOT.glob("reports/*/summary.json"):
        assert f'href="{path.parent.name}/index.html"' in page
