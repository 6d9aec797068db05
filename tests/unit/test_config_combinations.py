"""Settings that do not go together, or not with the ranks: what the user reads, by exact text; the support matrix."""

import contextlib

import pytest

from megamoe.config import load_config, validate, validate_for_training
from megamoe.config.support import PAGE, REFUSALS, refusals, support_page
from megamoe.config.validation import divisors
from megamoe.errors import ConfigError
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import param_table
from tests.unit.config_cases import DENSE, ONE_RANK, checked, refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["parallel.tensor_parallel_size=3"],
            "tensor_parallel_size 3 does not divide num_attention_heads 4: use 1, 2, 4",
        ),
        (
            ["parallel.tensor_parallel_size=4", "model.num_query_groups=2"],
            "tensor_parallel_size 4 does not divide num_query_groups 2: use 1, 2",
        ),
        (["model.ffn_hidden_size=511"], "tensor_parallel_size 2 does not divide ffn_hidden_size 511: use 1"),
        (
            ["model.vocab_size=101", "model.vocab_size_multiple=1"],
            "tensor_parallel_size 2 does not divide the padded vocabulary 101: use 1",
        ),
        (["model.seq_length=127"], "tensor_parallel_size 2 does not divide seq_length 127: use 1"),
        (
            [*ONE_RANK, "parallel.sequence_parallel=true"],
            "sequence_parallel needs tensor_parallel_size above 1: use sequence_parallel false, or "
            "tensor_parallel_size 2, 4",
        ),
        (["parallel.pipeline_parallel_size=3"], "pipeline_parallel_size 3 does not divide num_layers 4: use 1, 2, 4"),
        (
            ["parallel.virtual_pipeline_parallel_size=4"],
            "virtual_pipeline_parallel_size 4 does not divide the layers of each of 2 pipeline stages, 2: use 1, 2",
        ),
        (
            [*ONE_RANK, "parallel.virtual_pipeline_parallel_size=2"],
            "virtual_pipeline_parallel_size 2 needs pipeline_parallel_size above 1: "
            "use virtual_pipeline_parallel_size 1",
        ),
        (
            ["model.num_attention_heads=5"],
            "num_attention_heads 5 does not divide hidden_size 128: use 1, 2, 4, 8, 16, 32, 64, 128",
        ),
        (["model.num_query_groups=3"], "num_query_groups 3 does not divide num_attention_heads 4: use 1, 2, 4"),
        (
            ["model.position_embedding=rope", "model.head_dim=33"],
            "position_embedding rope turns pairs of values, but head_dim is 33: use an even head_dim",
        ),
        (
            ["model.hidden_size=127", "model.head_dim=32"],
            "position_embedding sinusoidal is half sines and half cosines, but hidden_size is 127: use an even "
            "hidden_size of at least 4",
        ),
        (
            ["watchdog.hang_timeout_seconds=60", "parallel.timeout_seconds=60"],
            "hang_timeout_seconds 60 is not below parallel.timeout_seconds 60: use less, or null for half of it",
        ),
        (["optimizer.min_lr=1"], "min_lr 1 is above lr 0.004: use 0 to 0.004"),
        (["optimizer.warmup_steps=200"], "warmup_steps 200 is not below num_steps 200: use 0 to 199"),
        (["optimizer.decay_steps=20"], "warmup_steps 20 is not below decay_steps 20: use 0 to 19"),
        (
            ["optimizer.schedule=wsd", "optimizer.wsd_decay_steps=190"],
            "wsd_decay_steps 190 and warmup_steps 20 are more than num_steps 200: use wsd_decay_steps 1 to 180",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_steps=100"],
            "decay_steps means nothing to schedule wsd: use wsd_decay_steps, or decay_steps null",
        ),
        (
            ["optimizer.wsd_decay_steps=100"],
            "wsd_decay_steps means nothing to schedule cosine: use schedule wsd, or wsd_decay_steps null",
        ),
        (
            ["optimizer.implementation=apex", "optimizer.name=sgd"],
            "implementation apex has no sgd: use implementation auto or torch, or name adamw",
        ),
        (
            ["optimizer.min_loss_scale=8"],
            "min_loss_scale 8 is above initial_loss_scale 4: use at most 4",
        ),
        (["data.split=[0,0,0]"], "data.split leaves nothing to train on: give its first share a value above 0"),
        (
            ["data.tokenizer.kind=sentencepiece"],
            "data.tokenizer.kind sentencepiece needs data.tokenizer.path: give a .model file",
        ),
        (
            ["run.global_batch_size=30"],
            "global_batch_size 30 is not a multiple of micro_batch_size 4: use 28 or 32",
        ),
        (
            ["run.batch_size_ramp={start: 64, increment: 4, num_samples: 9}", "run.global_batch_size=32"],
            "batch_size_ramp.start 64 is above global_batch_size 32: use at most 32",
        ),
        (
            ["run.batch_size_ramp={start: 8, increment: 16, num_samples: 9}", "run.global_batch_size=32"],
            "batch_size_ramp.increment 16 does not lead from batch_size_ramp.start 8 to global_batch_size 32: "
            "use 4, 8, 12, 24",
        ),
        (
            ["parallel.zero_stage=3"],
            "zero_stage 3 with experts is not supported: DeepSpeed refuses its own MoE layers under ZeRO-3; "
            "use zero_stage 1 or 2",
        ),
        (
            ["parallel.zero_stage=0", "run.precision=bf16"],
            "zero_stage 0 with precision bf16 or fp16 is not supported: DeepSpeed's optimizer for that case leaves the "
            "experts out of the gradient norm (DeepSpeed issue 8613); use zero_stage 1 or 2, or precision fp32",
        ),
    ],
)
def test_an_impossible_combination_says_what_would_be_valid(overrides, message):
    assert refused(checked, *overrides) == message


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            [],
            6,
            "6 ranks are not a multiple of tensor_parallel_size 2 x pipeline_parallel_size 2 = 4: "
            "use 4, 8, 12, … ranks",
        ),
        (
            ["parallel.expert_parallel_size=8"],
            8,
            "expert_parallel_size 8 x expert_tensor_parallel_size 1 does not divide the 4 ranks of a pipeline stage: "
            "use expert_parallel_size 1, 2, 4",
        ),
        (
            ["parallel.expert_parallel_size=4", "parallel.expert_tensor_parallel_size=2"],
            8,
            "expert_parallel_size 4 x expert_tensor_parallel_size 2 does not divide the 4 ranks of a pipeline stage: "
            "use expert_parallel_size 1, 2",
        ),
        (
            ["parallel.expert_parallel_size=4", "parallel.all_to_all=hierarchical", "parallel.ranks_per_node=3"],
            8,
            "ranks_per_node 3 puts unequal numbers of an expert group's ranks on its nodes, which all_to_all "
            "hierarchical cannot use: use ranks_per_node 1, 2, 4, 8, or all_to_all flat",
        ),
        (
            ["run.global_batch_size=12"],
            8,
            "global_batch_size 12 is not a multiple of micro_batch_size 4 x data parallel size 2 = 8: use 8 or 16",
        ),
        (
            ["run.batch_size_ramp={start: 4, increment: 4, num_samples: 9}"],
            8,
            "batch_size_ramp.start 4 is not a multiple of micro_batch_size 4 x data parallel size 2 = 8: use 8",
        ),
        (
            ["parallel.virtual_pipeline_parallel_size=2", "run.global_batch_size=24"],
            8,
            "global_batch_size 24 is not a multiple of micro_batch_size 4 x data parallel size 2 x "
            "pipeline_parallel_size 2 = 16, as virtual_pipeline_parallel_size above 1 needs: use 16 or 32",
        ),
    ],
)
def test_what_does_not_fit_the_ranks_says_what_would(overrides, world_size, message):
    checked(*overrides)
    with pytest.raises(ConfigError) as caught:
        checked(*overrides, world_size=world_size)
    assert str(caught.value) == message


def test_training_needs_data():
    message = "data.train is empty: name an indexed dataset, as in data.train=[{path: data/my_text}]"
    assert refused(validate_for_training, load_config("quickstart"), 8) == message
    validate_for_training(load_config("quickstart", ["data.train=[{path: x}]"]), 8)


@pytest.mark.parametrize(
    "overrides",
    [
        ("moe.layer_pattern=[1]", "parallel.pipeline_parallel_size=4"),  # stages without experts
        ("moe.num_experts_by_layer=[4,8]", "parallel.expert_parallel_size=4"),
        ("moe.shared_expert_ffn_hidden_size=32", "moe.shared_expert_mix=sigmoid_gate"),
        ("parallel.virtual_pipeline_parallel_size=2",),
        ("parallel.sequence_parallel=true", "parallel.expert_tensor_parallel_size=2"),
        ("parallel.all_to_all=hierarchical", "parallel.expert_parallel_size=4", "parallel.ranks_per_node=2"),
        ("parallel.all_to_all=hierarchical",),  # how many ranks a node has is the launcher's to say
        ("optimizer.schedule=wsd",),
        ("run.num_steps=10", "optimizer.decay_steps=1000"),  # the start of a longer schedule
        ("parallel.zero_stage=2", "run.precision=fp16", "parallel.recompute=full"),
        ("run.batch_size_ramp={start: 8, increment: 8, num_samples: 100}",),
        (*DENSE, "model.seq_length=127"),  # a dense model without sequence parallel keeps the sequence whole
        ("moe.layer_pattern=1", "model.ffn_hidden_size=511", "moe.expert_ffn_hidden_size=33"),  # no dense layer to cut
    ],
)
def test_possible_combinations_pass(overrides):
    checked(*overrides, world_size=8)


def test_whatever_passes_can_be_folded_and_has_a_table():
    """The rank grid and the parameter table check for themselves: nothing that passes here may fail there."""
    passed = 0
    for tensor in (1, 2, 3, 4):
        for stages in (1, 2, 4):
            for expert in (1, 2, 4, 8):
                for expert_tensor in (1, 2):
                    config = load_config(
                        "quickstart",
                        [
                            f"parallel.tensor_parallel_size={tensor}",
                            f"parallel.pipeline_parallel_size={stages}",
                            f"parallel.expert_parallel_size={expert}",
                            f"parallel.expert_tensor_parallel_size={expert_tensor}",
                            "run.global_batch_size=32",
                        ],
                    )
                    with contextlib.suppress(ConfigError):
                        validate(config, 8)
                        Grid.from_config(config.parallel, 8)
                        assert param_table(config.model, config.moe)
                        passed += 1
    assert passed == 31


def test_divisors_are_all_and_ascending():
    for number in range(1, 200):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


# ---------------------------------------------------------------- the support matrix


def test_the_support_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == support_page()


def test_every_refusal_can_happen_and_is_on_the_page():
    dense = load_config("quickstart", DENSE)
    cases = [
        load_config("quickstart", ["parallel.zero_stage=3"]),
        load_config("quickstart", [*DENSE, "parallel.zero_stage=3"]),
        load_config("quickstart", [*DENSE, *ONE_RANK, "parallel.zero_stage=3"]),
        load_config("quickstart", ["parallel.zero_stage=0", "run.precision=fp16"]),
    ]
    assert [next(refusals(case)) for case in cases] == list(REFUSALS)
    assert not list(refusals(dense))
    page = support_page()
    for refusal in REFUSALS:
        assert f"| {refusal.name} | {refusal.reason} | {refusal.instead} |" in page
    for row in ("| 0 | yes | no | no |", "| 1 | yes | yes | yes |", "| 2 | yes | yes | yes |", "| 3 | no | no | no |"):
        assert row in page


# ---------------------------------------------------------------- guard


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("guard.min_window_steps=200",),
            "min_window_steps 200 is above window_steps 128: use at most 128",
        ),
        (
            ("guard.window_steps=40", "guard.divergence_steps=41"),
            "divergence_steps 41 is above window_steps 40: use at most 40",
        ),
        (
            ("guard.action=roll_back", "checkpoint.save_interval_steps=0"),
            "guard.action roll_back needs checkpoints, but save_interval_steps is 0: use save_interval_steps above 0, "
            "or guard.action skip",
        ),
        (
            ("guard.divergence_action=roll_back", "checkpoint.save_interval_steps=0"),
            "divergence_action roll_back needs checkpoints, but save_interval_steps is 0: use save_interval_steps "
            "above 0, or divergence_action stop",
        ),
        (
            ("guard.action=disabled", "guard.divergence_action=stop"),
            "divergence_action stop needs the guard, but guard.action is disabled: use guard.action warn, or "
            "divergence_action null",
        ),
    ],
)
def test_guard(overrides, message):
    assert refused(checked, *overrides) == message


def test_guards_that_go_together():
    checked("guard.action=disabled", "guard.min_window_steps=8", "guard.window_steps=8")
    checked("guard.action=roll_back", "checkpoint.save_interval_steps=5", "guard.divergence_action=stop")
    checked("guard.action=skip", "checkpoint.save_interval_steps=0")
