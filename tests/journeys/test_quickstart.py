"""The quickstart, from a clean clone into a fresh environment without a working compiler, twice."""

import json
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.cli import main
from megamoe.config.schema import TokenizerConfig
from megamoe.data.indexed import IndexedDataset
from megamoe.data.tokenizers import build_tokenizer
from megamoe.runs.metrics import read_metrics
from megamoe.verification.hf_logits import hf_logits
from megamoe.verification.own_logits import own_logits
from megamoe.verification.text_loss import mean_loss
from tests.browser import Browser, BrowserMissing
from tests.journeys.clone import clean_environment, clone

# A short run: the script itself takes as many steps as its preset says.
ARGUMENTS = (
    "run.num_steps=20 run.eval_interval_steps=0 optimizer.warmup_steps=5 monitor.log_interval_steps=1 "
    "run.num_eval_batches=2 monitor.num_sample_tokens=10"
)
SECOND_RUN_SECONDS = 45.0  # most of it is starting Python; the machine may be busy


def run_quickstart(repository: Path, environment: dict[str, str], timeout_seconds: float) -> str:
    done = subprocess.run(
        ["bash", repository / "launch_scripts" / "quickstart.sh"], cwd=repository.parent,  # any folder will do
        env=environment | {"MEGAMOE_QUICKSTART_ARGS": ARGUMENTS}, capture_output=True, text=True,
        timeout=timeout_seconds, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-10_000:]
    return text


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_from_a_clean_clone_into_a_fresh_environment(tmp_path):
    repository = tmp_path / "megamoe"
    clone(repository)
    environment = clean_environment(tmp_path)

    first = run_quickstart(repository, environment, 800)
    run = repository / "runs" / "quickstart"
    assert (repository / ".venv" / "pyvenv.cfg").exists(), "a virtual environment of its own"
    for made in ("quickstart_data/tokenizer.model", "quickstart_data/text.bin", "quickstart_data/text.idx"):
        assert (repository / "runs" / made).stat().st_size > 0
    assert (run / "config.yaml").exists() and any((run / "checkpoints").iterdir())
    lines = read_metrics(run / "metrics.jsonl")
    losses = [line["lm_loss"] for line in lines if "lm_loss" in line]
    assert len(losses) == 20
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5, losses
    assert lines[-1]["valid_loss"] < losses[0]
    assert re.search(r"And God said\W+\w+", first), "a sampled sentence"
    assert "  metrics      runs/quickstart/metrics.jsonl\n" in first

    metrics = (run / "metrics.jsonl").read_bytes()
    written = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*") if path.is_file()}
    started = time.monotonic()
    second = run_quickstart(repository, environment, 120)
    assert time.monotonic() - started < SECOND_RUN_SECONDS
    assert second.count("nothing to do") == 2, "tokenizer and dataset are there"
    assert "Installing" not in second and "Making a virtual environment" not in second
    assert (run / "metrics.jsonl").read_bytes() == metrics, "no step was trained again"
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*") if path.is_file()} == written
    check_export(repository, run, tmp_path)
    check_report(run)


def check_report(run: Path) -> None:
    """The page of the run shows what was trained, asks nobody for anything, and has nothing to complain of."""
    assert main(["report", str(run)]) == 0
    try:
        with Browser() as browser:
            page = browser.open(run / "report" / "report.html", width=1280, height=900)
            assert page.problems == [] and page.requests == []
            text = page.run("document.body.innerText")
    except BrowserMissing as reason:
        pytest.skip(f"all is well but for the report, which was not looked at: {reason}")
    assert "all 20 steps are done" in text and "TP2 × PP2 × EP2" in text


def check_export(repository: Path, run: Path, tmp_path: Path) -> None:
    """The trained model exports, and has by transformers the perplexity it has by megamoe; its tokenizer the ids."""
    import transformers

    folder = tmp_path / "exported"
    tokenizer_path = repository / "runs" / "quickstart_data" / "tokenizer.model"
    assert main(["convert", "to-hf", str(run), str(folder), "--drops-off", "--tokenizer", str(tokenizer_path)]) == 0
    assert json.loads((folder / "verification.json").read_text())["results"][0]["is_good"]
    dataset = IndexedDataset(repository / "runs" / "quickstart_data" / "text")
    ids = dataset.tokens(50_000, 50_000 + 8 * 129, vocab_size=4096).reshape(8, 129).astype(np.int64)
    checkpoint = resolve_checkpoint(run)
    ours, theirs = (
        mean_loss(logits, ids[:, 1:])
        for logits in (own_logits(checkpoint, ids[:, :-1]), hf_logits(folder, ids[:, :-1]))
    )
    assert theirs == pytest.approx(ours, rel=1e-4) and ours < 8.0
    text = "And God said, Let there be light:\nand there was light."
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    own = build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(tokenizer_path)))
    assert tokenizer(text)["input_ids"] == own.encode(text)

