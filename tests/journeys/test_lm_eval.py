"""A model exported to Hugging Face, scored by lm_eval on tasks that we write for it, has the log-probabilities and the
accuracy that `megamoe prime` finds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megamoe import cli
from megamoe.config.schema import TokenizerConfig
from tests.unit.priming_cases import write_lines
from tests.unit.surgery_cases import make, small_config

CORPUS = Path(__file__).parents[2] / "launch_scripts" / "quickstart_corpus" / "king_james_bible.txt"
PIECES, NUM_EXAMPLES = 500, 4
TOLERANCE = 1e-4
TIMEOUT_SECONDS = 200
# One rule each, and no two with the same texts: see the README.txt that is written with them.
TASKS = {
    "mean": ('"{begin} {choice}"', "mean_after_prefix"),
    "suffix": ('"{gap|fill:_}"', "sum_of_suffix"),
    "choice": ('"{begin} {choice}"', "sum_of_choice"),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_SECONDS)]


def environment(tmp_path: Path) -> dict[str, str]:
    return dict(os.environ) | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def make_run(tmp_path: Path) -> None:
    """A random mixture of the paper's family with a real tokenizer; no row of its vocabulary is empty."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(CORPUS), model_prefix=str(tmp_path / "m"), vocab_size=PIECES, model_type="bpe", byte_fallback=True,
        input_sentence_size=3000, bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    config = small_config(
        "paper", f"model.vocab_size={PIECES}", "model.vocab_size_multiple=4", "model.seq_length=128",
        "moe.num_experts=4",
    )  # fmt: skip
    tokenizer = TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "m.model"))
    data = config.data.model_copy(update={"tokenizer": tokenizer})
    make(tmp_path / "run", config.model_copy(update={"data": data}))


def make_tasks(folder: Path) -> None:
    words = CORPUS.read_text(encoding="utf-8")[:40_000].split()
    for number, (name, (text, rule)) in enumerate(TASKS.items()):
        lines = []
        for place in range(1000 * number, 1000 * number + 500, 50):
            begin, middle, end = words[place : place + 9], words[place + 9], words[place + 10 : place + 16]
            endings = [" ".join(words[place + shift : place + shift + 6 + shift % 3]) for shift in (9, 20, 31, 42)]
            choices = endings if name != "suffix" else [middle, "nothing", "everybody", "it"]
            gap = " ".join([*begin, "_", *end])
            lines.append({"begin": " ".join(begin), "gap": gap, "choices": choices, "right": 0})
        write_lines(folder / f"{name}.jsonl", *lines[:NUM_EXAMPLES])
        write_lines(folder / f"{name}_train.jsonl", *lines[NUM_EXAMPLES:])
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\ndata: {{file: {name}.jsonl}}\ntrain: {{file: {name}_train.jsonl}}\ntext: {text}\n"
            f"choices: choices\nlabel: {{field: right}}\nscore: {rule}\nnewlines: as_is\n"
        )


def run(command: list[str], cwd: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command, cwd=cwd, env=environment(tmp_path), capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]


def test_lm_eval_finds_the_same_log_probabilities(tmp_path):
    pytest.importorskip("lm_eval", reason="pip install megamoe[eval]")
    make_run(tmp_path)
    make_tasks(tmp_path)
    words = ["prime", str(tmp_path / "run"), "--shots", "0,2", "--draws", "1"]
    for name in TASKS:
        words += ["--task", str(tmp_path / f"{name}.yaml")]
    assert cli.main([*words, "--write-lm-eval", str(tmp_path / "lm")]) == 0
    run([sys.executable, "-m", "megamoe", *words, "--out", "r.json", "--samples", "s.jsonl"], tmp_path, tmp_path)
    assert cli.main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--no-verify"]) == 0
    ours = json.loads((tmp_path / "r.json").read_text())["results"]
    names = {f"{row['task']}_{row['num_shots']}shot" + "_draw0" * (row["num_shots"] > 0): row for row in ours}
    run(
        [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args",
         f"pretrained={tmp_path / 'hf'},dtype=float32,trust_remote_code=True,add_bos_token=True", "--include_path", ".",
         "--tasks", ",".join(names), "--output_path", "out", "--log_samples", "--device", "cpu", "--batch_size", "4"],
        tmp_path / "lm", tmp_path,
    )  # fmt: skip
    (results,) = (tmp_path / "lm" / "out").glob("*/results_*.json")
    theirs = json.loads(results.read_text())["results"]
    scored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert len(names) == 6
    for name, row in names.items():
        (path,) = (tmp_path / "lm" / "out").glob(f"*/samples_{name}_2*.jsonl")
        samples = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda each: each["doc_id"])
        mine = [each for each in scored if (each["task"], each["num_shots"]) == (row["task"], row["num_shots"])]
        assert len(samples) == len(mine) == NUM_EXAMPLES
        for sample, each in zip(samples, mine, strict=True):
            sums = [float(response[0][0]) for response in sample["resps"]]
            np.testing.assert_allclose(each["log_probabilities"], sums, rtol=0, atol=TOLERANCE)
        assert theirs[name]["acc,none"] == pytest.approx(row["accuracy"])
