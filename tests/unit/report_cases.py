"""Folders of runs that never were: metrics, events, attempts and expert loads as training would have written them."""

import json
import math
import random
from pathlib import Path
from typing import Any

START = 1_767_225_600.0  # 2026-01-01
HOSTILE = "</title></script><script>window.owned = 1</script><img src=x onerror='window.owned=1'>\x1b[31m‮&amp;\""

CONFIG = """\
model: {num_layers: 8, hidden_size: 512, num_attention_heads: 8, vocab_size: 51200, seq_length: 1024}
moe: {num_experts: 16, top_k: 2, layer_pattern: 2}
parallel: {tensor_parallel_size: 2, pipeline_parallel_size: 1, expert_parallel_size: 4, zero_stage: 1}
optimizer: {name: adamw, lr: 0.0006, schedule: cosine, warmup_steps: 200}
checkpoint: {save_interval_steps: 500}
monitor: {log_interval_steps: 10}
run: {num_steps: 6000, global_batch_size: 256, precision: fp16}
"""
PHASES = {
    "seconds_data": 0.02, "seconds_forward": 0.52, "seconds_backward": 0.98, "seconds_all_to_all": 0.31,
    "seconds_reduce": 0.17, "seconds_update": 0.11, "seconds_pipeline": 0.09,
}  # fmt: skip


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def training_line(step: int, *, seed: int = 0, drop: float = 1.0, with_time: bool = True) -> dict[str, Any]:
    """One line of metrics; `drop` scales how fast the loss falls."""
    noise = random.Random(1_000_003 * seed + step)
    lm_loss = 2.1 + 8.6 * math.exp(-drop * step / 700) + 0.9 / (1 + step / 900) + noise.gauss(0, 0.035)
    if 2_800 <= step < 2_860:
        lm_loss += 2.4 * math.exp(-(step - 2_800) / 20)
    seconds = 2.2 * (1.0 + 0.03 * noise.random())
    step_phases = {key: value * (1 + 0.08 * noise.random()) for key, value in PHASES.items()}
    line = {
        "step": step, "loss": lm_loss + 0.04, "lm_loss": lm_loss, "perplexity": math.exp(lm_loss),
        "grad_norm": 0.4 + 3 * math.exp(-step / 300) + 0.15 * noise.random() ** 3 * 4,
        "lr": 6e-4 * min(step / 200, 0.5 + 0.5 * math.cos(math.pi * step / 6000)), "samples": 256 * step,
        "tokens": 256 * 1024 * step, "tokens_per_second": 256 * 1024 / seconds,
        "tokens_per_second_per_rank": 256 * 1024 / seconds / 16, "step_seconds": seconds, "global_batch_size": 256,
        "skipped_steps": 1 if step < 1500 else 3 if step < 4100 else 4,
        "memory_bytes": int(41e9 + 2e9 * (step > 2000)), "loss_scale": 2.0 ** (10 + step // 1500 - 2 * (step > 4100)),
        "flops_utilization": 0.41 * 2.2 / seconds, "model_flops_per_second": 1.9e15 * 2.2 / seconds,
        "aux_loss": 4.0 + 0.8 * math.exp(-step / 400) + 0.02 * noise.random(), "z_loss": 0.4 + 0.1 * noise.random(),
        "dropped_fraction": 0.02 + 0.2 * math.exp(-step / 300), "dropped_first_fraction": 0.01,
        "dropped_second_fraction": 0.03 + 0.3 * math.exp(-step / 300),
        "expert_load_max_over_mean": 1.25 + 2 * math.exp(-step / 500) + 0.1 * noise.random(),
        "expert_load_entropy": 0.985 - 0.2 * math.exp(-step / 500), "expert_load_top_fifth": 0.24,
        "expert_load_bottom_fifth": 0.17, "unused_experts": 3 if step < 300 else 0, "router_logit_rms": 1.1,
        **step_phases,
    }  # fmt: skip
    return line | ({"time": START + 60 + 2.4 * step + 1800 * (step > 3_000)} if with_time else {})


def metrics(last_step: int, *, interval: int = 10, **options: Any) -> list[dict[str, Any]]:
    lines = []
    for step in [1, *range(interval, last_step + 1, interval)]:
        lines.append(training_line(step, **options))
        if step % 250 == 0:
            loss = lines[-1]["lm_loss"] + 0.08
            lines.append(
                {"step": step, "valid_loss": loss, "valid_perplexity": math.exp(loss), "valid_loss/books": loss - 0.3,
                 "valid_loss/web": loss + 0.1, "valid_loss/code": loss - 0.9, "time": lines[-1].get("time", START)}
            )  # fmt: skip
    return lines


def events(last_step: int, *, ended: bool = True) -> list[dict[str, Any]]:
    def event(kind: str, step: int, message: str, **more: Any) -> dict[str, Any]:
        moment = START + 2.4 * step + 1800 * (step > 3_100)
        return {"time": moment, "kind": kind, "message": message, "step": step} | more

    found = [event("start", 0, "training from step 0", attempt=1, world_size=16, hosts=["node1", "node2"])]
    for step in range(500, last_step + 1, 500):
        found.append(event("save", step, f"step {step} saved", seconds=3.4))
    found += [
        event("spike", 2800, "loss 5.1 where 2.7 was expected", loss=5.1, expected=2.7),
        event("roll_back", 2860, "went back to step 2800", to_step=2800, skipped_samples=512),
        event("failed", 3070, "rank 9 on node2 was killed by signal 9", rank=9, host="node2", phase="backward"),
        event("requeue", 3070, "node2 is left out", attempt=1, excluded_hosts=["node2"]) | {"step": None},
    ]
    again = event("start", 3000, "resumed at step 3000", attempt=2, world_size=16, hosts=["node1", "node3"])
    alert = event("alert", 4100, "two experts get no tokens", level="warn")
    found += [again | {"time": START + 2.4 * 3000 + 1800}, alert]
    if ended:
        found.append(event("end", last_step, "all steps are done"))
    return sorted(found, key=lambda each: each["time"])


def loads(last_step: int, layers: dict[int, int], *, interval: int = 50) -> list[dict[str, Any]]:
    lines = []
    for step in range(interval, last_step + 1, interval):
        rows = {}
        for layer, size in layers.items():
            noise = random.Random(7919 * layer)
            spread = 0.15 + 0.9 * math.exp(-step / 900)
            rows[str(layer)] = [round(1000 * math.exp(noise.gauss(0, spread))) for _ in range(size)]
            if step < 1200:
                rows[str(layer)][layer % size] = 0
        lines.append({"step": step, "layers": rows})
    return lines


def write_run(folder: Path, *, last_step: int = 6000, ended: bool = True, **options: Any) -> Path:
    """A whole run of 6000 steps: two attempts, a spike, a roll-back, four skipped steps."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    write_lines(folder / "metrics.jsonl", metrics(last_step, **options))
    write_lines(folder / "events.jsonl", events(last_step, ended=ended))
    write_lines(folder / "expert_loads.jsonl", loads(last_step, {1: 16, 3: 16, 5: 16, 7: 16}))
    record = {"id": "a", "started": START - 5, "hosts": ["node1", "node2"], "step_before": 0, "num_events": 0}
    write_lines(
        folder / "attempts.jsonl",
        [
            record | {"attempt": 1, "ended": None},
            record | {"attempt": 1, "ended": START + 7400, "exit_code": 1, "step_after": 3000, "verdict": "requeue",
                      "reason": "a rank was killed"},
            record | {"attempt": 2, "started": START + 8860, "step_before": 3000, "hosts": ["node1", "node3"]},
        ],
    )  # fmt: skip
    return folder
