"""`megamoe prime`: one rank and eight say the same, a broken-off command goes on, and what is refused in which words.

Every score of a zero-shot task is held against the plain PyTorch reference on ids that are written out here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamoe import cli
from megamoe.priming.results import parts_path
from tests.parity.reference import forward
from tests.unit.priming_cases import write_lines
from tests.unit.surgery_cases import make, small_config, weights_of

ROOT = Path(__file__).parents[2]
SETTINGS = ("model.vocab_size=260", "model.vocab_size_multiple=4", "model.seq_length=64", "moe.num_experts=4")
EIGHT = (
    "--local-ranks", "8", "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2",
    "parallel.expert_parallel_size=2", "run.micro_batch_size=3",
)  # fmt: skip
CHOOSE = """\
name: choose
data: {file: test.jsonl}
train: {file: train.jsonl}
text: "{story}\\n{question} {choice}"
choices: answers
label: {field: right}
"""
AGAINST = """\
name: against
data: {file: test.jsonl}
train: {file: train.jsonl}
text: "{question} {choice}"
choices: answers
label: {field: right}
score: sum_minus_unconditional
unconditional: "Answer: {choice}"
"""
TOLERANCE = 1e-5
END = 2
pytestmark = pytest.mark.timeout(400)


def line(number: int) -> dict[str, Any]:
    animal = ("cat", "horse", "ox", "bee", "wolf", "hen", "eel")[number % 7]
    answers = ["red", "green", f"as the {animal}", "blue"]
    return {"story": f"A {animal} ran.", "question": f"Its colour {number}?", "answers": answers, "right": number % 4}


def prime(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MEGAMOE_INIT_METHOD", "SLURM_PROCID")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "megamoe", "prime", str(folder / "run"), "--task", str(folder / "choose.yaml"),
         "--task", str(folder / "against.yaml"), "--shots", "0,2", "--draws", "2", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def samples(path: Path) -> dict[tuple[str, int, int, int], dict[str, Any]]:
    rows = [json.loads(each) for each in path.read_text().splitlines()]
    return {(row["task"], row["num_shots"], row["draw"], row["number"]): row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prime")
    make(root / "run", small_config("paper", *SETTINGS))
    (root / "choose.yaml").write_text(CHOOSE)
    (root / "against.yaml").write_text(AGAINST)
    write_lines(root / "test.jsonl", *(line(number) for number in range(11)))
    write_lines(root / "train.jsonl", *(line(number) for number in range(3, 9)))
    for name, arguments in (("one", ("--json",)), ("eight", EIGHT)):
        done = prime(
            root, "--out", str(root / f"{name}.json"), "--samples", str(root / f"{name}.jsonl"), *arguments
        )
        assert done.returncode == 0, done.stderr
        (root / f"{name}.out").write_text(done.stdout)
        (root / f"{name}.err").write_text(done.stderr)
    return root


def reference(folder: Path) -> Any:
    """Nats of tokens [start, ...) of ids by plain PyTorch."""
    weights = {
        name: torch.from_numpy(array.copy())
        for name, array in weights_of(folder / "run" / "checkpoints" / "step_00000100").items()
    }
    config = small_config("paper", *SETTINGS)

    def total(ids: list[int], start: int) -> float:
        values = forward(config, weights, torch.tensor([ids]))[0][0, :, :260].double().log_softmax(-1)
        return sum(float(values[i - 1, ids[i]]) for i in range(start, len(ids)))

    return total


def byte_ids(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def test_scores_are_the_plain_references_on_ids_written_out(folder):
    found, total = samples(folder / "one.jsonl"), reference(folder)
    for number in (0, 3, 10):
        one, row = line(number), found["choose", 0, 0, number]
        head = [END, *byte_ids(one["story"]), END, *byte_ids(one["question"] + " ")]
        sums = [total([*head, *byte_ids(answer)], len(head)) for answer in one["answers"]]
        np.testing.assert_allclose(row["log_probabilities"], sums, atol=2e-4, rtol=TOLERANCE)
        means = [value / len(answer) for value, answer in zip(sums, one["answers"], strict=True)]
        np.testing.assert_allclose(row["scores"], means, atol=2e-5, rtol=TOLERANCE)
        assert row["prediction"] == int(np.argmax(means)) and row["correct"] == [number % 4]
        assert row["accuracy"] == (np.argmax(means) == number % 4)

        row = found["against", 0, 0, number]
        head = [END, *byte_ids(one["question"])]
        sums = [total([*head, *byte_ids(" " + answer)], len(head)) for answer in one["answers"]]
        plain = [END, *byte_ids("Answer:")]
        sums = [s - total([*plain, *byte_ids(" " + a)], len(plain)) for s, a in zip(sums, one["answers"], strict=True)]
        np.testing.assert_allclose(row["scores"], sums, atol=2e-4, rtol=TOLERANCE)


def test_one_rank_and_eight_say_the_same(folder):
    one, eight = samples(folder / "one.jsonl"), samples(folder / "eight.jsonl")
    assert one.keys() == eight.keys()
    assert len(one) == 2 * 11 * (1 + 2), "a pass without shots, and one for each draw"
    for key, row in one.items():
        other = eight[key]
        np.testing.assert_allclose(row["log_probabilities"], other["log_probabilities"], atol=2e-4, rtol=TOLERANCE)
        assert row["num_scored_tokens"] == other["num_scored_tokens"] and row["where"] == other["where"]
    assert one["against", 2, 0, 0]["scores"] != one["against", 2, 1, 0]["scores"], "another draw has other shots"


def test_the_result_says_what_was_asked_and_found(folder):
    tree = json.loads((folder / "one.json").read_text())
    assert json.loads((folder / "one.out").read_text()) == tree, "what is printed with --json, and nothing else"
    assert tree["model"]["step"] == 100 and tree["settings"]["num_ranks"] == 1
    assert [(row["task"], row["num_shots"], row["num_draws"]) for row in tree["results"]] == [
        ("choose", 0, 1), ("choose", 2, 2), ("against", 0, 1), ("against", 2, 2),
    ]  # fmt: skip
    rows = samples(folder / "one.jsonl")
    for row in tree["results"]:
        key = row["task"], row["num_shots"]
        of = [each["accuracy"] for of_key, each in rows.items() if of_key[:2] == key]
        assert row["accuracy"] == pytest.approx(np.mean(of)) and row["num_examples"] == 11
    few = tree["results"][1]
    assert few["spread"] == pytest.approx(np.std(few["draw_accuracies"], ddof=1))
    assert few["num_dropped_shots"] > 0, "two shots do not fit into 64 tokens"
    assert f"choose, 2 shots: {few['num_dropped_shots']} of 44 shots were dropped for want of room" in (
        folder / "one.err"
    ).read_text()
    table = (folder / "eight.out").read_text().splitlines()
    assert table[0].split() == ["task", "shots", "draws", "examples", "accuracy", "std.", "error", "spread"]
    eight = json.loads((folder / "eight.json").read_text())
    assert eight["model"] == tree["model"] and eight["settings"]["layout"]["tensor_parallel_size"] == 2


def test_a_broken_off_command_goes_on(folder):
    kept = parts_path(folder / "one.json")
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 6
    kept.write_text("".join(lines[:4]) + lines[4][:100])  # as a crash leaves it
    before = json.loads((folder / "one.json").read_text())
    arguments = ("--out", str(folder / "one.json"), "--samples", str(folder / "again.jsonl"))
    done = prime(folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"4 of 6 passes were done before, and read from {folder / 'one.json'}" in done.stderr
    assert json.loads((folder / "one.json").read_text())["results"] == before["results"]
    assert (folder / "again.jsonl").read_text() == (folder / "one.jsonl").read_text()
    other = prime(folder, *arguments, "--seed", "2")
    assert "2 of 6 passes were done before" in other.stderr, "those without shots: another seed draws others"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shots", "1,a"], '--shots: "1,a" is no list of different numbers of shots, such as 0,1,4'),
        (["--shots", "9"], "9 shots cannot be drawn for {0}/test.jsonl, line 1: its train file has 6 other examples"),
        (["--task", "{0}/choose.yaml"], "two tasks are named choose: give one of them another name"),
        (["--out", "{0}/none/r.json"], "cannot write {0}/none/r.json: there is no folder {0}/none"),
        (["--out", "{0}/test.jsonl"], "{0}/test.jsonl holds no results of a priming: choose another --out, or move it "
         "away"),
        (["--samples", "{0}/test.jsonl"], "{0}/test.jsonl holds no samples of a priming: choose another --samples, or "
         "move it away"),
        (["--out", "r.json", "--samples", "r.json"], "--samples r.json would take the place of what --out r.json "
         "keeps: name another file"),
        (["moe.eval_capacity_factor=2"], "moe.eval_capacity_factor has no use here: experts take all tokens, or an "
         "example's score would depend on those beside it"),
        (["data.tokenizer.kind=sentencepiece"], "data.tokenizer.kind sentencepiece needs "
         "data.tokenizer.path: give a .model file"),
        (["--too-long", "refuse", "--shots", "3"], "{0}/test.jsonl, line 1: 132 tokens with 3 shots do not fit into "
         "the model's 64; --too-long drop-shots leaves shots out"),
        (["--write-lm-eval", "{0}/lm", "--shots", "0"], "{0}/test.jsonl, line 1: lm_eval cannot encode a newline as "
         "the end of a document; write this task with --newlines as_is, or without shots where its texts have no "
         "newlines"),
    ],
)  # fmt: skip
def test_refusals(arguments, said, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    words = [word.format(folder) for word in arguments]
    assert cli.main(["prime", "run", "--task", f"{folder}/choose.yaml", *words]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err == f"megamoe: error: {said.format(folder)}\n"


def test_a_task_that_lm_eval_cannot_express_is_refused(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert cli.main(["prime", "run", "--task", "against.yaml", "--write-lm-eval", "lm"]) == 2
    assert capsys.readouterr().err == (
        "megamoe: error: task against: lm_eval has no score against the choice after an unconditional text\n"
    )
    assert not Path("lm").exists()
