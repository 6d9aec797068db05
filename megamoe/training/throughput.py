"""Where a step's time goes and what the devices make of it: seconds by phase, model FLOP/s, share of their peak."""

from typing import Any

import torch
import torch.distributed as dist

from megamoe.config.schema import Config
from megamoe.model.parallel import ParallelGroups
from megamoe.phases import CLOCK, DeviceStamp
from megamoe.topology.flops import hardware_flops_per_token, model_flops_per_token
from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table

STEP_PHASES = ("data", "forward", "backward", "all_to_all", "reduce", "update", "pipeline")
OTHER_PHASES = ("validate", "save")  # told where there is something to tell
HALF_PRECISION = ("bf16", "fp16")

# Dense peak rates of data sheets, FLOP/s: 16-bit and fp32. The first name that a device's name contains counts.
PEAK_FLOPS_PER_SECOND = {
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H800": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "V100": (125e12, 15.7e12),
}


def begin_timing(device: torch.device) -> None:
    """Time by phase from here on, by the device's own clock if it has one: the host runs ahead of a GPU."""
    CLOCK.use_device_stamps(_cuda_stamp if device.type == "cuda" else None)


def _cuda_stamp() -> DeviceStamp:
    stamp = torch.cuda.Event(enable_timing=True)
    stamp.record()
    return stamp


def phase_seconds(groups: ParallelGroups, device: torch.device, num_steps: int) -> dict[str, float]:
    """Keys seconds_data, …: of a step, mean over the ranks, since the last call. Collective over all ranks."""
    taken = CLOCK.take_seconds()
    values = torch.tensor([taken.get(name, 0.0) for name in (*STEP_PHASES, *OTHER_PHASES)], dtype=torch.float64)
    values = values.to(device) / (groups.grid.world * max(1, num_steps))
    dist.all_reduce(values, group=groups.world)
    seconds = dict(zip((*STEP_PHASES, *OTHER_PHASES), values.tolist(), strict=True))
    return {f"seconds_{name}": value for name, value in seconds.items() if name in STEP_PHASES or value > 0.0}


def rates(config: Config, num_ranks: int, tokens_per_second: float, peak: float | None) -> dict[str, float]:
    """Tokens of a rank, FLOP/s of all ranks, and their share of the `peak` of one device, where that is known.

    Model FLOPs: of a token's active parameters and of causal attention, as `megamoe plan` counts them; what recompute
    does again is in hardware FLOPs alone.
    """
    model = tokens_per_second * model_flops_per_token(config, attention="causal")
    found = {"tokens_per_second_per_rank": tokens_per_second / num_ranks, "model_flops_per_second": model}
    if config.parallel.recompute != "none":
        hardware = tokens_per_second * hardware_flops_per_token(config, attention="causal")
        found["hardware_flops_per_second"] = hardware
    if peak is not None:
        found["flops_utilization"] = model / (num_ranks * peak)
    return found


def run_details(config: Config, num_ranks: int) -> dict[str, float]:
    """What follows from a configuration and tells runs apart: for the head of a run in a tracking service."""
    table = param_table(config.model, config.moe)
    return {
        "num_ranks": num_ranks,
        "num_parameters": num_parameters(table),
        "num_active_parameters": num_active_parameters(table, config.moe),
        "model_flops_per_token": model_flops_per_token(config, attention="causal"),
    }


def peak_flops_per_second(config: Config, device: torch.device) -> float | None:
    """What one device can do at most in the precision of the run; None where nobody has said."""
    if config.monitor.peak_flops_per_second is not None:
        return config.monitor.peak_flops_per_second
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), config.run.precision)


def known_peak(device_name: str, precision: str) -> float | None:
    for name, peaks in PEAK_FLOPS_PER_SECOND.items():
        if all(word in device_name for word in name.split()):
            return peaks[0 if precision in HALF_PRECISION else 1]
    return None


def metrics_of(
    config: Config, groups: ParallelGroups, device: torch.device, *, tokens: int, seconds: float, num_steps: int
) -> dict[str, Any]:
    """All that a training line says of speed. Collective over all ranks."""
    tokens_per_second = tokens / max(seconds, 1e-9)
    return {
        "tokens_per_second": tokens_per_second,
        **rates(config, groups.grid.world, tokens_per_second, peak_flops_per_second(config, device)),
        "step_seconds": seconds / max(1, num_steps),
        **phase_seconds(groups, device, num_steps),
    }
