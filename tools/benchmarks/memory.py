"""Peak memory of every rank beside what the rank has to hold: weights, gradients, optimizer state.

Each rank first trains a toy model in the same layout, so that libraries, threads and connections are there, and notes
what its process takes (baseline). Then it builds the real trainer (built), trains a few steps on random tokens, and
reads the peak. What is left of peak - baseline after weights, gradients and optimizer state (rest) is activations,
ZeRO's buckets and flat copies of gradients, buffers of the collectives, and the allocator's slack. On a GPU the
allocator's own peak is read, and the baseline is 0.

    python tools/benchmarks/memory.py                                           # four layouts of laptop-moe
    python tools/benchmarks/memory.py --layout "2 parallel.zero_stage=2" --layout "4 parallel.expert_parallel_size=4"
    python tools/benchmarks/memory.py --preset quickstart --layout 8 run.micro_batch_size=1

A layout is a number of ranks and overrides for it alone; overrides after the options hold for all.
"""

import argparse
import gc
import sys
from typing import Any

import torch
from local_runs import (
    RandomSamples,
    configuration,
    device,
    layout_name,
    machine,
    run_on_ranks,
    split_layout,
    take_steps,
)

from megamoe.config.schema import Config
from megamoe.errors import MegamoeError

CUT = "parallel.tensor_parallel_size=2 parallel.pipeline_parallel_size=2 parallel.expert_parallel_size=2"
LAYOUTS = (
    "1",
    "2 parallel.expert_parallel_size=2 parallel.zero_stage=1",
    f"8 {CUT} parallel.zero_stage=1",
    f"8 {CUT} parallel.zero_stage=2",
)
COLUMNS = (
    "rank", "baseline", "built", "peak", "peak - base", "weights", "gradients", "optimizer", "sum", "rest", "ratio"
)  # fmt: skip


def measure(config: Config, num_steps: int) -> dict[str, Any]:
    """On a rank: bytes by name. Collective."""
    from megamoe.training.build import build_trainer
    from megamoe.training.report import state_bytes

    train_toy(config)
    baseline = resident_bytes("VmRSS")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(config, device())
    built = resident_bytes("VmRSS")
    take_steps(trainer, RandomSamples(config), num_steps)
    if torch.cuda.is_available():
        baseline, built, peak = 0, 0, torch.cuda.max_memory_allocated()
    else:
        peak = resident_bytes("VmHWM")
    measured = {"baseline": baseline, "built": built, "peak": peak, **state_bytes(trainer)}
    torch.distributed.barrier()
    trainer.close()
    return measured


def train_toy(config: Config) -> None:
    """One step of a model of the same family and layout that weighs next to nothing."""
    from megamoe.training.build import build_trainer

    model, tensor = config.model, config.parallel.tensor_parallel_size
    sizes = {
        "hidden_size": 8 * model.num_attention_heads, "head_dim": 8, "ffn_hidden_size": 8 * tensor,
        "vocab_size": 128 * tensor, "vocab_size_multiple": 128, "seq_length": 8 * tensor,
    }  # fmt: skip
    moe = config.moe.model_copy(update={"expert_ffn_hidden_size": 8 * tensor})
    toy = config.model_copy(update={"model": model.model_copy(update=sizes), "moe": moe})
    trainer = build_trainer(toy, device())
    take_steps(trainer, RandomSamples(toy), 1)
    torch.distributed.barrier()
    trainer.close()
    gc.collect()


def resident_bytes(field: str) -> int:
    """What the kernel says of this process: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    raise MegamoeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def table(rows: list[dict[str, Any]]) -> str:
    """A line a rank, in MiB."""
    lines = [" | ".join(f"{name:>11}" for name in COLUMNS)]
    for rank, row in enumerate(rows):
        held = row["weights"] + row["gradients"] + row["optimizer"]
        used = row["peak"] - row["baseline"]
        sizes = (
            row["baseline"], row["built"], row["peak"], used,
            row["weights"], row["gradients"], row["optimizer"], held, used - held,
        )  # fmt: skip
        cells = [f"{rank:>11}", *(f"{size / 2**20:>11.1f}" for size in sizes), f"{used / held:>11.2f}"]
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark; 0, or 2 after printing what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--preset", default="laptop-moe", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--layout", action="append", help='"RANKS [section.key=value ...]"; may be repeated')
    parser.add_argument("--steps", type=int, default=2, help="steps before the peak is read (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every layout")
    arguments = parser.parse_args()
    try:
        print(f"{arguments.preset}, MiB; ratio = (peak - base) / sum. {machine()}")
        for text in arguments.layout or LAYOUTS:
            num_ranks, own = split_layout(text)
            config = configuration(arguments.preset, *arguments.overrides, *own)
            print(f"\n{layout_name(config, num_ranks)}", flush=True)
            print(table(run_on_ranks("memory", "measure", config, num_ranks, num_steps=arguments.steps)), flush=True)
    except MegamoeError as error:
        print(f"memory: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
