"""Step times: the schedule against one that is played through, what traits hide, and published facts of single runs."""

from collections import Counter

import pytest

from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.errors import ConfigError
from megamoe.plan.cluster import load_cluster
from megamoe.plan.quantities import Collective, Load
from megamoe.plan.timing import UPDATE_BYTES, StepTimer, Traits, _schedule_seconds, step_time
from megamoe.topology.flops import model_flops_per_token
from megamoe.topology.parameters import param_table
from tests.unit.plan_cases import plain_collectives

A100 = load_cluster("a100-80gb")
FREE_LINKS = A100.model_copy(
    update={
        link: A100.intra_node.model_copy(update={"bytes_per_second": 1e30, "latency_seconds": 0.0})
        for link in ("intra_node", "inter_node")
    }
)


def timed(config: Config, world_size: int, cluster=A100, **options):
    return step_time(config, cluster, world_size, lambda rank: plain_collectives(config, world_size, rank), **options)


def orders_1f1b(num_stages: int, stage: int, m: int) -> list[tuple[str, int]]:
    """What a stage does, in order: a few forward passes, then one forward and one backward in turn, then the rest."""
    warm = min(num_stages - 1 - stage, m)
    order = [("f", i) for i in range(warm)]
    for i in range(m - warm):
        order += [("f", warm + i), ("b", i)]
    return order + [("b", i) for i in range(m - warm, m)]


def played(forward: list[float], backward: list[float], m: int) -> float:
    """The 1F1B schedule, event by event: a pass starts when its stage is free and what it needs has arrived."""
    p = len(forward)
    orders, free, ends = [orders_1f1b(p, s, m) for s in range(p)], [0.0] * p, {}
    position = [0] * p
    while any(position[s] < len(orders[s]) for s in range(p)):
        for s in range(p):
            while position[s] < len(orders[s]):
                kind, i = orders[s][position[s]]
                needs = [("f", s - 1, i)] if kind == "f" and s else []
                if kind == "b":
                    needs = [("f", s, i)] if s == p - 1 else [("b", s + 1, i)]
                if any(need not in ends for need in needs):
                    break
                start = max([free[s], *(ends[need] for need in needs)])
                free[s] = ends[kind, s, i] = start + (forward[s] if kind == "f" else backward[s])
                position[s] += 1
    return max(ends.values())


@pytest.mark.parametrize(("num_stages", "m"), [(1, 3), (2, 2), (4, 4), (4, 16), (8, 9)])
def test_equal_stages_take_what_a_played_schedule_takes(num_stages, m):
    stages = [3.0] * num_stages
    assert _schedule_seconds(stages, m, 1) == pytest.approx(played([1.0] * num_stages, [2.0] * num_stages, m))


@pytest.mark.parametrize("slow", [0, 1, 2, 3])
@pytest.mark.parametrize("factor", [1.1, 1.5, 2.0])
def test_one_slow_stage_sets_the_pace_of_a_played_schedule(slow, factor):
    """The formula is exact for equal stages; with a stage that is slower it is never too fast, nor much too slow."""
    forward = [1.0 * (factor if stage == slow else 1.0) for stage in range(4)]
    backward = [2 * seconds for seconds in forward]
    stages = [f + b for f, b in zip(forward, backward, strict=True)]
    exact = played(forward, backward, 32)
    assert exact * (1 - 1e-9) <= _schedule_seconds(stages, 32, 1) <= 1.035 * exact


def test_chunks_divide_the_bubble():
    """Narayanan et al. 2021, section 2.2.2: (p - 1) / m of the time with one chunk, a v-th of it with v."""
    whole = 8 * 3.0
    assert _schedule_seconds([3.0] * 4, 8, 1) - whole == pytest.approx(3 / 8 * whole)
    assert _schedule_seconds([3.0] * 4, 8, 3) - whole == pytest.approx(3 / 8 * whole / 3)


PIPELINE = load_config(
    "mixtral-8x7b",
    ["parallel.pipeline_parallel_size=4", "parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=8",
     "parallel.sequence_parallel=true", "run.global_batch_size=256"],
)  # fmt: skip


def test_kinds_add_up_and_rates_follow_from_the_seconds():
    step = timed(PIPELINE, 64)
    assert sum(step.by_kind.values()) == pytest.approx(step.seconds)
    assert {"forward", "backward", "recompute", "bubble", "update"} < set(step.by_kind)
    assert step.tokens == 256 * 4096
    assert step.tokens_per_second_per_gpu == pytest.approx(step.tokens / step.seconds / 64)
    flops = model_flops_per_token(PIPELINE, attention="causal") * step.tokens_per_second_per_gpu
    assert step.model_flops_utilisation == pytest.approx(flops / 312e12)
    assert 0.1 < step.model_flops_utilisation < step.hardware_flops_utilisation < 0.859
    assert step.slowest_stage == 3  # the logits


def test_recompute_costs_a_forward_pass_of_the_layers():
    full, none = (
        timed(PIPELINE.model_copy(update={"parallel": PIPELINE.parallel.model_copy(update={"recompute": r})}), 64)
        for r in ("full", "none")
    )
    logits = full.by_kind["forward"] - full.by_kind["recompute"]
    assert 0 < logits < full.by_kind["forward"] / 4
    assert none.by_kind["recompute"] == 0
    assert none.by_kind["backward"] == pytest.approx(full.by_kind["backward"])


def test_the_last_stage_waits_for_one_message_in_a_micro_batch():
    """It receives activations and sends their gradients: both directions of a link work at once."""
    step, timer = timed(PIPELINE, 64), StepTimer(PIPELINE, A100, 64)
    message = next(c for c in plain_collectives(PIPELINE, 64, 3) if c.kind == "receive")
    once = timer.network.seconds(message, 48)
    assert step.by_kind["send: activations"] == pytest.approx(timer.num_micro_batches * once)


def test_without_links_to_wait_for_only_computing_is_left():
    step = timed(PIPELINE, 64, FREE_LINKS)
    sends = sum(seconds for kind, seconds in step.by_kind.items() if kind.startswith("send"))
    assert sends < 0.1 * step.seconds  # what is left is the start of each call
    assert sends > 0


def test_a_stage_is_timed_once_for_all_that_are_alike():
    calls = Counter()

    def collectives(rank):
        calls[rank] += 1
        return plain_collectives(PIPELINE, 64, rank)

    timer = StepTimer(PIPELINE, A100, 64, collectives)
    first = timer.time()
    assert calls == {0: 1, 1: 1, 3: 1}  # first, one of the middle ones, last
    assert timer.on(A100).time() == first
    assert sum(calls.values()) == 3
    faster = A100.model_copy(update={"memory_bytes_per_second": 2 * A100.memory_bytes_per_second})
    slow = A100.inter_node.model_copy(update={"bytes_per_second": A100.inter_node.bytes_per_second / 2})
    far = timer.on(A100.model_copy(update={"inter_node": slow})).time()
    assert far.by_kind["send: activations"] > 1.5 * first.by_kind["send: activations"]
    other = timer.on(faster).time()
    assert other.by_kind["recompute"] < first.by_kind["recompute"]
    assert other.by_kind["update"] == pytest.approx(first.by_kind["update"] / 2)


def test_the_update_passes_over_a_ranks_own_partition():
    """ZeRO cuts dense parameters over 64 ranks, experts over none: each rank has its own."""
    config = load_config("moe-52b", ["parallel.expert_parallel_size=64", "run.global_batch_size=128"])
    rate = A100.memory_bytes_per_second * A100.efficiency.memory
    table = param_table(config.model, config.moe)
    experts = sum(p.num_elements for p in table if p.kind == "expert") / 64
    dense = sum(p.num_elements for p in table if p.kind != "expert")
    assert timed(config, 64).by_kind["update"] == pytest.approx(UPDATE_BYTES * (experts + dense / 64) / rate)
    whole = timed(with_parallel(config, zero_stage=0), 64)
    assert whole.by_kind["update"] == pytest.approx(UPDATE_BYTES * (experts + dense) / rate)


def test_a_batch_that_leaves_a_rank_without_work_is_refused():
    config = load_config("moe-1.1t", ["parallel.expert_parallel_size=512"])
    with pytest.raises(ConfigError, match=r"run.global_batch_size 1024 gives less than .*: use a multiple of 2048"):
        step_time(config, A100, 512)


def test_uneven_stages_are_timed_by_their_own_layers():
    """moe-1.1t in 32 stages: every second one has no experts, and waits."""
    config = load_config("moe-1.1t", ["parallel.pipeline_parallel_size=32", "parallel.expert_parallel_size=16",
                                      "run.micro_batch_size=1", "run.global_batch_size=1024"])  # fmt: skip
    step = timed(config, 512)
    assert step.slowest_stage == 31
    assert step.by_kind["bubble"] < 0.5 * step.seconds


def with_parallel(config: Config, **settings) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=settings)})


def test_chunks_of_all_to_all_hide_what_runs_beside_the_experts():
    alone = with_parallel(PIPELINE, all_to_all_chunks=1, expert_parallel_size=4)
    plain, cut = timed(alone, 64), timed(with_parallel(alone, all_to_all_chunks=2), 64)
    exchange = sum(v for k, v in plain.by_kind.items() if k.endswith("(all-to-all)"))
    assert plain.hidden_seconds == 0
    assert cut.hidden_seconds == pytest.approx(A100.efficiency.overlap * exchange / 2)
    left = sum(v for k, v in cut.by_kind.items() if k.endswith("(all-to-all)"))
    assert left == pytest.approx(exchange - cut.hidden_seconds)


def test_traits_change_what_they_are_about():
    base = timed(PIPELINE, 64)
    for traits in (Traits(overlapped_all_to_all=True), Traits(overlapped_gradient_reduce=True),
                   Traits(overlapped_tensor_parallel=True)):  # fmt: skip
        other = timed(PIPELINE, 64, traits=traits)
        assert other.hidden_seconds > 0 and other.seconds < base.seconds, traits
        assert other.by_kind["forward"] == base.by_kind["forward"]
    assert timed(PIPELINE, 64, traits=Traits(fused_attention=False)).seconds > base.seconds
    assert timed(PIPELINE, 64, traits=Traits(fused_elementwise=True)).seconds < base.seconds
    assert timed(PIPELINE, 64, traits=Traits(one_hot_dispatch=True)).seconds > base.seconds


def test_a_token_that_travels_once_to_each_node_saves_what_its_choices_share():
    """Two nodes, 8 choices: half of them go to the other node, once instead of four times."""
    config = load_config("qwen3-30b-a3b", ["parallel.expert_parallel_size=16", "run.global_batch_size=64"])
    kind = "send: dispatch (all-to-all)"
    flat = timed(config, 16).by_kind[kind]
    once = timed(config, 16, traits=Traits(deduplicated_dispatch=True)).by_kind[kind]
    assert 3 < flat / once < 4.5


def test_experts_cut_by_tensor_ranks_send_slices_where_the_engine_does():
    config = with_parallel(PIPELINE, expert_tensor_parallel_size=2, expert_parallel_size=8)
    all_tokens = timed(config, 64)
    slices = timed(config, 64, traits=Traits(dispatched_slices=True))
    assert slices.seconds < all_tokens.seconds
    kind = "send: dispatch (all-to-all)"
    assert slices.by_kind[kind] == pytest.approx(all_tokens.by_kind[kind] / 2, rel=0.05)
    assert slices.by_kind["send: dispatch"] > 0  # the gathering of what arrives
    assert "send: experts' output" in all_tokens.by_kind
    assert "send: experts' output" not in slices.by_kind


def test_fully_sharded_weights_travel_in_every_micro_batch():
    config = load_config("dense-6.7b", ["run.global_batch_size=512"])
    traits = Traits(fully_sharded=True)
    few, many = (
        timed(config.model_copy(update={"run": config.run.model_copy(update={"global_batch_size": batch})}), 64,
              traits=traits)
        for batch in (512, 2048)
    )  # fmt: skip
    key = "send: sharded weights"
    hidden = 1 - A100.efficiency.overlap  # all of it runs beside computation that lasts longer
    size, rate = 2 * 6.7e9, 8 * 25e9 * A100.efficiency.inter_node
    assert few.by_kind[key] == pytest.approx(2 * size / rate * hidden, rel=0.05)
    assert many.by_kind[key] == pytest.approx(4 * few.by_kind[key])
    assert not any("dense" in kind for kind in few.by_kind)


def test_the_loads_of_experts_slow_the_experts_down():
    even, skewed = timed(PIPELINE, 64), timed(PIPELINE, 64, load=Load(max_over_mean=2.0))
    assert 1.1 < skewed.by_kind["forward"] / even.by_kind["forward"] < 2
    for purpose in ("dispatch", "combine"):  # and what travels to them: large messages, whose bytes are all that counts
        kind = f"send: {purpose} (all-to-all)"
        assert 1.8 < skewed.by_kind[kind] / even.by_kind[kind] <= 2.0


def test_collectives_of_the_update_are_waited_for_after_the_schedule():
    def collectives(rank):
        return [Collective("all_reduce", "data", "gradients", "update", 10**9, 3)]

    step = step_time(PIPELINE, A100, 64, collectives)
    assert step.by_kind["send: gradients"] > 3 * 0.9 * 2e9 / 216e9
    free = step_time(PIPELINE, A100, 64, lambda rank: [])
    assert step.seconds - free.seconds == pytest.approx(step.by_kind["send: gradients"])
