"""How long training stands still for an asynchronous save, beside one copy of the same bytes in memory.

One rank, a model of about the asked size in memory. Saves and plain copies alternate; the medians are compared.

    python tools/benchmarks/checkpoint_stall.py --mebibytes 512
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GOAL = 1.2
HIDDEN = 256


def settings(mebibytes: int, precision: str):
    """A configuration whose owned state is close to `mebibytes`: 12 bytes a parameter in fp32, 14 in bf16."""
    from megamoe.config.schema import Config

    expert = 2 * HIDDEN * 4 * HIDDEN + 5 * HIDDEN
    dense = 4 * HIDDEN * HIDDEN + 256 * HIDDEN
    num_parameters = mebibytes * 2**20 // (14 if precision == "bf16" else 12)
    num_experts = max(1, round((num_parameters - dense) / expert))
    return Config.model_validate(
        {
            "model": {"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 8, "vocab_size": 256,
                      "seq_length": 8},
            "moe": {"num_experts": num_experts, "layer_pattern": 1, "top_k": 1},
            "run": {"precision": precision},
        }
    )  # fmt: skip


def measure(mebibytes: int, precision: str, repeats: int, folder: str) -> dict[str, float]:
    """Seconds of a stall and of a copy (medians), and the bytes of the state."""
    import torch

    from megamoe.launch.environment import rank_environment
    from megamoe.training.build import build_trainer
    from megamoe.training.distributed import initialize_distributed
    from megamoe.training.saving import CheckpointSaver
    from megamoe.training.state import owned

    config = settings(mebibytes, precision)
    environment = replace(rank_environment({}), init_method=f"file://{folder}/meeting")
    device = initialize_distributed(environment, 60.0)
    trainer = build_trainer(config, device)
    saver = CheckpointSaver(trainer, folder, say=lambda text: None)
    saver.prepare()
    num_bytes = sum(piece.values.nbytes for piece in owned(trainer))
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    copies, stalls = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        target.copy_(source)
        copies.append(time.perf_counter() - began)
        began = time.perf_counter()
        saver.save()  # all that training waits for
        stalls.append(time.perf_counter() - began)
        saver.wait()
        if saver.last_failure is not None:
            raise SystemExit(saver.last_failure)
        trainer.step += 1
    return {"bytes": num_bytes, "stall": statistics.median(stalls), "copy": statistics.median(copies)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512, help="size of the state (default 512)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", help="where to save to (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options.mebibytes, options.precision, options.repeats, folder)
    ratio = found["stall"] / found["copy"]
    print(
        f"state {found['bytes'] / 2**20:.0f} MiB ({options.precision}): training stands still "
        f"{1e3 * found['stall']:.1f} ms, one copy in memory takes {1e3 * found['copy']:.1f} ms; "
        f"ratio {ratio:.2f} (goal: at most {GOAL})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
