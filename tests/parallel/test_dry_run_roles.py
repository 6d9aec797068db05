"""Roles of a job: short steps tell whole ones, worlds of a thousand ranks are quick and small, nothing is left over."""

import os
import re
import resource
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megamoe.config.loading import load_config, override_config
from megamoe.config.schema import Config
from megamoe.dry_run.build import trainer_of_rank
from megamoe.dry_run.compare import differences
from megamoe.dry_run.fake_world import playing
from megamoe.dry_run.recorder import Recorder
from megamoe.dry_run.report import check_job
from megamoe.dry_run.roles import RankReality, play_rank, play_roles
from megamoe.dry_run.rows import StatedRows
from megamoe.errors import MegamoeError, TopologyError
from megamoe.plan.cluster import load_cluster
from megamoe.plan.memory import role_memory
from megamoe.plan.quantities import Load
from megamoe.plan.roles import role_of
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import local_shape, param_table
from megamoe.topology.stages import chunk_parameters
from tests.harness import run_ranks
from tests.parallel.worlds import config, parallel

SHIPPED = Path(__file__).parents[2] / "launch_scripts" / "layouts"
EVEN, UNEVEN = Load(1.0), Load(2.0)
WORLD_SIZE = 8
LAYOUTS: dict[str, Config] = {
    "pipeline": config("paper", (*parallel(tp=2, pp=4, ep=2, zero=1), "run.global_batch_size=12")),
    "zero 2, bf16": config(
        "paper_capacity",
        (*parallel(tp=2, pp=2, ep=4, sp=True, zero=2), "run.precision=bf16", "run.global_batch_size=20"),
    ),
    "interleaved": config(
        "modern_tied", (*parallel(pp=2, vp=2, ep=2, zero=1, recompute="full"), "run.global_batch_size=64")
    ),
    "zero 0": config("paper_late", (*parallel(pp=2, ep=2, zero=0, recompute="selective"), "run.global_batch_size=40")),
}
LARGE = {
    512: load_config("moe-1.1t", ["parallel.tensor_parallel_size=8", "parallel.pipeline_parallel_size=4",
                                  "parallel.expert_parallel_size=64"]),
    1024: load_config("moe-1.1t", ["parallel.tensor_parallel_size=4", "parallel.expert_parallel_size=512",
                                   "run.micro_batch_size=1"]),
}  # fmt: skip


def in_one_process(function: Any, *args: Any) -> Any:
    (value,) = run_ranks(function, 1, *args, init=False)
    return value


def both_ways() -> dict[str, list[tuple[RankReality, RankReality]]]:
    """(told by short steps, played whole) by layout, of the first and the last pipeline rank."""
    return {
        name: [
            tuple(play_rank(settings, WORLD_SIZE, rank, UNEVEN, whole=whole) for whole in (False, True))
            for rank in (0, settings.parallel.pipeline_parallel_size - 1)
        ]
        for name, settings in LAYOUTS.items()
    }


@pytest.fixture(scope="module")
def played() -> dict[str, list[tuple[RankReality, RankReality]]]:
    return in_one_process(both_ways)


def test_short_steps_tell_what_whole_steps_are(played):
    for name, ranks in played.items():
        for told, whole in ranks:
            assert told.num_played < whole.num_played == whole.num_micro_batches, name
            assert whole.calls == told.calls, name
            # More micro-batches leave more losses; and what is kept least may be kept beside another moment.
            # Told is as much as is ever kept beside what is alive in the last backward pass: those may not coincide.
            assert 0.98 < told.schedule_peak_bytes / whole.schedule_peak_bytes < 1.03, name
            assert told.update_peak_bytes == pytest.approx(whole.update_peak_bytes, rel=0.001), name
            same = {"calls": {}, "num_played": 0, "schedule_peak_bytes": 0, "update_peak_bytes": 0}
            assert replace(whole, **same) == replace(told, **same), name


def test_plans_say_what_roles_are(played):
    for name, ranks in played.items():
        for told, _ in ranks:
            assert differences(LAYOUTS[name], WORLD_SIZE, told, UNEVEN) == (), name


def test_planned_peaks_are_not_below_real_ones(played):
    """Saved tensors and states are exact; what passes through beside them is an estimate, here of tiny models."""
    for name, ranks in played.items():
        for told, _ in ranks:
            role = role_of(LAYOUTS[name], WORLD_SIZE, told.pipeline_rank)
            planned = role_memory(LAYOUTS[name], WORLD_SIZE, role, UNEVEN, overhead_bytes=0).num_bytes.total
            real = max(told.schedule_peak_bytes, told.update_peak_bytes)
            print(f"{name}, stage {told.pipeline_rank}: {planned / real:.3f}")
            assert 0.95 * real <= planned <= 1.1 * real, name


def test_a_plan_of_something_else_is_told_from_what_a_role_is(played):
    *_, (role, _) = played["pipeline"]  # the last stage, which has experts
    sentences = {
        "optimizer": other_plan(role, ["parallel.zero_stage=0"], UNEVEN),
        "messages, receive": other_plan(role, ["run.micro_batch_size=1"], UNEVEN),
        "calls of all_to_all in forward": other_plan(role, [], EVEN),
        "calls of all_reduce": other_plan(role, ["parallel.sequence_parallel=true"], UNEVEN),
    }
    for part, found in sentences.items():
        assert any(part in sentence for sentence in found), part


def other_plan(role: RankReality, overrides: list[str], load: Load) -> list[str]:
    settings = override_config(LAYOUTS["pipeline"], overrides, "a test")
    return [str(each) for each in differences(settings, WORLD_SIZE, role, load)]


def large_roles(world_size: int) -> tuple[dict[int, RankReality], float, float]:
    """The roles, the seconds they took, and the MiB by which this process has grown."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    roles = play_roles(LARGE[world_size], world_size, EVEN)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return roles, time.monotonic() - began, grown


@pytest.mark.parametrize("world_size", LARGE)
def test_a_trillion_parameters_on_many_ranks(world_size):
    settings = LARGE[world_size]
    roles, seconds, grown_mib = in_one_process(large_roles, world_size)
    print(f"{world_size} ranks, {len(roles)} roles: {seconds:.1f} s, {grown_mib:.0f} MiB")
    assert seconds < 60.0
    assert grown_mib < 300.0  # of terabytes
    stages = range(settings.parallel.pipeline_parallel_size)  # first, last and those between are unlike
    assert roles.keys() == {0} if len(stages) == 1 else {0, 1, stages[-1]}
    grid = Grid.from_config(settings.parallel, world_size)
    for pipeline_rank, role in roles.items():
        assert [str(each) for each in differences(settings, world_size, role, EVEN)] == []
        held = chunk_parameters(
            param_table(settings.model, settings.moe),
            num_layers=settings.model.num_layers,
            pipeline=grid.pipeline,
            virtual=1,
            pipeline_rank=pipeline_rank,
        )
        elements = sum(int(np.prod(local_shape(parameter, grid))) for parameter in held)
        padding = role.states.weights - 2 * elements  # fp16; ZeRO pads each of four groups of parameters
        assert 0 <= padding <= 4 * 2 * 2 * grid.data
        kinds = {call.kind for call in role.calls}
        assert {"all_to_all", "all_reduce"} <= kinds
        assert ("send" in kinds) == (grid.pipeline > 1)
        assert all(role.rank in call.ranks for call in role.calls)


def sizes_of_messages(settings: Config, world_size: int) -> list[int]:
    """Bytes of each all-to-all of rows."""
    calls = play_rank(settings, world_size, 0, EVEN).calls
    return [call.num_bytes for call in calls if call.kind == "all_to_all" and call.num_bytes > 100_000]


def test_rows_cost_what_the_paper_says():
    """Two choices of every token, each of 4,096 numbers of 16 bits, leave a rank; capacity is for just as many."""
    settings = LARGE[512]
    tokens = settings.run.micro_batch_size * 2048 // 8
    assert set(in_one_process(sizes_of_messages, settings, 512)) == {2 * tokens * 4096 * 2}


def rank_variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}


def what_is_left_over() -> dict[str, Any]:
    """Of a role that was played, and of one whose layout does not fit."""
    before, accelerator = rank_variables(), get_accelerator()
    first = play_rank(LAYOUTS["pipeline"], WORLD_SIZE, 0, EVEN)
    with suppress(LookupError), trainer_of_rank(LAYOUTS["pipeline"], 0, WORLD_SIZE):
        raise LookupError("in the middle of a step")
    found = {"again": play_rank(LAYOUTS["pipeline"], WORLD_SIZE, 0, EVEN) == first}
    try:
        play_rank(LAYOUTS["pipeline"], 12, 0, EVEN)
    except TopologyError as error:
        sentence = str(error)
    found |= {
        "sentence": sentence,
        "initialised": dist.is_initialized(),
        "environment": rank_variables() == before,
        "accelerator": get_accelerator() is accelerator,
        "default device": str(torch.empty(0).device),
    }
    with playing(5, 1024), Recorder() as recorder:
        dist.all_reduce(torch.ones(4), group=dist.new_group([1, 5]))
        found["calls"] = [(call.kind, call.ranks, call.num_bytes) for call in recorder.calls]
        try:
            with playing(0, 2):
                pass
        except MegamoeError as error:
            found["twice"] = str(error)
    return found


def test_a_role_leaves_nothing_behind():
    found = in_one_process(what_is_left_over)
    assert "expert_parallel_size" in found["sentence"] or "12 ranks" in found["sentence"]
    assert (found["initialised"], found["environment"], found["accelerator"]) == (False, True, True)
    assert found["default device"] == "cpu"
    assert found["again"]
    assert found["calls"] == [("all_reduce", (1, 5), 16)]
    assert "already" in found["twice"]


@pytest.mark.parametrize("load", [Load(1.0), Load(1.5), Load(4.0)])
@pytest.mark.parametrize(("num_nodes", "num_local"), [(1, 8), (2, 4)])
def test_stated_rows_are_those_of_senders_alike(load, num_nodes, num_local):
    settings = config("paper_all", parallel(tp=1, ep=8))
    at = Grid.from_config(settings.parallel, 8).coordinates(5)
    sent, midway, received = StatedRows(settings, at, load).rows((3, num_nodes, num_local, 1, 1))
    assignments = settings.run.micro_batch_size * settings.model.seq_length * settings.moe.top_k
    assert sent.sum() == assignments  # dropless
    mean = assignments / 8
    assert received.sum() == 8 * round(mean * load.max_over_mean)
    assert (received == sent.reshape(8)[5]).all()
    others = np.delete(sent.reshape(8), 5)
    assert others.max() - others.min() <= 1
    assert midway[:, :, 0, 0].tolist() == [[sent[node, 5 % num_local, 0, 0]] * num_local for node in range(num_nodes)]


def test_capacity_bounds_stated_rows():
    settings = config("paper_all_capacity", parallel(tp=1, ep=8))
    at = Grid.from_config(settings.parallel, 8).coordinates(0)
    sent, _, received = StatedRows(settings, at, Load(4.0)).rows((3, 1, 8, 1, 1))
    capacity = 2 * -(-settings.run.micro_batch_size * settings.model.seq_length // 8)
    assert sent.max() == capacity
    assert received.sum() == 8 * capacity


def shipped_layouts() -> dict[str, list[str]]:
    """By model: what is not as planned, or does not fit, in the dry run of its shipped layout."""
    cluster, found = load_cluster("a100-80gb"), {}
    for path in sorted(SHIPPED.glob("*.yaml")):
        num_gpus = int(re.search(r"fits (\d+) GPUs", path.read_text())[1])
        checks = check_job(load_config(str(path)), num_gpus, EVEN, cluster, lambda _: None)
        found[path.stem] = [str(each) for check in checks for each in check.differences]
        found[path.stem] += [f"{check.peak_bytes:,} bytes" for check in checks if not check.is_good]
    return found


@pytest.mark.timeout(600)
def test_the_shipped_layouts_pass_their_dry_run():
    (found,) = run_ranks(shipped_layouts, 1, init=False, timeout_seconds=560)
    assert len(found) == 10 and not any(found.values()), found
