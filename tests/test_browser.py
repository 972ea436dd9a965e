"""The pages in a browser: Debian's Chromium, headless."""

import copy
import re
from contextlib import contextmanager

import matplotlib as mpl
import pytest
from conftest import PARAMETERS, toy_study
from written import index, reports

from utilized_rank.report import pages
from utilized_rank.report.figures import style

pytestmark = pytest.mark.browser
LAYERS, TOLERANCES, NETWORKS = 7, 2, 5
STUDY, OVERVIEW = "toy/index.html", "index.html"
BOTH = pytest.mark.parametrize("page", [STUDY, OVERVIEW], ids=["study", "overview"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of a study, of another one, and of both together; pictures beside them are small."""
    study, store = toy_study(tmp_path_factory.mktemp("site"), copy.deepcopy(PARAMETERS))
    page = index(study, store)
    for name in re.findall(r'src="(figures/.+?)"', page):
        store.report(name).parent.mkdir(exist_ok=True)
        store.report(name).write_text('<svg xmlns="http://www.w3.org/2000/svg" width="900" height="9"/>')
    with mpl.rc_context():
        style.use()
        folder = reports(study, store, {"toy": "Toys </script> & more", "another": "Another"})
    pages.publish(study, store)
    return folder


@pytest.fixture
def opened(browser, site):
    """Opens a page of the site; what goes wrong in it fails the test."""
    wrong, asked = [], []

    @contextmanager
    def open_page(path, width=1200, **how):
        context = browser.new_context(viewport={"width": width, "height": 900}, **how)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((site / path).as_uri())
        if how.get("java_script_enabled", True):
            page.wait_for_function("[...document.querySelectorAll('.count')].every((count) => count.textContent)")
        yield page
        context.close()

    yield open_page
    assert wrong == []
    assert all(url.startswith(site.as_uri()) for url in asked)


def marks(page, chart):
    """Each mark of a picture: where it stands, and its path and colours."""
    drawn = page.locator(f"#chart-{chart} .role-mark.mark-symbol > path")
    return drawn.evaluate_all("(all) => all.map((mark) => mark.outerHTML)")


def choose(page, chart, name, value):
    page.locator(f"#chart-{chart} select[name={name}]").select_option(value)


def violations(page):
    from axe_playwright_python.sync_playwright import Axe

    return [
        (found["id"], [node["html"] for node in found["nodes"]]) for found in Axe().run(page).response["violations"]
    ]


@BOTH
def test_a_page_is_one_small_file_without_a_word_from_elsewhere(opened, site, page):
    """``opened`` looks at the console and at every request."""
    assert (site / page).stat().st_size < 3 * 10**6
    with opened(page) as shown:
        assert shown.locator("figure.chart:visible").count() == 3
        assert shown.locator(".picture > svg").count() == 3
        assert shown.evaluate("typeof vegaEmbed") == "function"


def test_a_picture_has_a_mark_for_every_row_that_was_chosen(opened):
    with opened(STUDY) as page:
        before = marks(page, "layers")
        assert len(before) == LAYERS * TOLERANCES
        assert len(marks(page, "spread")) == LAYERS * NETWORKS
        choose(page, "layers", "tolerance", "1")
        assert len(marks(page, "layers")) == LAYERS
        choose(page, "layers", "network", "ViT & labels")
        other = marks(page, "layers")
        assert len(other) == LAYERS
        assert not set(other) & set(before)
        assert page.locator("#chart-layers tbody tr").count() == LAYERS
        assert page.locator("#chart-layers .count").text_content() == f"{LAYERS} rows"


def test_the_frontier_is_filtered_by_network_weights_ranks_and_step(opened):
    """Of VGG11: 3 methods at 2 tolerances, one tuned at both; 2 at 2 choices of ranks, one tuned at one; 2 dense."""
    with opened(STUDY) as page:
        assert len(marks(page, "frontier")) == 3 * 2 + 2 + 2 * 2 + 1 + 2
        choose(page, "frontier", "method", "compensated")
        assert len(marks(page, "frontier")) == 2 + 1 + 2
        choose(page, "frontier", "tolerance", "budget")
        assert len(marks(page, "frontier")) == 1 + 1 + 2
        before = marks(page, "frontier")
        choose(page, "frontier", "cost", "flops")
        assert len(set(before) - set(marks(page, "frontier"))) == 4
        choose(page, "frontier", "step", "before training")
        assert len(marks(page, "frontier")) == 1
        choose(page, "frontier", "network", "ViT")
        assert page.locator("#chart-frontier select[name=method]").input_value() == ""
        assert len(marks(page, "frontier")) == 3 * 2


def test_a_choice_leaves_what_the_choices_before_it_have(opened):
    with opened(OVERVIEW) as page:
        networks = page.locator("#chart-layers select[name=network]")
        assert networks.input_value() == "Another: VGG11"
        choose(page, "layers", "study", "Toys </script> & more")
        assert networks.input_value() == "Toys </script> & more: VGG11"
        assert networks.locator("option:not([disabled])").count() == NETWORKS
        assert len(marks(page, "spread")) == 2 * LAYERS * NETWORKS
        choose(page, "spread", "study", "Another")
        assert len(marks(page, "spread")) == LAYERS * NETWORKS


def test_a_mark_says_what_it_is_to_the_pointer_and_to_a_tap(opened):
    with opened(STUDY) as page:
        choose(page, "layers", "tolerance", "1")
        mark = page.locator("#chart-layers .role-mark.mark-symbol > path").nth(2)
        row = page.locator("#chart-layers tbody tr").nth(2).locator("td").all_text_contents()
        mark.hover()
        told = page.locator("#vg-tooltip-element.visible")
        assert told.locator("td.key").all_text_contents() == page.locator("#chart-layers th").all_text_contents()
        assert told.locator("td.value").all_text_contents() == row
        assert {"VGG11", "blocks.2", "40 × 32", "1 points"} <= set(row)
        mark.click()
        assert all(word in page.locator("#readout-layers").text_content() for word in row)


def test_keys_reach_every_choice_and_every_mark(opened):
    with opened(STUDY) as page:
        page.locator("#chart-layers select[name=network]").focus()
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowDown")
        assert page.locator("#chart-layers select[name=tolerance]").input_value() == "0"
        assert len(marks(page, "layers")) == LAYERS
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className").startswith("picture")
        plain = marks(page, "layers")
        said = []
        for _ in range(LAYERS):
            page.keyboard.press("ArrowRight")
            said.append(page.locator("#readout-layers").text_content())
        assert [re.search(r"layer (\S+)", words)[1] for words in said] == [f"blocks.{i}" for i in range(LAYERS)]
        assert len(set(marks(page, "layers")) - set(plain)) == 1
        page.keyboard.press("Home")
        assert page.locator("#readout-layers").text_content() == said[0]
        page.keyboard.press("Escape")
        assert marks(page, "layers") == plain
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.locator("#chart-layers table").is_visible()


def test_a_picture_is_saved_as_it_stands(opened, tmp_path):
    with opened(STUDY) as page, page.expect_download() as download:
        page.locator("#chart-frontier .save").click()
    assert download.value.suggested_filename == "chart-frontier.svg"


@BOTH
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_in_light_and_in_dark(opened, page, scheme):
    with opened(page, color_scheme=scheme) as shown:
        shown.locator("#chart-frontier summary").click()
        assert violations(shown) == []
        paper, ink = shown.evaluate("['backgroundColor', 'color'].map((name) => getComputedStyle(document.body)[name])")
        assert (sum(map(int, re.findall(r"\d+", paper))) > sum(map(int, re.findall(r"\d+", ink)))) == (
            scheme == "light"
        )


@BOTH
def test_a_phone_shows_a_page_without_scrolling_sideways_and_tells_of_what_is_tapped(opened, page):
    with opened(page, width=360, has_touch=True) as shown:
        for summary in shown.locator("summary").all():
            summary.click()
        shown.locator("#chart-layers .role-mark.mark-symbol > path").first.tap()
        assert "layer blocks.0" in shown.locator("#readout-layers").text_content()
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360
        assert violations(shown) == []
        assert shown.locator(".picture > svg").evaluate_all("(all) => all.every((svg) => svg.clientWidth > 250)")


@BOTH
def test_on_paper_a_page_is_light_and_nothing_is_cut_off(opened, page):
    """A4 with Chromium's margins is 718 pixels wide."""
    with opened(page, color_scheme="dark") as shown:
        shown.emulate_media(media="print", color_scheme="dark")
        shown.set_viewport_size({"width": 718, "height": 1000})
        assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not shown.locator(".save, details, .readout").locator("visible=true").count()
        right = "(all) => Math.max(...all.map((part) => part.getBoundingClientRect().right))"
        assert shown.locator("main *").evaluate_all(right) <= 719


@BOTH
def test_without_scripts_the_figures_and_tables_are_there_and_a_hint(opened, page):
    with opened(page, java_script_enabled=False) as shown:
        assert shown.locator("noscript").first.is_visible()
        assert not shown.locator("figure.chart").locator("visible=true").count()
        assert shown.locator("figure img").first.is_visible()
        assert shown.locator("table").locator("visible=true").count()
