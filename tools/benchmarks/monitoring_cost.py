"""What monitoring and the watchdog cost: steps of one run with both on and off, in turns, on ranks of this machine.

On is the default: the watchdog, a line of metrics every 10 steps, loads of experts, an offline run of Weights & Biases
in its own process. Off is nothing of that. Every round trains the same steps once with and once without, in an order
that changes, in ranks forked from one process that has imported once; steps count from when the tracking process has
started. Compared are the medians of the first rank's step times, which leave out the steps that write, and their sums,
which do not.

    python tools/benchmarks/monitoring_cost.py --ranks 1 --rounds 6
    python tools/benchmarks/monitoring_cost.py --ranks 2 --rounds 6 --only-watchdog
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GOAL = 1.02
WARM_UP_STEPS = 100  # the tracking process imports for seconds
QUIET = ("monitor.log_interval_steps=100000", "monitor.expert_load_interval_steps=0", "monitor.wandb_mode=disabled")
LOUD = ("monitor.log_interval_steps=10", "monitor.expert_load_interval_steps=100", "monitor.wandb_mode=offline")


def run_timed(payload: dict) -> None:
    """A rank: run_rank, with the seconds of every step but the first ones written to a file by rank 0."""
    from megamoe.launch.environment import rank_environment
    from megamoe.training.build import Trainer
    from megamoe.training.main import run_rank

    usual, began = Trainer.train_step, []

    def noted(trainer: Trainer, *arguments):
        began.append(time.perf_counter())
        return usual(trainer, *arguments)

    Trainer.train_step = noted
    run_rank({"config": payload["config"]})
    if rank_environment().rank == 0:
        seconds = [later - earlier for earlier, later in itertools.pairwise(began)]
        Path(payload["times"]).write_text(json.dumps(seconds[WARM_UP_STEPS:]))


def corpus(folder: Path) -> Path:
    import numpy as np

    from megamoe.data.indexed import IndexedWriter

    tokens = np.random.default_rng(1).integers(0, 256, 200_000)
    with IndexedWriter(folder / "text", 256) as writer:
        writer.add_documents(tokens.astype(writer.dtype), np.full(20, 10_000))
    return folder / "text"


def settings(setting: str, options: argparse.Namespace) -> list[str]:
    monitor = LOUD if setting == "on" and not options.only_watchdog else QUIET
    return [f"watchdog.enabled={str(setting == 'on').lower()}", *monitor]


def times_of(server, folder: Path, number: int, setting: str, options: argparse.Namespace) -> list[float]:
    from megamoe.config.loading import load_config

    base, times = folder / "base.yaml", folder / f"{number}.{setting}.json"
    base.write_text("{}\n")
    config = load_config(str(base), [
        "model.num_layers=4", f"model.hidden_size={options.hidden}", "model.vocab_size=256", "model.seq_length=64",
        "model.num_attention_heads=4", "moe.num_experts=8", f"parallel.expert_parallel_size={options.ranks}",
        f"run.global_batch_size={2 * options.ranks}", f"run.num_steps={options.steps + WARM_UP_STEPS + 1}",
        "run.num_eval_batches=0", "checkpoint.save_at_end=false",
        f"run.dir={folder / f'{number}.{setting}'}", f"data.train=[{{path: {folder / 'text'}}}]",
        *settings(setting, options),
    ])  # fmt: skip
    payload = {"config": config.model_dump(mode="json"), "times": str(times)}
    ranks = range(options.ranks)
    result = server.run("tools.benchmarks.monitoring_cost:run_timed", payload, num_ranks=options.ranks,
                        captured_ranks=ranks)  # fmt: skip
    if result.failure is not None:
        raise SystemExit(result.failure.report)
    return json.loads(times.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--only-watchdog", action="store_true", help="leave the rest of monitoring off both times")
    options = parser.parse_args()
    from megamoe.launch.local import RankServer

    server, ratios, all_times = RankServer(), [], {"off": [], "on": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus(folder)
        failure, _ = server.import_modules(["megamoe.training.main", "tools.benchmarks.monitoring_cost"])
        if failure is not None:
            raise SystemExit(failure.report)
        for number in range(options.rounds):
            seconds = {}
            for setting in sorted(("off", "on"), reverse=bool(number % 2)):
                seconds[setting] = times_of(server, folder, number, setting, options)
                all_times[setting] += seconds[setting]
            medians = {setting: statistics.median(times) for setting, times in seconds.items()}
            ratios.append(sum(seconds["on"]) / sum(seconds["off"]))
            print(
                f"round {number + 1}: a step off {1e3 * medians['off']:.2f} ms, on {1e3 * medians['on']:.2f} ms, ratio "
                f"{medians['on'] / medians['off']:.4f}, of all together {ratios[-1]:.4f}", flush=True,
            )  # fmt: skip
    server.close()
    ratio = statistics.median(all_times["on"]) / statistics.median(all_times["off"])
    print(f"ratio of the medians of all steps {ratio:.4f}, median of the rounds' ratios of all steps together "
          f"{statistics.median(ratios):.4f}, goal {GOAL}")  # fmt: skip


if __name__ == "__main__":
    main()
