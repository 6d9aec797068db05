"""What is recorded of whole runs: one that is killed and goes on has every step once; each corpus has its loss."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megamoe.data.datasets import open_splits
from megamoe.data.indexed import IndexedWriter
from megamoe.runs.events import read_events
from megamoe.runs.metrics import read_metrics
from tests.parallel.test_run import config_of, corpus, run  # noqa: F401 (a fixture)
from tests.parallel.test_signals import ranks_of, start, wait_for_step
from tests.unit.wandb_cases import quiet, stored_runs


@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_as_the_same_run_without_gaps_or_doubles(corpus, tmp_path, monkeypatch):  # noqa: F811
    """All ranks by SIGKILL at some step behind the checkpoint, with its feeder, as when a node is lost."""
    quiet(monkeypatch, tmp_path)
    run_dir = tmp_path / "run"
    settings = config_of(
        corpus, run_dir, "run.num_steps=60", "run.eval_interval_steps=0", "checkpoint.save_interval_steps=10",
        "monitor.wandb_mode=offline", "monitor.sample_prompt=null",
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    process = start(path, "run.num_steps=1000000")
    wait_for_step(process, run_dir, 25)
    feeders = [int(each) for each in Path(f"/proc/{ranks_of(process)[0]}/task").glob("*/children") for each in
               each.read_text().split()]  # fmt: skip
    for pid in (*feeders, *ranks_of(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    killed_at = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    assert feeders and killed_at >= 25

    process = start(path, f"run.num_steps={killed_at + 5}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"of {killed_at + 5}" in output, output
    runs = stored_runs(run_dir)
    assert {each.run.run_id for each in runs if each.history} == {(run_dir / "wandb_run_id").read_text().strip()}
    assert [step for each in runs for step in each.steps] == list(range(1, killed_at + 6))
    assert "time/backward_seconds" in runs[-1].history[0]
    saved = [event["step"] for event in read_events(run_dir) if event["kind"] == "save"]
    assert {10, killed_at + 5} <= set(saved)  # that of step 20 may have been killed before it was told of


def corpus_of(prefix: Path, tokens: np.ndarray) -> Path:
    with IndexedWriter(prefix, 260) as writer:
        writer.add_documents(tokens.astype(writer.dtype), np.array([len(tokens)]))
    return prefix


def test_each_corpus_has_its_loss_and_they_add_up_to_the_whole(corpus, tmp_path):  # noqa: F811
    """Text, and noise that nobody can learn: on one rank, and on two stages of which each has two data ranks."""
    noise = corpus_of(tmp_path / "noise", np.random.default_rng(0).integers(0, 256, 4000))
    valid = f"data.valid=[{{path: {corpus}, weight: 3}}, {{path: {noise}, weight: 1, name: static}}]"
    common = (valid, "monitor.sample_prompt=null", "run.batch_size_ramp=null")
    one = config_of(corpus, tmp_path / "one", *common, "run.micro_batch_size=2")
    layout = ("parallel.pipeline_parallel_size=2", "parallel.expert_parallel_size=2")
    four = config_of(corpus, tmp_path / "four", *common, *layout)
    run(1, one)
    run(4, four)
    splits = open_splits(one.data, seq_length=16, vocab_size=260, seed=1)
    share = np.mean([splits.valid.locate(index)[0] == 0 for index in range(2 * 8)])
    assert 0.7 < share < 0.8
    for each in (one, four):
        lines = [line for line in read_metrics(Path(each.run.dir) / "metrics.jsonl") if "valid_loss" in line]
        assert [line["step"] for line in lines] == [3, 6, 8]
        for line in lines:
            assert line.keys() == {"step"} | {
                f"valid_{what}{name}" for what in ("loss", "perplexity") for name in ("", "/text", "/static")
            }
            whole = share * line["valid_loss/text"] + (1 - share) * line["valid_loss/static"]
            assert whole == pytest.approx(line["valid_loss"], rel=1e-6)
            assert line["valid_perplexity/text"] == pytest.approx(np.exp(line["valid_loss/text"]))
        assert lines[-1]["valid_loss/static"] > lines[-1]["valid_loss/text"] + 0.5
        last = lines
    first = [line for line in read_metrics(tmp_path / "one" / "metrics.jsonl") if "valid_loss" in line]
    for mine, other in zip(last, first, strict=True):
        assert mine["valid_loss/static"] == pytest.approx(other["valid_loss/static"], rel=1e-4)
