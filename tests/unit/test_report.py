"""`megamoe report`: what the page says of a run, with whole, torn, old, missing and hostile files."""

import json
import re
import struct
import time
import tracemalloc
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megamoe.cli import main
from megamoe.pictures.page import page, script_json
from megamoe.pictures.png import indexed_png
from megamoe.report.heat import NONE_INDEX, palette, shades
from megamoe.report.html import html_report
from megamoe.report.record import read_record
from tests.unit.report_cases import HOSTILE, START, loads, metrics, training_line, write_lines, write_run


class Elements(HTMLParser):
    """Every element that a browser would make, with its attributes; texts of its headings and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "alpha")


@pytest.fixture(scope="module")
def text(run) -> str:
    return html_report([read_record(run)])


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def test_one_page_holds_everything_and_asks_for_nothing(text):
    elements = Elements(text)
    assert not elements.of("link") and not elements.of("iframe") and not elements.of("object")
    for tag, attributes in elements.found:
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, value)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert len(text) < 700_000


def test_every_picture_has_words_for_those_who_cannot_see_it(text):
    elements = Elements(text)
    pictures = [svg for svg in elements.of("svg") if svg.get("role") == "img"]
    assert len(pictures) > 20 and all(len(svg["aria-label"]) > 15 for svg in pictures)
    assert all(image["alt"] for image in elements.of("img"))
    assert all(svg.get("role") == "img" or svg.get("aria-hidden") == "true" or svg.get("class") == "bar"
               for svg in elements.of("svg"))  # fmt: skip
    label = next(svg["aria-label"] for svg in pictures if svg["aria-label"].startswith("Learning rate"))
    assert label == "Learning rate: learning rate from 1.65e-05 to 0", "two lines are one point"


def test_pictures_are_well_formed_and_stay_in_their_frames(text):
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(svg)
        for path in root.iter("path"):
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d", ""))]
            assert all(abs(number) < 2000 for number in numbers)


def test_facts_are_those_of_the_files(text):
    said = " ".join(Elements(text).texts)
    for fact in ("177 M", "TP2 × EP4", "16 ranks, ZeRO-1, fp16", "1.57 B", "finished", "6,000", "130 steps done again"):
        assert fact in said, fact
    kept = sum(line["step_seconds"] * 10 for line in metrics(6000) if "loss" in line and line["step"] > 10)
    wall = 2.4 * 6000 + 1800  # from the first start to the end
    assert f"{(kept + 10 * 2.2) / wall:.1%}"[:4] in said
    assert "rank 9 on node2 was killed by signal 9 (rank 9, host node2, phase backward)" in said


def test_curves_lie_where_their_numbers_are(run, text):
    """The last point of the static path, turned back into a value, is the last line's."""
    data, line = data_of(text), training_line(6000)
    chart = data["charts"]["lr"]
    low, high, is_log = chart["y"]
    assert not is_log
    figure = re.search(r'<figure data-chart="lr">.*?</figure>', text, re.DOTALL)[0]
    x, y = re.search(r'class="line" d="[^"]*L([\d.]+) ([\d.]+)"', figure).groups()
    box = data["box"]
    assert float(x) == pytest.approx(box["right"], abs=1.5)  # the piece's mean step is somewhat before its last
    share = (box["bottom"] - float(y)) / (box["bottom"] - box["top"])
    assert low + share * (high - low) == pytest.approx(line["lr"], abs=0.002 * (high - low))
    steps = data["runs"][0][0]["steps"]
    middle = len(steps) // 2
    assert chart["lines"][0]["y"][middle] == pytest.approx(training_line(round(steps[middle]))["lr"], rel=0.01)


def test_x_axes_follow_tokens_and_the_clock(run):
    record = read_record(run)
    steps, tokens, hours = (record.axis(record.training, axis) for axis in ("steps", "tokens", "hours"))
    np.testing.assert_allclose(tokens, steps * 256 * 1024)
    lines = [line for line in metrics(6000) if "loss" in line]
    assert hours[-1] == pytest.approx((lines[-1]["time"] - lines[0]["time"]) / 3600, abs=0.02)
    assert np.diff(hours).max() > 0.2, "half an hour stood still, inside of a piece"
    places = record.place(np.array([0.0, 3000.0]), "tokens")
    np.testing.assert_allclose(places, [0, 3000 * 256 * 1024])


def test_old_runs_have_hours_of_training(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", metrics(100, with_time=False))
    record = read_record(tmp_path)
    seconds = sum(line["step_seconds"] * 10 for line in metrics(100) if line["step"] > 10) + 9 * 2.2 + 2.2
    assert record.axis(record.training, "hours")[-1] * 3600 == pytest.approx(seconds, rel=0.01)
    assert not record.hours_are_wall
    text = html_report([record])
    assert "hours of training" in text and "Restarts" not in text and "Goodput" not in text


@pytest.mark.parametrize("kept", ["metrics.jsonl", "config.yaml", "events.jsonl"])
def test_any_file_alone_is_a_page(run, tmp_path, kept):
    (tmp_path / kept).write_bytes((run / kept).read_bytes())
    text = html_report([read_record(tmp_path)])
    assert ("<figure data-chart" in text) == (kept == "metrics.jsonl")
    assert main(["status", str(tmp_path)]) == 0


def test_torn_and_foreign_lines_are_left_out(run, tmp_path):
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    junk = [b"\n", b"[1, 2]\n", b'{"step": "7"}\n', b"\xff\xfe\n", b'{"loss": 1}\n', b'{"step": -1, "loss": 9}\n',
            b"nonsense\n", b'{"step": 1e999, "loss": 1}\n', b"[" * 100_000 + b"\n", b"\0" * 1000 + b"\n"]  # fmt: skip
    mixed = b"".join(part for line, other in zip(lines, junk * 100, strict=False) for part in (line, other))
    (tmp_path / "metrics.jsonl").write_bytes(mixed + b'{"step": 9999, "loss": 2.0, "lm')
    torn, whole = read_record(tmp_path), read_record(run)
    assert torn.last_line == whole.last_line
    np.testing.assert_array_equal(torn.training.mean("loss"), whole.training.mean("loss"))


def test_several_runs_lie_over_each_other(run, tmp_path):
    other = write_run(tmp_path / "alpha", last_step=3000, seed=3, ended=False, with_time=False)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("0.0006", "0.0003"))
    assert main(["report", str(run), str(other), "--output", str(tmp_path / "out"), "--no-png"]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    data = data_of(text)
    assert {line["run"] for line in data["charts"]["loss"]["lines"]} == {0, 1}
    names = [line["label"] for line in data["charts"]["lr"]["lines"]]
    assert len(set(names)) == 2, "runs of one name are told apart"
    assert data["axis"] == "tokens"
    assert "optimizer.lr" in text and ">0.0003<" in text and "optimizer.warmup_steps" not in text


def test_smoothing_is_a_mean_of_lines_and_leaves_what_moves_in_steps(tmp_path):
    lines = [{"step": step, "loss": float(step % 2), "step_seconds": 1.0, "lr": float(step)} for step in range(1, 101)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    data = data_of(html_report([read_record(tmp_path, smoothing_lines=10)], smoothing_lines=10))
    loss = data["charts"]["loss"]["lines"][0]
    assert loss["y"][20:] == [0.5] * 80 and loss["low"][20:] == loss["high"][20:] == [n % 2 for n in range(21, 101)]
    assert data["charts"]["lr"]["lines"][0]["y"] == list(range(1, 101))


def test_marks_stand_at_their_steps(run, text):
    marks = data_of(text)["marks"]
    assert [mark[3] for mark in marks if mark[1] == "restart"] == [3000]
    assert [mark[3] for mark in marks if mark[1] == "roll_back"] == [2800]
    assert [mark[3] for mark in marks if mark[1] == "save"] == list(range(500, 6001, 500))
    skips = [mark[3] for mark in marks if mark[1] == "skip"]
    assert len(skips) == 3 and skips[1] == pytest.approx(1500, abs=20) and skips[2] == pytest.approx(4100, abs=20)
    assert text.count('class="m m-restart"') == 2, "once for all pictures, once in the key"


@pytest.mark.parametrize("place", ["name", "message", "kind", "corpus", "key", "config", "host", "reason"])
def test_what_files_say_never_becomes_markup(tmp_path, place):
    name = HOSTILE.replace("/", "") if place == "name" else "run"
    folder = write_run(tmp_path / name[:200], last_step=50)
    if place in ("message", "kind", "host"):
        event = {"time": START, "kind": "start", "message": "m", "step": 1, "hosts": ["h"]}
        event |= {"hosts": [HOSTILE]} if place == "host" else {place: HOSTILE}
        write_lines(folder / "events.jsonl", [event, {"kind": "spike", "step": 5, "message": HOSTILE}])
    if place in ("corpus", "key"):
        key = f"valid_loss/{HOSTILE}" if place == "corpus" else HOSTILE.replace(" ", "")
        write_lines(folder / "metrics.jsonl", [*metrics(50), {"step": 50, key: 2.0}])
    if place == "config":
        (folder / "config.yaml").write_text(json.dumps({"run": {"dir": HOSTILE, HOSTILE: HOSTILE}, HOSTILE: {"a": 1}}))
    if place == "reason":
        record = {"attempt": 1, "reason": HOSTILE, "verdict": HOSTILE, "hosts": [HOSTILE], "id": "a"}
        write_lines(folder / "attempts.jsonl", [record])
    text = html_report([read_record(folder)])
    elements = Elements(text)
    assert "window.owned" in " ".join(elements.texts) + json.dumps(data_of(text)), "it is told"
    assert len(elements.of("script")) == 2 and all("onerror" not in attributes for _, attributes in elements.found)
    assert all(image["src"].startswith("data:image/png") for image in elements.of("img"))
    assert "\x1b" not in text and "\u202e" not in text
    html_report([read_record(folder), read_record(folder)])


def test_data_of_the_script_cannot_end_it():
    tree = {"a": "</script><!--<script>", "<b>": "&amp;\u2028"}
    text = script_json(tree)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == tree


def test_the_policy_lets_only_the_own_script_run():
    text = page("t", "b", script="let a = 1;")
    assert "script-src &#x27;sha256-" in text and "default-src &#x27;none&#x27;" in text
    assert "script-src &#x27;none&#x27;" in page("t", "b")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["report", "{dir}/nothing"], "{dir}/nothing is no folder: name the folder of a run, its run.dir"),
        (["status", "{dir}"], "{dir} is no run's folder: it holds neither config.yaml nor metrics.jsonl"),
        (["report", "{run}", "--output", "/proc/none"], "/proc/none cannot be written (No such file or directory): "
         "name another folder with --output"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(run, tmp_path, capsys, arguments, sentence):
    places = {"dir": str(tmp_path), "run": str(run)}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert capsys.readouterr().err == f"megamoe: error: {sentence.format(**places)}\n"


def test_files_that_would_wait_or_never_end_do_not_hold_it_up(tmp_path):
    import os

    write_lines(tmp_path / "events.jsonl", [{"kind": "start", "step": 0}])
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.symlink("/dev/zero", tmp_path / "attempts.jsonl")
    os.mkfifo(tmp_path / "config.yaml")
    (tmp_path / "expert_loads.jsonl").mkdir()
    assert "No metrics" in html_report([read_record(tmp_path)])


def test_many_lines_take_little_time_and_memory(tmp_path):
    num_lines = 100_000
    line = {key: value for key, value in training_line(7).items() if not key.startswith("seconds_")}
    pattern = json.dumps(line).replace('"step": 7,', '"step": %d,')
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.writelines(pattern % step + "\n" for step in range(num_lines))
    started = time.process_time()
    record = read_record(tmp_path)
    seconds = time.process_time() - started
    print(f"{seconds:.1f} s of CPU for {num_lines} lines of {len(pattern)} bytes")
    assert record.last_line["step"] == num_lines - 1 and record.training.num_pieces <= 320
    assert seconds < 5.0
    with open(tmp_path / "metrics.jsonl", "r+") as file:
        file.truncate(len(pattern) * num_lines // 5)
    tracemalloc.start()
    read_record(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20, "a chunk of lines at a time, not the file"


def test_heat_map_pictures_are_what_was_put_in():
    rows = [bytes([0, 1, 2]), bytes([2, 1, 0])]
    png = indexed_png(rows, [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)])
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (3, 2)
    at = png.index(b"IDAT")
    (length,) = struct.unpack(">I", png[at - 4 : at])
    assert zlib.decompress(png[at + 4 : at + 4 + length]) == b"\0" + rows[0] + b"\0" + rows[1]
    assert shades(np.array([[0.0, 0.01, 0.25, 1.0, 2.0, 4.0, 99.0]])).tolist() == [[NONE_INDEX, 0, 0, 40, 60, 80, 80]]
    colours = palette()
    assert colours[40][3] == 0 and colours[0][3] == colours[80][3] == 255 and len(colours) == NONE_INDEX + 1


def test_maps_of_the_paper_s_largest_model_stay_small(tmp_path):
    layers = dict.fromkeys(range(1, 24, 2), 512)
    write_lines(tmp_path / "metrics.jsonl", metrics(500))
    write_lines(tmp_path / "expert_loads.jsonl", loads(500, layers, interval=10))
    text = html_report([read_record(tmp_path)])
    assert text.count('class="heat"') == 14 and len(text) < 900_000


def test_pngs_are_drawn_where_matplotlib_is(run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert main(["report", str(run), "--output", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.html", "learning.png", "speed.png", "balance.png", "experts.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.glob("*.png"))
    monkeypatch.setattr("megamoe.report.images.has_matplotlib", lambda: False)
    capsys.readouterr()
    assert main(["report", str(run), "--output", str(tmp_path / "more")]) == 0
    assert [path.name for path in (tmp_path / "more").iterdir()] == ["report.html"]
    assert "no PNGs: matplotlib draws them" in capsys.readouterr().err
