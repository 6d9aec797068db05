"""Ladders whose answer is known: two families on power laws of compute, a constant factor apart."""

from pathlib import Path

import numpy as np

from megamoe.study.ladder import StudyRun, study_runs
from megamoe.study.points import Point, SetScore
from megamoe.study.schema import StudySettings, read_study

LAW = {"offset": 1.5, "scale": 2.0, "exponent": 0.15, "unit": 1e15}
SIZES = (1e15, 2.5e15, 6e15, 1.5e16)
NUM_TOKENS, STEPS = 4_000_000, (250, 500, 750, 1000)


def law_loss(flops: float, factor: float) -> float:
    """What a family reaches with `flops` whose compute is worth `factor` times as much."""
    return LAW["offset"] + LAW["scale"] * (factor * flops / LAW["unit"]) ** -LAW["exponent"]


def ladder(
    factors: dict[str, float], *, seeds: dict[str, int] | None = None, deviation: float = 0.0, text_se: float = 0.0,
    text_error: float = 0.0, own_text_error: float = 0.0, generator: np.random.Generator | None = None,
    sizes: tuple[float, ...] = SIZES, out_of_domain: dict[str, float] | None = None,
) -> list[Point]:  # fmt: skip
    """Points of all families: models NAME-0, … at `sizes` of compute, with checkpoints on the way that are worse.

    factors: by family what its compute is worth. seeds: by model how many (1). deviation: of a seed's loss; text_error:
    what the texts at hand add to every model's; own_text_error: the deviation of what they add to each model's alone.
    out_of_domain: factors of a second domain, half a nat above.
    """
    generator = generator or np.random.default_rng(0)
    points = []
    for family, factor in factors.items():
        for place, flops in enumerate(sizes):
            model, of_text = f"{family}-{place}", text_error + own_text_error * generator.standard_normal()
            for seed in range(1, (seeds or {}).get(model, 1) + 1):
                luck = deviation * generator.standard_normal()
                for number, step in enumerate(STEPS):
                    share = step / STEPS[-1]
                    late = 0.0 if number == len(STEPS) - 1 else 0.05 / share
                    loss = law_loss(flops * share, factor) + late + luck + of_text
                    sets = {"docs": SetScore("in_domain", 200_000, loss, text_se, loss / 3.0, text_se / 3.0)}
                    if out_of_domain is not None:
                        other = law_loss(flops * share, out_of_domain[family]) + late + luck + 0.5
                        sets["essays"] = SetScore("out_of_domain", 100_000, other, text_se, other / 3.0, text_se / 3.0)
                    points.append(
                        Point(
                            model, family, seed, step, int(NUM_TOKENS * share), step == STEPS[-1], flops * share,
                            0.8 * flops * share, 60.0 * share * flops / 1e15 * (1.5 if factor > 1 else 1.0),
                            int(1e9 * (3 if factor > 1 else 1) * (1 + place)),
                            int(1e6 * (8 if factor > 1 else 1)) << place, int(1e6) << place, sets,
                        )
                    )  # fmt: skip
    return points


TINY_STUDY = """\
name: tiny
common:
  preset: laptop-dense
  model: {num_layers: 2, hidden_size: 16, num_attention_heads: 2, vocab_size: 260, seq_length: 32}
  optimizer: {lr: 2e-2, warmup_steps: 2}
  data: {train: [{path: train}], split: [1.0, 0.0, 0.0], tokenizer: {kind: byte}}
  monitor: {wandb_mode: disabled, log_interval_steps: 1, progress_bar: false, expert_load_interval_steps: 0}
  run: {global_batch_size: 4, micro_batch_size: 4, num_eval_batches: 0, device: cpu}
num_tokens: 1024
evaluate_at_tokens: [512]
may_differ: []
models:
  - {name: dense-0, family: dense, seeds: [1, 2]}
  - {name: moe-0, family: moe, settings: {moe: {num_experts: 4}}}
  - {name: dense-1, family: dense, settings: {model: {hidden_size: 32}}}
  - {name: moe-1, family: moe, settings: {model: {hidden_size: 32}, moe: {num_experts: 4}}}
evaluation: {sets: sets.yaml}
analysis: {num_replicates: 50, compute_vocab_size: null}
"""
TINY_SETS = """\
sets:
  - {name: verses, path: held_out.txt, domain: in_domain}
  - {name: letters, path: other.txt, domain: out_of_domain, reading: documents}
"""


def load_tiny(folder: Path) -> tuple[StudySettings, tuple[StudyRun, ...]]:
    study = read_study(folder / "study.yaml")
    return study, study_runs(study, "study.yaml")
