"""Time by phase of real steps, under every schedule: a delay put into a phase is found in that phase and no other."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megamoe.moe import collectives
from megamoe.phases import CLOCK
from megamoe.training.build import Trainer
from megamoe.training.step import Batch
from tests.harness import run_ranks
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS, config, parallel, samples, step, trainer_of
from tests.parity.ranks import share

DELAY_SECONDS = 0.02
DELAYED = ("data", "forward", "backward", "all_to_all", "reduce", "update")
LAYOUTS = {
    "one": (1, parallel(zero=0)),
    "recompute": (1, parallel(zero=1, recompute="full")),
    "experts": (2, parallel(ep=2, zero=2)),
    "pipeline": (2, parallel(pp=2, zero=2)),
    "interleaved": (4, parallel(pp=2, vp=2, ep=2, zero=1)),
}  # name -> ranks, settings


def settings_of(name: str):
    return config("paper", LAYOUTS[name][1])


@contextmanager
def delayed(trainer: Trainer, calls: Counter) -> Iterator[None]:
    """Every phase but those that wait for other ranks takes DELAY_SECONDS longer, each time it is counted."""

    def delay(name: str) -> None:
        calls[name] += 1
        time.sleep(DELAY_SECONDS)

    def before(name: str, function: Any) -> Any:
        return lambda *args, **kwargs: (delay(name), function(*args, **kwargs))[1]

    hooks = []
    for chunk in trainer.chunks:
        hooks.append(chunk.register_forward_pre_hook(lambda *_: delay("forward")))
        hooks.append(chunk.register_forward_hook(lambda *call: call[-1].register_hook(lambda _: delay("backward"))
                                                 and None))  # fmt: skip
    finalizer, optimizer = trainer.engine.finalizer, trainer.engine.basic_optimizer
    finalizer._global_norm = before("reduce", finalizer._global_norm)
    usual_step, optimizer.step = optimizer.step, before("update", optimizer.step)
    collectives.dist = SimpleNamespace(all_to_all_single=before("all_to_all", dist.all_to_all_single))
    try:
        yield
    finally:
        collectives.dist, optimizer.step = dist, usual_step
        del finalizer._global_norm
        for hook in hooks:
            hook.remove()


def slowly(batch: Batch, calls: Counter) -> Batch:
    def read() -> Iterator[Any]:
        for each in batch.micro_batches:
            calls["data"] += 1
            time.sleep(DELAY_SECONDS)
            yield each

    return Batch(read(), batch.num_micro_batches)


def times(names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in names:
        with trainer_of(settings_of(name)) as trainer:
            warm_up, batch = samples(trainer.config, 2)
            step(trainer, warm_up)
            calls: Counter = Counter()
            with delayed(trainer, calls):
                dist.barrier()
                CLOCK.take_seconds()
                began = time.perf_counter()
                trainer.train_step(slowly(share(trainer, batch), calls), len(batch))
                elapsed = time.perf_counter() - began
                seconds = CLOCK.take_seconds()
            trainer.evaluate(share(trainer, batch))
            found[name] = {
                "seconds": seconds, "elapsed": elapsed, "calls": dict(calls), "phase_after": CLOCK.current,
                "evaluation": set(CLOCK.take_seconds()), "num_micro_batches": share(trainer, batch).num_micro_batches,
                "stage": trainer.groups.coordinates.pipeline, "num_chunks": len(trainer.chunks),
            }  # fmt: skip
    return found


@cache
def launch(world: int) -> list[dict[str, dict[str, Any]]]:
    names = [name for name, (ranks, _) in LAYOUTS.items() if ranks == world]
    return run_ranks(times, world, names, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_delay_is_found_in_the_phase_it_was_put_into(name):
    for rank in launch(LAYOUTS[name][0]):
        found = rank[name]
        seconds, calls, passes = found["seconds"], found["calls"], found["num_micro_batches"] * found["num_chunks"]
        assert calls["forward"] == calls["backward"] == passes and calls["reduce"] == 1
        assert calls["update"] >= 1  # ZeRO updates one group after the other
        natural = 0.0
        for phase in DELAYED:
            injected = calls.get(phase, 0) * DELAY_SECONDS
            assert seconds.get(phase, 0.0) >= injected * 0.99, phase
            natural += seconds.get(phase, 0.0) - injected
        whole = found["elapsed"]
        assert sum(seconds.values()) == pytest.approx(whole, rel=0.03), "nothing is lost, nothing counted twice"
        assert natural + seconds["pipeline"] == pytest.approx(whole - sum(calls.values()) * DELAY_SECONDS, abs=0.03)
        assert name in ("experts", "interleaved") or "all_to_all" not in calls
        assert set(seconds) <= {*DELAYED, "pipeline"} and found["phase_after"] is None
        assert "backward" not in found["evaluation"] and "update" not in found["evaluation"]


@pytest.mark.parametrize("name", ["pipeline", "interleaved"])
def test_a_stage_that_waits_for_another_is_in_the_pipeline_phase(name):
    """The last stage waits while the first computes its first micro-batch, and has nothing else to do."""
    for rank in launch(LAYOUTS[name][0]):
        if rank[name]["stage"] == 1:
            # Its data and forward pass take two delays; on a busy machine the last stage may itself be late.
            assert rank[name]["seconds"]["pipeline"] >= DELAY_SECONDS


@pytest.mark.parametrize(("name", "num_calls"), [("experts", 4), ("interleaved", 4)])
def test_transfers_are_met_in_both_passes(name, num_calls):
    """There and back, in each pass of a micro-batch through a MoE layer, which not every stage has."""
    counts = [rank[name]["calls"].get("all_to_all", 0) for rank in launch(LAYOUTS[name][0])]
    assert max(counts) > 0 and all(count % num_calls == 0 for count in counts)


def test_without_a_pipeline_nothing_is_left_over():
    (rank,) = launch(1)
    for name in ("one", "recompute"):
        assert rank[name]["seconds"]["pipeline"] < 0.1 * rank[name]["elapsed"]
