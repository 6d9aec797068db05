"""The page of `megamoe report` in a headless Chromium without a network: what it logs, asks for, and does."""

import pytest

from megamoe.report.html import html_report
from megamoe.report.record import read_record
from tests.browser import Browser, BrowserMissing
from tests.unit.report_cases import HOSTILE, START, metrics, training_line, write_lines, write_run


@pytest.fixture(scope="module")
def browser():
    try:
        started = Browser()
    except BrowserMissing as error:
        pytest.skip(str(error))
    with started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """report.html of one run, both.html of two."""
    place = tmp_path_factory.mktemp("pages")
    records = [read_record(write_run(place / "alpha")), read_record(write_run(place / "beta", last_step=4200, seed=2))]
    (place / "report.html").write_text(html_report(records[:1]))
    (place / "both.html").write_text(html_report(records))
    return place


@pytest.mark.parametrize("name", ["report.html", "both.html"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_nothing_is_logged_or_asked_for_and_all_fits(browser, folder, tmp_path, name, width, dark):
    page = browser.open(folder / name, width=width, dark=dark)
    assert page.run("document.documentElement.className") == "js", "its script has run"
    assert page.run("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 27)") == dark
    assert page.problems == [] and page.requests == []
    assert page.screenshot(tmp_path / "page.png").stat().st_size > 10_000


def test_the_script_draws_what_the_page_held_before(browser, folder):
    """Going to another axis and back gives the paths that Python wrote."""
    page = browser.open(folder / "report.html")
    paths = "[...document.querySelectorAll('figure .line, figure .range, figure .area')].map(p => p.getAttribute('d'))"
    before = page.run(paths)
    assert len(before) > 20
    choose = "document.querySelector('input[value={}]').click()"
    page.run(choose.format("hours"))
    assert page.run("document.querySelector('.xname').textContent") == "hours since the start"
    other = page.run(paths)
    assert sum(one != two for one, two in zip(before, other, strict=True)) > 20
    page.run(choose.format("steps"))
    after = page.run(paths)
    for one, two in zip(before, after, strict=True):
        assert len(one) == pytest.approx(len(two), abs=60)
        assert numbers(one) == pytest.approx(numbers(two), abs=0.15), "data has six digits"
    assert page.problems == []


def numbers(path: str) -> list[float]:
    return [float(part) for part in path.replace("M", " ").replace("L", " ").replace("Z", " ").split()]


def test_pointing_tells_values(browser, folder):
    page = browser.open(folder / "report.html")
    x, y, width = page.run(
        "(() => { const svg = document.querySelector('figure[data-chart=lr] svg[role=img]');"
        "svg.scrollIntoView({block: 'center'}); const r = svg.getBoundingClientRect();"
        "return [r.left, r.top + r.height / 2, r.width]; })()"
    )
    box = page.run("JSON.parse(document.getElementById('data').textContent).box")
    page.point_at(x + width * (box["left"] + (box["right"] - box["left"]) / 2) / box["width"], y)
    told = page.run("document.getElementById('tip').innerText").split()
    step = int(told[told.index("step") + 1].replace(",", ""))
    assert step == pytest.approx(3000, abs=20)
    assert float(told[told.index("rate") + 1]) == pytest.approx(training_line(step // 10 * 10)["lr"], rel=0.02)
    assert "attempt 2: resumed at step 3000" in page.run("document.getElementById('tip').innerText")
    page.point_at(1, 1)
    assert page.run("document.getElementById('tip').hidden")


def test_pointing_at_a_map_tells_its_cell(browser, folder):
    page = browser.open(folder / "report.html")
    place = (
        "(() => { const image = document.querySelectorAll('img.heat')[2]; image.scrollIntoView({block: 'center'});"
        "const r = image.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
    )
    x, y, width, height = page.run(place)
    page.point_at(x + 0.1 * width, y + 1.5 / 16 * height)
    assert "expert 1, step 600" in page.run("document.getElementById('tip').innerText")
    assert "no tokens" in page.run("document.getElementById('tip').innerText"), "expert 1 of layer 1 starves at first"
    page.point_at(x + 0.9 * width, y + 1.5 / 16 * height)
    assert "× mean" in page.run("document.getElementById('tip').innerText")


def test_runs_and_metrics_are_switched_off(browser, folder):
    page = browser.open(folder / "both.html")
    shown = "[...document.querySelectorAll('figure[data-chart=loss] g[data-line]:not(.off)')].length"
    everything = page.run(shown)
    assert everything == 6
    page.run("document.querySelector('.runs button[data-run=\"1\"]').click()")
    assert page.run(shown) == 3
    page.run("document.querySelector('figure[data-chart=loss] button[data-metric=\"0\"]').click()")
    assert page.run(shown) == 2
    page.run("document.querySelector('.runs button[data-run=\"1\"]').click()")
    assert page.run(shown) == 4
    page.run("document.getElementById('show-marks').click()")
    assert page.run("getComputedStyle(document.querySelector('#marks path')).display") == "none"


def test_without_scripts_the_pictures_are_there(browser, folder, tmp_path):
    page = browser.open(folder / "report.html", with_script=False)
    assert page.screenshot(tmp_path / "page.png").stat().st_size > 10_000
    layout = page.call("Page.getLayoutMetrics")["cssContentSize"]
    assert layout["height"] > 3000
    assert page.requests == []


def test_hostile_texts_do_nothing(browser, tmp_path):
    run = write_run(tmp_path / HOSTILE.replace("/", "")[:180], last_step=300)
    write_lines(
        run / "events.jsonl",
        [{"time": START, "kind": "start", "step": 0, "message": HOSTILE, "hosts": [HOSTILE]},
         {"kind": "spike", "step": 100, "message": HOSTILE}, {"kind": HOSTILE, "message": HOSTILE}],
    )  # fmt: skip
    write_lines(run / "metrics.jsonl", [*metrics(300), {"step": 300, f"valid_loss/{HOSTILE}": 1.0, HOSTILE: 2.0}])
    (tmp_path / "page.html").write_text(html_report([read_record(run), read_record(run)]))
    page = browser.open(tmp_path / "page.html")
    assert page.run("window.owned") is None and page.run("document.documentElement.className") == "js"
    page.run("document.querySelector('figure[data-chart=loss] svg[role=img]').focus()")
    page.call("Input.dispatchKeyEvent", {"type": "keyDown", "key": "ArrowLeft", "code": "ArrowLeft"})
    assert page.run("document.getElementById('tip').hidden") is False
    assert page.run("window.owned") is None and page.problems == [] and page.requests == []
