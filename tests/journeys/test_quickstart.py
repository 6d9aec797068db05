"""The quickstart, from a clean clone into a fresh environment without a working compiler, twice."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from megamoe.training.metrics import read_metrics
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
@pytest.mark.timeout(900)
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
