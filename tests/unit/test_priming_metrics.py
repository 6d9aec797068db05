"""What scores come to: rules on numbers made up by hand, ReCoRD's F1 and exact match, errors, spreads, the record."""

import json
import math
import os

import pytest

from megamoe.errors import OutputError
from megamoe.priming.encoding import Prompt, Scored
from megamoe.priming.examples import Example
from megamoe.priming.metrics import choice_scores, judge, summary
from megamoe.priming.report import notes, table
from megamoe.priming.results import FORMAT, Part, check_outputs, parts_path, read_parts, sample_lines, write_part
from megamoe.priming.settings import parse_shots
from megamoe.priming.tasks import parse_task

TASK = "{name: t, data: {file: f}, text: '{q} {choice}', choices: c, label: {field: a, kind: texts}, metrics: %s}"


def prompt(*counts):
    return Prompt(tuple(Scored(tuple(range(9)), 1, 1 + count) for count in counts))


def of(choices, correct, answers=()):
    return Example("f, line 1", tuple(choices), tuple(choices), "", frozenset(correct), None, tuple(answers))


def test_the_rules():
    sums = [-6.0, -4.0]
    assert choice_scores("mean_after_prefix", prompt(3, 1), sums, []) == [-2.0, -4.0]
    assert choice_scores("sum_of_choice", prompt(3, 1), sums, []) == [-6.0, -4.0]
    assert choice_scores("sum_of_suffix", prompt(2, 2), sums, []) == [-6.0, -4.0]
    assert choice_scores("sum_minus_unconditional", prompt(3, 1), sums, [-9.0, -5.0]) == [3.0, 1.0]


def test_the_highest_score_is_the_prediction_and_the_first_of_equals():
    task = parse_task(TASK % "accuracy", "t")
    assert judge(task, of("ab", {1}), [-2.0, -1.0]) == {"prediction": 1, "accuracy": 1.0}
    assert judge(task, of("ab", {1}), [-1.0, -1.0]) == {"prediction": 0, "accuracy": 0.0}
    assert judge(task, of("ab", {0}), [math.nan, -1.0]) == {"prediction": None, "accuracy": 0.0}


def test_record_compares_the_chosen_entity_with_every_answer():
    task = parse_task(TASK % "record", "t")
    choices, answers = ["U.S. Army", "the Army", "Navy"], ["Army", "Air Force"]
    assert judge(task, of(choices, {1}, answers), [0.0, 1.0, 0.0]) == {
        "prediction": 1, "accuracy": 1.0, "exact_match": 1.0, "f1": 1.0,
    }  # fmt: skip
    # "us army" and "army" share one word of two and one: 2 * 1 / 3
    assert judge(task, of(choices, {1}, answers), [1.0, 0.0, 0.0]) == {
        "prediction": 0, "accuracy": 0.0, "exact_match": 0.0, "f1": pytest.approx(2 / 3),
    }  # fmt: skip
    assert judge(task, of(choices, {1}, answers), [0.0, 0.0, 1.0])["f1"] == 0.0


def test_means_errors_and_spread():
    draws = [[{"prediction": 0, "accuracy": a} for a in row] for row in ([1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0])]
    found = summary(draws)
    assert found["accuracy"] == 0.5 and found["draw_accuracies"] == [0.75, 0.25]
    assert found["spread"] == pytest.approx(math.sqrt(0.125))
    # examples have 1, 0, 0.5, 0.5 over the draws: variance (0.25 + 0.25) / 3
    assert found["standard_error"] == pytest.approx(math.sqrt(0.5 / 3 / 4))
    single = summary(draws[:1])
    assert single["spread"] is None and single["standard_error"] == pytest.approx(math.sqrt(0.75 / 3 / 4))


def test_the_table_and_what_has_to_be_said():
    row = {
        "task": "piqa", "num_shots": 2, "num_draws": 3, "num_examples": 4, "accuracy": 0.5, "standard_error": 0.25,
        "spread": None, "num_dropped_shots": 5, "num_cut_texts": 1, "num_not_finite": 2,
    }  # fmt: skip
    assert table([row]) == (
        "task  shots  draws  examples  accuracy  std. error\n"
        "piqa      2      3         4    0.5000      0.2500\n"
    )  # fmt: skip
    assert list(notes([row])) == [
        "piqa, 2 shots: 5 of 24 shots were dropped for want of room",
        "piqa, 2 shots: the beginning of 1 texts was cut off for want of room",
        "piqa, 2 shots: 2 examples had scores that are no numbers, and count as wrong",
    ]


def test_parts_are_read_back_and_torn_or_foreign_ones_are_not(tmp_path):
    out = tmp_path / "r.json"
    part, other = Part("t", 1, 0, "abc"), Part("t", 1, 1, "abc")
    written = write_part(out, part, {"examples": [{"accuracy": 1.0}]})
    with parts_path(out).open("a") as file:
        for foreign in ({"identity": ["abc"]}, {"task": {}}, {"draw": None}, {"examples": 1}):
            file.write(json.dumps(written | {"draw": 7} | foreign) + "\n")
        file.write(json.dumps({"task": "t", "num_shots": 1})[:-4])
    write_part(out, other, {"examples": []})
    found = read_parts(out)
    assert found.keys() == {part.key, other.key} and found[part.key] == written
    assert read_parts(tmp_path / "none") == {} == read_parts(None)


def test_outputs_that_cannot_be_written_are_refused_before(tmp_path):
    check_outputs(tmp_path / "r.json", None)
    with pytest.raises(OutputError, match=r"cannot write .*/none/r.json: there is no folder .*/none"):
        check_outputs(tmp_path / "none" / "r.json", None)
    with pytest.raises(OutputError, match="it is a folder"):
        check_outputs(None, tmp_path)


def test_outputs_replace_only_what_a_priming_wrote(tmp_path):
    out, samples = tmp_path / "r.json", tmp_path / "s.jsonl"
    example = {"number": 0, "where": "f, line 1", "correct": [0], "scores": [0.0]}
    out.write_text(json.dumps({"format": FORMAT, "results": []}))
    samples.write_text(sample_lines([{"task": "t", "num_shots": 0, "draw": 0, "examples": [example]}]))
    check_outputs(out, samples)
    check_outputs(tmp_path / "new.json", tmp_path / "new.jsonl")
    os.mkfifo(tmp_path / "pipe")
    other = tmp_path / "other"
    for content in (b"", b"In the beginning", b"\xff", b"[1]", b'{"format": "megamoe-evaluation"}', b"[" * 100_000):
        other.write_bytes(content)
        for foreign, ours in ((other, samples), (tmp_path / "pipe", samples), (samples, None)):
            with pytest.raises(OutputError) as caught:
                check_outputs(foreign, ours)
            assert str(caught.value) == (
                f"{foreign} holds no results of a priming: choose another --out, or move it away"
            )
        with pytest.raises(OutputError) as caught:
            check_outputs(out, other)
        assert str(caught.value) == f"{other} holds no samples of a priming: choose another --samples, or move it away"


@pytest.mark.parametrize("samples", ["r.json", "link/r.json", "r.json.parts.jsonl"])
def test_samples_lie_in_a_file_of_their_own(samples, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError) as caught:
        check_outputs(tmp_path / "r.json", tmp_path / samples)
    assert str(caught.value) == (
        f"--samples {tmp_path / samples} would take the place of what --out {tmp_path}/r.json keeps: name another file"
    )


def test_numbers_of_shots():
    assert parse_shots("0,1, 32") == (0, 1, 32)
    for wrong in ("", "1,1", "-1", "a", "1,"):
        with pytest.raises(ValueError, match="is no list of different numbers of shots, such as 0,1,4"):
            parse_shots(wrong)
