"""Plans of bytes and collectives against real gloo ranks: tensors that live, calls that are made. No difference."""

from collections import Counter
from itertools import accumulate
from typing import Any

import pytest

from megamoe.config.schema import Config
from megamoe.dry_run.compare import CallKey, groups_of_rank, planned_collectives
from megamoe.plan.activations import _balance_loss, _Sizes, layer_bytes
from megamoe.plan.roles import chunks_of, role_of, roles
from megamoe.plan.rows import ExpertRows
from megamoe.plan.schedules import in_flight
from megamoe.plan.states import num_micro_batches, states
from megamoe.topology import updates
from megamoe.topology.grid import Grid
from tests.harness import run_ranks
from tests.parallel.plan_cases import random_configs
from tests.parallel.plan_ranks import audit_configs

COUNTS = {1: 100, 2: 66, 4: 30, 8: 5}  # configurations by number of ranks
SEED = 6
LAUNCH_TIMEOUT_SECONDS = 280
pytestmark = pytest.mark.timeout(320)  # the first test of a number of ranks waits for its launch


@pytest.fixture(scope="module", params=list(COUNTS))
def audited(request: pytest.FixtureRequest) -> list[tuple[Config, int, list[dict[str, Any]]]]:
    """(configuration, number of ranks, what each rank found)."""
    world_size = request.param
    configs = random_configs(SEED, world_size, COUNTS[world_size])
    by_rank = run_ranks(audit_configs, world_size, configs, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
    by_config = zip(*by_rank, strict=True)
    return [(config, world_size, list(found)) for config, found in zip(configs, by_config, strict=True)]


def test_roles_hold_what_ranks_hold(audited: list[tuple[Config, int, list[dict[str, Any]]]]) -> None:
    for config, world_size, ranks in audited:
        grid, found = Grid.from_config(config.parallel, world_size), roles(config, world_size)
        assert sorted(rank for role in found for rank in role.pipeline_ranks) == list(range(grid.pipeline))
        for rank, seen in enumerate(ranks):
            pipeline_rank = grid.coordinates(rank).pipeline
            own = role_of(config, world_size, pipeline_rank)
            assert [(held.parameter.name, held.tied_copy, held.shape) for held in own.parameters] == seen["names"]
            role = next(role for role in found if pipeline_rank in role.pipeline_ranks)
            assert [held.shape for held in role.parameters] == [held.shape for held in own.parameters]


def test_states_to_the_byte(audited: list[tuple[Config, int, list[dict[str, Any]]]]) -> None:
    for config, world_size, ranks in audited:
        for rank, seen in enumerate(ranks):
            _compare_states(config, world_size, rank, seen)


SMALL_BUCKET = 3000  # elements: a handful of gradients, fewer than an embedding has


def test_many_buckets_and_gradients_larger_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "MAX_REDUCE_BUCKET_ELEMENTS", SMALL_BUCKET)
    configs = random_configs(SEED + 1, 2, 10, parallel__pipeline_parallel_size=1, parallel__tensor_parallel_size=1)
    by_rank = run_ranks(audit_configs, 2, configs, SMALL_BUCKET, init=False)
    for config, ranks in zip(configs, zip(*by_rank, strict=True), strict=True):
        for rank, seen in enumerate(ranks):
            _compare_states(config, 2, rank, seen)
            planned, called = _planned(config, 2, rank, seen["rows"]), _called(seen["calls"])
            if config.parallel.zero_stage == 2:  # where a bucket ends depends on which gradient appears first
                planned, called = _totals(planned), _totals(called)
            assert planned == called, (rank, planned - called, called - planned, config)


def _totals(calls: "Counter[CallKey]") -> Counter[tuple[str, tuple[int, ...], str]]:
    """Bytes by kind, ranks and phase."""
    totals: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for (kind, ranks, num_bytes, phase), count in calls.items():
        totals[kind, ranks, phase] += num_bytes * count
    return totals


def _compare_states(config: Config, world_size: int, rank: int, seen: dict[str, Any]) -> None:
    plan = states(config, world_size, rank)
    assert plan.of("load statistics") == seen["statistics"], config
    assert set(seen["moments"]) == {"rest", "backward", "update"}
    for moment, alive in seen["moments"].items():
        assert alive["weights"] == plan.at(moment, "weights"), (moment, rank, config)
        assert alive["optimizer"] == plan.at(moment, "optimizer"), (moment, rank, config)
        if moment == "backward" and config.parallel.zero_stage == 2:
            # Seen from inside a backward pass, where activations are still alive: ZeRO's own tensors alone. The zeros
            # lie in a variable of DeepSpeed's, out of sight.
            expected = plan.at(moment, "gradients") + plan.of("bucket") - plan.of("zeros for other chunks")
            expected -= plan.of("gradients larger than the bucket")  # on the parameters themselves
            assert alive["zero"] == expected, (moment, rank, alive, plan.lines, config)
            continue
        other = plan.at(moment, "gradients") + plan.at(moment, "buffers") - plan.of("load statistics")
        assert alive["other"] == other, (moment, rank, plan.lines, config)


def test_collectives_call_by_call(audited: list[tuple[Config, int, list[dict[str, Any]]]]) -> None:
    for config, world_size, ranks in audited:
        for rank, seen in enumerate(ranks):
            planned, called = _planned(config, world_size, rank, seen["rows"]), _called(seen["calls"])
            assert planned == called, (rank, planned - called, called - planned, config)


def test_activations_byte_for_byte(audited: list[tuple[Config, int, list[dict[str, Any]]]]) -> None:
    for config, world_size, ranks in audited:
        if config.model.attention_dropout > 0.0:
            continue  # on a CPU it saves [s, s] matrices
        for rank, seen in enumerate(ranks):
            if config.run.precision == "fp32" or seen["widens"]:
                planned = _planned_activations(config, world_size, rank, seen["rows_of_saved"])
                assert planned == seen["saved"], (rank, config)


def _planned_activations(config: Config, world_size: int, rank: int, rows: dict[int, Any]) -> dict[str, int]:
    grid, found = Grid.from_config(config.parallel, world_size), {}
    sizes = _Sizes(config, grid, "cpu")
    for chunk in chunks_of(config, grid.coordinates(rank).pipeline):
        if chunk.has_embedding:
            found["embedding"] = sizes.embedding
        for layer, num_experts in zip(chunk.layers, chunk.num_experts, strict=True):
            of_layer = None
            if num_experts:
                hops = rows[layer][0]  # of each chunk the first, then the next one
                num_hops = len(hops) // config.parallel.all_to_all_chunks
                received = sum(hop[1] for hop in hops[num_hops - 1 :: num_hops])
                of_layer = ExpertRows(sum(hop[0] for hop in hops[::num_hops]), received)
            found[str(layer)] = layer_bytes(
                config, world_size, num_experts, rows=of_layer, device="cpu", with_indices=False
            )
            if num_experts and config.moe.balance_loss_coeff == 0.0 and config.parallel.recompute != "full":
                found[str(layer)] += _balance_loss(sizes, num_experts)  # saved, and let go with the loss itself
        if chunk.has_head:
            found["head"] = sizes.head
    return found


def test_micro_batches_in_flight(audited: list[tuple[Config, int, list[dict[str, Any]]]]) -> None:
    for config, world_size, ranks in audited:
        grid = Grid.from_config(config.parallel, world_size)
        for rank, seen in enumerate(ranks):
            alive = list(accumulate(1 if name == "forward" else -1 for name in seen["passes"]))
            counts = in_flight(
                pipeline=grid.pipeline,
                pipeline_rank=grid.coordinates(rank).pipeline,
                num_micro_batches=num_micro_batches(config, world_size),
                weights=[1] * config.parallel.virtual_pipeline_parallel_size,
            )
            assert sum(counts) == max(alive), (rank, config)


def _called(calls: list[tuple[str, tuple[int, ...], int, str, int | None]]) -> Counter[CallKey]:
    counted: Counter[CallKey] = Counter()
    for kind, ranks, num_bytes, phase, peer in calls:
        if peer is not None:
            counted[kind, (peer,), num_bytes, ""] += 1
        elif len(ranks) > 1:
            counted[kind, ranks, num_bytes, phase] += 1
    return counted


def _planned(
    config: Config, world_size: int, rank: int, rows: dict[int, list[list[tuple[int, int]]]]
) -> Counter[CallKey]:
    groups = groups_of_rank(config, Grid.from_config(config.parallel, world_size), rank)
    num_hops = 2 if "expert_local" in groups else 1

    def rows_sent(layer: int, micro_batch: int, chunk: int, hop: int) -> tuple[int, int]:
        return rows[layer][micro_batch][chunk * num_hops + hop]

    return planned_collectives(config, world_size, rank, rows_sent)
