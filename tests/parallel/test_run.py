"""`run_rank` from dataset to metrics: what a run records, how it resumes, and that data ranks change nothing."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.data.indexed import IndexedWriter
from megamoe.data.manifest import write_manifest
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.launch.environment import rank_environment
from megamoe.runs.metrics import read_metrics
from megamoe.training.batch_size import global_batch_size
from megamoe.training.main import run_rank
from tests.harness import RanksFailed, run_ranks
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS

TRAINING_KEYS = {
    "step", "time", "loss", "lm_loss", "aux_loss", "perplexity", "grad_norm", "lr", "tokens_per_second", "step_seconds",
    "samples", "tokens", "dropped_fraction", "expert_load_max_over_mean", "skipped_steps", "memory_bytes",
    "global_batch_size", "dropped_first_fraction", "dropped_second_fraction", "expert_load_entropy",
    "expert_load_top_fifth", "expert_load_bottom_fifth", "unused_experts", "router_logit_rms", "spikes",
    "rolled_back_steps",
}  # fmt: skip
SPEED_KEYS = {
    "tokens_per_second_per_rank", "model_flops_per_second", "flops_utilization", "seconds_data", "seconds_forward",
    "seconds_backward", "seconds_all_to_all", "seconds_reduce", "seconds_update", "seconds_pipeline",
}  # fmt: skip
CLOCK_KEYS = {"time", "tokens_per_second", "step_seconds", "memory_bytes"}
OTHER_SECONDS = {"seconds_validate", "seconds_save"}  # of steps after which there was such a thing
PEAK_FLOPS_PER_SECOND = 1e12
VALIDATION_KEYS = {"step", "valid_loss", "valid_perplexity"}
RAMPED_BATCHES = [2, 2, 4, 6, 8, 8, 8, 8]  # from 2 by 2, over the first 9 samples: 3 increments
SETTINGS = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.vocab_size=260",
    "model.seq_length=16", "moe.num_experts=4", "moe.layer_pattern=2", "moe.dropless=true", "optimizer.lr=0.01",
    "optimizer.warmup_steps=2", "optimizer.schedule=constant", "optimizer.eps=0.001", "data.split=[0.8,0.2,0]",
    "run.num_steps=8", "run.micro_batch_size=1", "run.global_batch_size=8", "run.num_eval_batches=2",
    "run.eval_interval_steps=3", "run.batch_size_ramp={start: 2, increment: 2, num_samples: 9}",
    "monitor.log_interval_steps=1", "monitor.sample_prompt=once", "monitor.num_sample_tokens=5",
    "monitor.expert_load_interval_steps=3", f"monitor.peak_flops_per_second={PEAK_FLOPS_PER_SECOND}",
    "checkpoint.save_interval_steps=3", "parallel.zero_stage=1", "parallel.timeout_seconds=60",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    tokenizer = ByteTokenizer()
    texts = ["once upon a time " * (2 + number % 5) for number in range(60)]
    documents = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts]
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        lengths = np.array([len(document) for document in documents])
        writer.add_documents(np.concatenate(documents).astype(writer.dtype), lengths)
    return prefix


def config_of(corpus: Path, run_dir: Path, *more: str) -> Config:
    base = Path(run_dir).parent / "base.yaml"
    base.write_text("{}\n")
    return load_config(str(base), [*SETTINGS, f"data.train=[{{path: {corpus}}}]", f"run.dir={run_dir}", *more])


def train(settings: list[Config]) -> None:
    """Each configuration as a run of its own, as the launcher calls it."""
    rendezvous = rank_environment().init_method
    for number, each in enumerate(settings):
        os.environ["MEGAMOE_INIT_METHOD"] = f"{rendezvous}.{number}"
        run_rank({"config": each.model_dump(mode="json")})


def run(world: int, *settings: Config) -> None:
    run_ranks(train, world, list(settings), init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def lines_of(settings: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training lines and validation lines."""
    lines = read_metrics(Path(settings.run.dir) / "metrics.jsonl")
    return [line for line in lines if "loss" in line], [line for line in lines if "valid_loss" in line]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The same run on one rank, on two data ranks, and on one rank in two parts."""
    root = tmp_path_factory.mktemp("runs")
    one, two = config_of(corpus, root / "one"), config_of(corpus, root / "two", "parallel.expert_parallel_size=2")
    part, whole = config_of(corpus, root / "cut", "run.num_steps=5"), config_of(corpus, root / "cut")
    run(1, one, part)
    # As after a kill at step 5 whose last save was at step 3: the steps after it are repeated.
    checkpoints = root / "cut" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000003\n")
    with open(root / "cut" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss"')  # torn by the kill
    run(1, whole)
    run(2, two)
    return {"one": one, "two": two, "cut": whole}


def test_metrics_have_every_documented_key(runs):
    training, validation = lines_of(runs["one"])
    assert [line["step"] for line in training] == list(range(1, 9))
    for line in training:
        loads = {"dead_experts"} if line["step"] % 3 == 0 else set()
        assert line.keys() - OTHER_SECONDS == TRAINING_KEYS | SPEED_KEYS | loads
        assert all(isinstance(value, int | float) for value in line.values())
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.01 * line["aux_loss"], rel=1e-9)
        assert line["perplexity"] == pytest.approx(np.exp(line["lm_loss"]), rel=1e-9)
        assert line["tokens"] == 16 * line["samples"] and line["tokens_per_second"] > 0
        assert 1 <= line["expert_load_max_over_mean"] <= 4 and line["dropped_fraction"] == 0
    assert [line["lr"] for line in training] == [0.005, *[0.01] * 7]
    assert training[-1]["lm_loss"] < training[0]["lm_loss"] - 0.5  # it learns
    assert [line["step"] for line in validation] == [3, 6, 8]
    assert all(line.keys() == VALIDATION_KEYS for line in validation)
    assert validation[-1]["valid_loss"] < validation[0]["valid_loss"]


def test_time_by_phase_is_that_of_the_step_and_speed_follows_from_it(runs):
    for name, num_ranks in (("one", 1), ("two", 2)):
        training, _ = lines_of(runs[name])
        in_phases = [sum(line[key] for key in SPEED_KEYS if key.startswith("seconds_")) for line in training]
        in_steps = [line["step_seconds"] for line in training]
        if num_ranks == 1:  # step_seconds are rank 0's; others wait in a step for what it does between steps
            assert all(phases <= 1.01 * step for phases, step in zip(in_phases, in_steps, strict=True))
            assert sum(in_phases[1:]) > 0.9 * sum(in_steps[1:])  # of all, for a busy machine may interrupt any of them
        for line in training:
            assert line["tokens_per_second_per_rank"] == pytest.approx(line["tokens_per_second"] / num_ranks)
            # 6 FLOPs for each weight of a product, and causal attention: 6 s h in every layer.
            weights = 4 * 32**2 * 2 + 2 * 32 * 128 * (1 + 2) + 4 * 32 + 32 * 384
            per_token = 6 * (weights + 2 * 16 * 32)
            assert line["model_flops_per_second"] == pytest.approx(per_token * line["tokens_per_second"])
            share = line["model_flops_per_second"] / (num_ranks * PEAK_FLOPS_PER_SECOND)
            assert line["flops_utilization"] == pytest.approx(share)
        assert all(line["seconds_all_to_all"] > 0 for line in training) == (name == "two")
        validating = [line["step"] for line in training if "seconds_validate" in line]
        assert validating == [4, 7], "a line tells what came before it"


def test_expert_loads_are_kept_by_layer(runs):
    """Of the one MoE layer: all choices of three steps, the batch being ramped; what a resumed run repeats is cut."""
    for name in ("one", "cut"):
        lines = read_metrics(Path(runs[name].run.dir) / "expert_loads.jsonl")
        assert [line["step"] for line in lines] == [3, 6]
        assert [list(line["layers"]) for line in lines] == [["1"], ["1"]]
        choices = [sum(line["layers"]["1"]) for line in lines]
        assert choices == [2 * 16 * sum(RAMPED_BATCHES[:3]), 2 * 16 * sum(RAMPED_BATCHES[3:6])]
    training, _ = lines_of(runs["one"])
    dead = {line["step"]: line["dead_experts"] for line in training if "dead_experts" in line}
    counts = read_metrics(Path(runs["one"].run.dir) / "expert_loads.jsonl")
    assert dead == {line["step"]: line["layers"]["1"].count(0) for line in counts}


def test_batch_size_ramp_is_followed_and_recorded(runs):
    training, _ = lines_of(runs["one"])
    expected, consumed = [], 0
    for _ in training:
        expected.append(global_batch_size(runs["one"].run, consumed))
        consumed += expected[-1]
    assert expected == RAMPED_BATCHES
    assert [line["global_batch_size"] for line in training] == expected
    assert [line["samples"] for line in training] == np.cumsum(expected).tolist()


def test_run_folder_holds_what_is_promised(runs):
    folder = Path(runs["one"].run.dir)
    assert {"config.yaml", "log.txt", "metrics.jsonl", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert load_config(str(folder / "config.yaml")) == runs["one"]
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000008\n"
    log = (folder / "log.txt").read_text()
    assert "step 8/8" in log and "sample: once" in log and "valid loss" in log and "saved " in log
    manifest = json.loads((folder / "checkpoints" / "step_00000008" / "manifest.json").read_text())
    assert manifest["state"]["samples"] == 46


def test_resumed_run_repeats_nothing_in_its_metrics(runs):
    """Every step stands there once, with the numbers of the run that did not stop."""
    for uncut, cut in zip(lines_of(runs["one"]), lines_of(runs["cut"]), strict=True):
        assert [line["step"] for line in cut] == [line["step"] for line in uncut]
        for mine, other in zip(cut, uncut, strict=True):
            timeless = mine.keys() - CLOCK_KEYS - SPEED_KEYS - OTHER_SECONDS
            assert {key: mine[key] for key in timeless} == {key: other[key] for key in timeless}
    log = (Path(runs["cut"].run.dir) / "log.txt").read_text()
    assert "resumed at step 3 of 8" in log


def test_what_is_recorded_is_drawn_and_told(runs, tmp_path, capsys):
    folders = [runs[name].run.dir for name in ("one", "two", "cut")]
    assert main(["report", *folders, "--output", str(tmp_path), "--no-png"]) == 0
    text = (tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    lines = {(line["run"], line["metric"]): line["y"] for line in data["charts"]["loss"]["lines"]}
    for number, name in enumerate(("one", "two", "cut")):
        training, validation = lines_of(runs[name])
        assert data["runs"][number][0]["tokens"] == [line["tokens"] for line in training]
        assert lines[number, 0] == pytest.approx([line["lm_loss"] for line in training], rel=1e-5)
        assert lines[number, 2] == pytest.approx([line["valid_loss"] for line in validation], rel=1e-5)
    capsys.readouterr()
    assert main(["status", folders[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "finished" and told["step"] == told["checkpoint_step"] == 8
    assert told["training"] == lines_of(runs["one"])[0][-1]


def test_data_ranks_see_the_same_global_batches(runs):
    for on_one, on_two in zip(lines_of(runs["one"]), lines_of(runs["two"]), strict=True):
        assert len(on_one) == len(on_two)
        for mine, other in zip(on_two, on_one, strict=True):
            for key in {"lm_loss", "aux_loss", "grad_norm", "valid_loss"} & mine.keys():
                assert mine[key] == pytest.approx(other[key], rel=1e-5), (key, mine["step"])
            assert mine.get("samples") == other.get("samples")


def test_a_sample_needs_the_tokenizer_of_the_data(corpus, tmp_path):
    for ending in (".bin", ".idx"):
        shutil.copyfile(f"{corpus}{ending}", tmp_path / f"text{ending}")
    write_manifest(tmp_path / "text", {"tokenizer": {"kind": "sentencepiece", "vocab_size": 260, "sha256": "0"}})
    with pytest.raises(RanksFailed, match=r"text was written with another tokenizer than data\.tokenizer: its kind is"):
        run(1, config_of(tmp_path / "text", tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
