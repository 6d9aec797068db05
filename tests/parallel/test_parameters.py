"""The parameter table is the model: every parameter of every laptop-sized architecture, by name, shape and count."""

from functools import cache

import pytest

from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.topology.parameters import num_parameters, param_table
from tests.harness import run_ranks
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS, trainer_of

ONE_RANK = ("tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size", "expert_parallel_size")
PLAIN = (*(f"parallel.{size}=1" for size in ONE_RANK), "parallel.zero_stage=1", "run.precision=fp32")
NARROW = (
    "model.num_layers=3", "model.hidden_size=48", "model.ffn_hidden_size=80", "model.num_attention_heads=4",
    "model.vocab_size=500", "model.seq_length=32",
)  # fmt: skip
GROUPED = ("model.num_query_groups=2", "model.head_dim=20")  # heads that are wider together than the hidden states

# name -> preset, overrides
ARCHITECTURES = {
    "laptop-dense": ("laptop-dense", ()),
    "laptop-moe": ("laptop-moe", ()),
    "laptop-moe-modern": ("laptop-moe-modern", ()),
    "quickstart": ("quickstart", ()),
    "tiny mixtral": ("mixtral-8x7b", (*NARROW, "model.num_query_groups=2", "moe.num_experts=4")),
    "tiny olmoe": ("olmoe-1b-7b", (*NARROW, "model.num_query_groups=null", "moe.num_experts=6", "moe.top_k=3",
                                   "moe.expert_ffn_hidden_size=24")),
    "tiny qwen3": ("qwen3-30b-a3b", (*NARROW, *GROUPED, "moe.num_experts=8", "moe.top_k=2",
                                     "moe.expert_ffn_hidden_size=24")),
    "tiny paper": ("moe-15b", (*NARROW, "model.num_layers=4", "moe.num_experts=4")),
    "tiny dense": ("dense-125m", (*NARROW, "model.tie_embeddings=false")),
    "tiny shared": ("olmoe-1b-7b", (*NARROW, "model.num_query_groups=null", "moe.num_experts=6", "moe.top_k=3",
                                    "moe.shared_expert_ffn_hidden_size=40", "moe.shared_expert_mix=sigmoid_gate")),
    "tiny pr-moe": ("moe-15b", (*NARROW, "model.num_layers=4", "moe.num_experts=8", "moe.num_experts_by_layer=[4,8]",
                                "moe.shared_expert_ffn_hidden_size=80", "moe.shared_expert_mix=residual")),
    "tiny listed": ("olmoe-1b-7b", (*NARROW, "model.num_query_groups=null", "moe.num_experts=6", "moe.top_k=3",
                                    "moe.layer_pattern=[0,2]", "model.use_bias=true", "model.normalization=layernorm")),
}  # fmt: skip


def settings_of(name: str) -> Config:
    preset, overrides = ARCHITECTURES[name]
    found = load_config(preset, [*PLAIN, *overrides])
    validate(found, 1)
    return found


def on_rank() -> dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...], int]]]:
    """Of every architecture: global name, shape as the table has it, shape in the module, elements."""
    found = {}
    for name in ARCHITECTURES:
        with trainer_of(settings_of(name)) as trainer:
            found[name] = [
                (local.parameter.name, tuple(local.view.shape), tuple(local.tensor.shape), local.tensor.numel())
                for local in trainer.parameters
            ]
            assert len(found[name]) == len(list(trainer.engine.module.parameters()))
    return found


@cache
def launch() -> dict[str, list[tuple[str, tuple[int, ...], tuple[int, ...], int]]]:
    return run_ranks(on_rank, 1, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_has_the_parameters_of_the_table(name):
    settings = settings_of(name)
    table = param_table(settings.model, settings.moe)
    real = launch()[name]
    assert sorted(entry[0] for entry in real) == sorted(parameter.name for parameter in table)  # each once
    assert {entry[0]: entry[1] for entry in real} == {parameter.name: parameter.shape for parameter in table}
    assert sum(entry[3] for entry in real) == num_parameters(table)
    for global_name, shape, module_shape, _ in real:  # only the halves of a dense gated FFN may be flattened
        halves = ".fc1." in global_name and ".experts." not in global_name and len(shape) > 1
        flattened = (shape[0] * shape[1], *shape[2:]) if halves else shape
        assert module_shape in (shape, flattened), global_name


def test_count_of_a_tiny_mixtral_by_hand():
    """d 48, 4 heads of 12, 2 key and value heads, 4 experts of 80, 3 layers, 512 padded rows twice."""
    attention = 48 * (48 + 24 + 24) + 48 * 48
    experts = 4 * 3 * 48 * 80 + 4 * 48
    assert sum(entry[3] for entry in launch()["tiny mixtral"]) == 2 * 512 * 48 + 3 * (attention + experts + 96) + 48
