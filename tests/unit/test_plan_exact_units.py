"""The parts of plans that need no ranks: buckets, schedules, roles of real presets, what stays equal to the engines."""

import subprocess
import sys
import time

import pytest

from megamoe.config.schema import Config
from megamoe.plan.activations import activation_bytes, layer_bytes
from megamoe.plan.collectives import report_collectives, step_collectives
from megamoe.plan.gradient_collectives import _bucket_reductions
from megamoe.plan.optimizer_groups import OptimizerGroup
from megamoe.plan.quantities import Load
from megamoe.plan.roles import HeldParameter, roles
from megamoe.plan.rows import expert_rows
from megamoe.plan.schedules import in_flight
from megamoe.plan.states import MAX_STAGE_0_BUCKET_ELEMENTS, fullest_states
from megamoe.topology.grid import Grid
from megamoe.topology.initial import Constant
from megamoe.topology.parameters import Parameter


def _large() -> Config:
    return Config.model_validate(
        {
            "model": {"num_layers": 32, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 2048},
            "moe": {"num_experts": 64},
            "parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 8, "expert_parallel_size": 8,
                         "sequence_parallel": True},
            "run": {"precision": "bf16", "global_batch_size": 1024},
        }
    )  # fmt: skip


def _group(*sizes: int, num_ranks: int = 2) -> OptimizerGroup:
    members = tuple(
        HeldParameter(Parameter(f"p{number}", (size,), "ffn", 0, None, None, Constant(0.0), False), (size,))
        for number, size in enumerate(sizes)
    )
    return OptimizerGroup(False, num_ranks, members)


def test_a_constant_is_the_engine_s() -> None:
    from deepspeed.runtime.engine import MEMORY_OPT_ALLREDUCE_SIZE

    assert MAX_STAGE_0_BUCKET_ELEMENTS == MEMORY_OPT_ALLREDUCE_SIZE


@pytest.mark.parametrize(
    ("sizes", "bucket", "expected"),
    [
        ((4, 4, 4), 12, [12]),
        ((4, 4, 4), 8, [8, 4]),  # exactly full is not over
        ((4, 30, 4), 8, [4, 16, 14, 4]),  # the large one alone: 4 to 33, of partitions [0, 20) and [20, 40)
        ((3, 7), 8, [3, 7]),
    ],
)
def test_buckets(sizes: tuple[int, ...], bucket: int, expected: list[int]) -> None:
    group = _group(*sizes)
    members = [(group, number) for number in range(len(sizes))]
    found = _bucket_reductions(members, bucket, "update")
    assert [each.num_bytes // 4 for each in found] == expected


def test_padding_belongs_to_the_last_partition() -> None:
    group = _group(5, 4, num_ranks=2)
    assert (group.padded_elements, group.partition_elements) == (12, 6)
    assert [group.padding_in_partition(number) for number in (0, 1)] == [0, 3]
    assert [group.is_in_partition(number) for number in (0, 1)] == [[True, True], [False, True]]


@pytest.mark.parametrize("pipeline", [2, 3, 4])
@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_in_flight_as_megatron_schedules(pipeline: int, num_chunks: int) -> None:
    """Replays the order of passes that Megatron-core's own functions give."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    for groups in (1, 2, 5):
        num_micro_batches = pipeline * groups
        table = get_schedule_table(num_micro_batches, num_chunks, pipeline)
        for rank in range(pipeline):
            warmup = pipeline - rank - 1
            if num_chunks > 1:
                warmup = 2 * warmup + (num_chunks - 1) * pipeline
            alive, most = [0] * num_chunks, 0
            weights = [7 + 3 * chunk for chunk in range(num_chunks)]
            for number, (_, chunk) in enumerate(table):
                alive[chunk] += 1
                most = max(most, sum(count * weight for count, weight in zip(alive, weights, strict=True)))
                if number >= min(warmup, len(table)):
                    alive[num_chunks - 1 - table[number - warmup][1]] -= 1
            counts = in_flight(
                pipeline=pipeline, pipeline_rank=rank, num_micro_batches=num_micro_batches, weights=weights
            )
            assert sum(count * weight for count, weight in zip(counts, weights, strict=True)) == most


def test_roles_of_a_pipeline() -> None:
    found = roles(_large(), 64)
    assert [role.pipeline_ranks for role in found] == [(0,), (1, 2, 3, 4, 5, 6), (7,)]
    assert found[1].chunks[0].layers == range(4, 8)
    assert found[1].moe_experts == (64, 64)


def test_load_raises_what_arrives_and_nothing_else() -> None:
    config = _large()
    even, uneven = (expert_rows(config, Grid.from_config(config.parallel, 64), 64, load) for load in (None, Load(1.5)))
    assert even.sent == even.received == uneven.sent
    assert uneven.received <= 1.5 * even.received
    assert layer_bytes(config, 64, 64, load=Load(1.5)) >= layer_bytes(config, 64, 64)


def test_recompute_saves_less() -> None:
    sizes = {}
    for recompute in ("none", "selective", "full"):
        tree = _large().model_dump()
        tree["parallel"]["recompute"] = recompute
        sizes[recompute] = activation_bytes(Config.model_validate(tree), 64, 0)
    assert sizes["none"] > sizes["selective"] > sizes["full"] > 0


def test_reports_are_three_sums() -> None:
    assert [each.num_bytes for each in report_collectives(_large(), 64)] == [16, 8, 8 * 16 * (64 + 2 + 4)]


def test_a_large_plan_takes_a_moment_and_no_torch() -> None:
    started = time.perf_counter()
    config = _large()
    for role in roles(config, 64):
        fullest_states(config, 64, role.pipeline_rank)
        step_collectives(config, 64, role.pipeline_rank, rows_sent=4096)
        activation_bytes(config, 64, role.pipeline_rank)
    assert time.perf_counter() - started < 5.0  # a fiftieth of that on a quiet machine
    code = "import sys, megamoe.plan.activations, megamoe.plan.collectives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
