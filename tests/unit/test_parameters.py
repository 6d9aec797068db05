"""The parameter table: the paper's counts, shapes, starting distributions, and how ranks cut it."""

import hashlib
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.config.schema import ModelConfig, MoEConfig
from megamoe.errors import ConfigError
from megamoe.topology.parameters import (
    Constant,
    Normal,
    Uniform,
    dimensions,
    experts_by_layer,
    moe_layers,
    num_active_parameters,
    num_parameters,
    padded_vocab_size,
    param_table,
    seed_of,
)
from tests.unit.parameter_cases import MODERN, TINY

# Artetxe et al. 2021: layers, hidden, heads, experts, total, shared, one set of experts, active with top-2.
PAPER = {
    "dense-125m": (12, 768, 12, 0, 124_377_600, None, None, None),
    "dense-355m": (24, 1024, 16, 0, 354_740_224, None, None, None),
    "dense-1.3b": (24, 2048, 32, 0, 1_313_460_224, None, None, None),
    "dense-2.7b": (32, 2560, 32, 0, 2_648_724_480, None, None, None),
    "dense-6.7b": (32, 4096, 32, 0, 6_653_878_272, None, None, None),
    "dense-13b": (40, 5120, 40, 0, 12_847_728_640, None, None, None),
    "moe-15b": (12, 768, 12, 512, 14_605_713_408, 98_402_304, 28_334_592, 155_071_488),
    "moe-52b": (24, 1024, 16, 512, 51_831_371_776, 260_306_944, 100_724_736, 461_756_416),
    "moe-207b": (24, 2048, 32, 512, 207_144_611_840, 923_267_072, 402_776_064, 1_728_819_200),
    "moe-1.1t": (32, 4096, 32, 512, 1_104_219_021_312, 4_539_621_376, 2_147_811_328, 8_835_244_032),
}


def shapes(table) -> dict[str, tuple[int, ...]]:
    return {parameter.name: parameter.shape for parameter in table}


@pytest.mark.parametrize("row", PAPER)
def test_counts_of_the_paper(row):
    layers, hidden, heads, experts, total, shared, expert_set, active = PAPER[row]
    model = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads)
    moe = MoEConfig(num_experts=experts)
    table = param_table(model, moe)
    assert num_parameters(table) == total
    if experts:
        stacked = [parameter for parameter in table if parameter.kind == "expert"]
        assert num_parameters(parameter for parameter in table if parameter.kind != "expert") == shared
        assert num_parameters(stacked) == expert_set * experts
        assert num_active_parameters(table, moe) == active == shared + 2 * expert_set
    else:
        assert num_active_parameters(table, moe) == total


def test_table_of_a_trillion_parameters_is_a_few_hundred_entries_made_at_once():
    layers, hidden, heads, experts, *_ = PAPER["moe-1.1t"]
    model = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads)
    start = time.process_time()
    table = param_table(model, MoEConfig(num_experts=experts))
    assert time.process_time() - start < 0.2
    assert len(table) < 500


def test_mixtral_counts():
    """mistralai/Mixtral-8x7B-v0.1: 46,702,792,704 parameters, 12,879,925,248 active (its config.json's shapes)."""
    model = ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32000,
        normalization="rmsnorm",
        activation="swiglu",
        position_embedding="rope",
        use_bias=False,
        tie_embeddings=False,
    )
    moe = MoEConfig(num_experts=8, layer_pattern=1)
    assert num_parameters(param_table(model, moe)) == 46_702_792_704
    assert num_active_parameters(param_table(model, moe), moe) == 12_879_925_248


def test_names_and_shapes_of_the_paper_family():
    table = shapes(param_table(TINY, MoEConfig(num_experts=6)))
    assert table["embedding.weight"] == (32, 8)
    assert "output.weight" not in table
    layer = {name: shape for name, shape in table.items() if name.startswith("layers.0.")}
    assert layer == {
        "layers.0.attention_norm.weight": (8,),
        "layers.0.attention_norm.bias": (8,),
        "layers.0.attention.qkv.weight": (24, 8),
        "layers.0.attention.qkv.bias": (24,),
        "layers.0.attention.out.weight": (8, 8),
        "layers.0.attention.out.bias": (8,),
        "layers.0.ffn_norm.weight": (8,),
        "layers.0.ffn_norm.bias": (8,),
        "layers.0.ffn.fc1.weight": (32, 8),
        "layers.0.ffn.fc1.bias": (32,),
        "layers.0.ffn.fc2.weight": (8, 32),
        "layers.0.ffn.fc2.bias": (8,),
    }
    experts = {name: shape for name, shape in table.items() if ".experts." in name or ".router." in name}
    assert experts == {
        f"layers.{i}.{ending}": shape
        for i in (1, 3)
        for ending, shape in {
            "router.weight": (6, 8),
            "experts.fc1.weight": (6, 32, 8),
            "experts.fc1.bias": (6, 32),
            "experts.fc2.weight": (6, 8, 32),
            "experts.fc2.bias": (6, 8),
        }.items()
    }


def test_names_and_shapes_of_the_modern_family():
    moe = MoEConfig(num_experts=6, layer_pattern=(3,), expert_ffn_hidden_size=10)
    table = shapes(param_table(MODERN, moe))
    assert not [name for name in table if name.endswith("bias")]
    assert table["layers.0.attention.qkv.weight"] == ((4 + 2 * 2) * 6, 8)
    assert table["layers.0.attention.q_norm.weight"] == (24,)
    assert table["layers.0.attention.k_norm.weight"] == (12,)
    assert table["layers.0.attention.out.weight"] == (8, 24)
    assert table["layers.0.ffn.fc1.weight"] == (2, 12, 8)
    assert table["layers.0.ffn.fc2.weight"] == (8, 12)
    assert table["layers.3.experts.fc1.weight"] == (6, 2, 10, 8)
    assert table["layers.3.experts.fc2.weight"] == (6, 8, 10)
    assert table["output.weight"] == (32, 8)
    biased = shapes(param_table(MODERN.model_copy(update={"use_bias": True, "qk_norm": "head"}), moe))
    assert biased["layers.0.ffn.fc1.bias"] == (2, 12)
    assert biased["layers.3.experts.fc1.bias"] == (6, 2, 10)
    assert biased["layers.0.attention.q_norm.weight"] == biased["layers.0.attention.k_norm.weight"] == (6,)


def test_names_and_shapes_of_shared_experts():
    added = MoEConfig(num_experts=6, shared_expert_ffn_hidden_size=20)
    table = {p.name: p for p in param_table(TINY, added) if "shared" in p.name}
    assert {name: p.shape for name, p in table.items()} == {
        f"layers.{i}.shared_expert.{ending}": shape
        for i in (1, 3)
        for ending, shape in {"fc1.weight": (20, 8), "fc1.bias": (20,), "fc2.weight": (8, 20), "fc2.bias": (8,)}.items()
    }
    assert [table[f"layers.1.shared_expert.{name}"].tensor_dim for name in ("fc1.weight", "fc1.bias")] == [0, 0]
    assert [table[f"layers.1.shared_expert.{name}"].tensor_dim for name in ("fc2.weight", "fc2.bias")] == [1, None]
    assert {(p.kind, p.expert_dim) for p in table.values()} == {("ffn", None)}
    gated = shapes(param_table(MODERN, added.model_copy(update={"shared_expert_mix": "sigmoid_gate"})))
    assert gated["layers.1.shared_expert.fc1.weight"] == (2, 20, 8)
    assert gated["layers.1.shared_expert_mix.weight"] == (1, 8)
    assert not [name for name in gated if name.endswith("bias")]
    residual = added.model_copy(update={"shared_expert_mix": "residual"})
    mix = [p for p in param_table(MODERN, residual) if p.kind == "mix"]  # a bias whatever use_bias says
    assert {p.name: p.shape for p in mix} == {
        f"layers.{i}.shared_expert_mix.{ending}": shape
        for i in (1, 3)
        for ending, shape in {"weight": (2, 8), "bias": (2,)}.items()
    }
    assert all((p.tensor_dim, p.expert_dim) == (None, None) for p in mix)
    assert all(p.is_bias_or_norm == p.name.endswith("bias") for p in mix)


def test_every_layer_of_a_pyramid_has_its_own_number_of_experts():
    moe = MoEConfig(num_experts=6, layer_pattern=(3, 0, 1), num_experts_by_layer=(2, 4, 6))
    assert experts_by_layer(TINY, moe) == {0: 2, 1: 4, 3: 6}
    assert list(experts_by_layer(TINY, moe)) == [0, 1, 3]
    assert experts_by_layer(TINY, MoEConfig(num_experts=6)) == {1: 6, 3: 6}
    assert experts_by_layer(TINY, MoEConfig()) == {}
    table = shapes(param_table(TINY, moe))
    assert [table[f"layers.{i}.router.weight"][0] for i in (0, 1, 3)] == [2, 4, 6]
    assert [table[f"layers.{i}.experts.fc2.bias"] for i in (0, 1, 3)] == [(2, 8), (4, 8), (6, 8)]
    assert "layers.2.ffn.fc1.weight" in table
    with pytest.raises(ConfigError) as raised:
        experts_by_layer(TINY, MoEConfig(num_experts=6, num_experts_by_layer=(2, 4, 6)))
    assert str(raised.value) == (
        "moe.num_experts_by_layer has 3 entries, but 2 layers hold experts: give one for each of them"
    )


def test_active_parameters_of_a_pyramid_with_shared_experts():
    """The shared expert counts once, whole; of each layer's experts top_k, or all where there are fewer."""
    moe = MoEConfig(
        num_experts=6, top_k=2, num_experts_by_layer=(1, 6), shared_expert_ffn_hidden_size=20,
        shared_expert_mix="residual",
    )  # fmt: skip
    table = param_table(TINY, moe)
    ffn, shared, mix = 2 * 8 * 32 + 32 + 8, 2 * 8 * 20 + 20 + 8, 2 * 8 + 2
    rest = num_parameters(param_table(TINY, MoEConfig())) - 2 * ffn
    assert num_parameters(table) == rest + (1 + 6) * (ffn + 8) + 2 * (shared + mix)
    assert num_active_parameters(table, moe) == rest + (1 + 2) * ffn + (1 + 6) * 8 + 2 * (shared + mix)


def test_parameters_of_published_shared_and_pyramid_models():
    """Qwen1.5-MoE-A2.7B (its config.json's shapes, without the biases of queries, keys and values): 14.3B, 2.7B."""
    model = ModelConfig(
        num_layers=24, hidden_size=2048, num_attention_heads=16, vocab_size=151_936, normalization="rmsnorm",
        activation="swiglu", position_embedding="rope", use_bias=False, tie_embeddings=False,
    )  # fmt: skip
    moe = MoEConfig(
        num_experts=60, top_k=4, layer_pattern=1, expert_ffn_hidden_size=1408, shared_expert_ffn_hidden_size=5632,
        shared_expert_mix="sigmoid_gate",
    )  # fmt: skip
    table = param_table(model, moe)
    assert num_parameters(table) == 14_315_784_192 - 24 * 3 * 2048
    assert 2.6e9 < num_active_parameters(table, moe) < 2.75e9


def test_which_dimension_of_each_tensor_is_cut():
    """By name ending: (tensor_dim, expert_dim). Nothing else is cut."""
    plain = {
        "qkv.weight": 0,
        "qkv.bias": 0,
        "out.weight": 1,
        "ffn.fc1.weight": 0,
        "ffn.fc1.bias": 0,
        "ffn.fc2.weight": 1,
    }
    halved = plain | {"ffn.fc1.weight": 1, "ffn.fc1.bias": 1, "q_norm.weight": 0, "k_norm.weight": 0}
    experts = {"fc1.weight": 1, "fc1.bias": 1, "fc2.weight": 2, "fc2.bias": None}
    halved_experts = experts | {"fc1.weight": 2, "fc1.bias": 2}
    modern = MODERN.model_copy(update={"use_bias": True})
    for model, dense, stacked in ((TINY, plain, experts), (modern, halved, halved_experts)):
        cuts = {name: (dim, None) for name, dim in dense.items()}
        cuts |= {f"experts.{name}": (dim, 0) for name, dim in stacked.items()}
        cuts |= {"embedding.weight": (0, None), "output.weight": (0, None)}
        table = param_table(model, MoEConfig(num_experts=4))
        for parameter in table:
            expected = next((cut for ending, cut in cuts.items() if parameter.name.endswith(ending)), (None, None))
            assert (parameter.tensor_dim, parameter.expert_dim) == expected, parameter.name
        uncut = {p.name for p in table if p.tensor_dim is None and p.layer == 0}
        assert {"layers.0.attention.out.bias", "layers.0.ffn.fc2.bias", "layers.0.ffn_norm.weight"} <= uncut


def test_order_is_that_of_the_model_and_names_are_unique():
    table = param_table(MODERN, MoEConfig(num_experts=4))
    assert len({parameter.name for parameter in table}) == len(table)
    layers = [parameter.layer for parameter in table]
    assert (layers[0], table[0].name) == (None, "embedding.weight")
    assert [table[-2].name, table[-1].name] == ["final_norm.weight", "output.weight"]
    inner = [layer for layer in layers if layer is not None]
    assert inner == sorted(inner)
    assert set(inner) == set(range(4))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [(1, (0, 1, 2, 3)), (2, (1, 3)), (3, (2,)), (5, ()), ((2, 0), (0, 2)), ((), ())],
)
def test_moe_layers(pattern, expected):
    assert moe_layers(TINY, MoEConfig(num_experts=4, layer_pattern=pattern)) == expected
    assert moe_layers(TINY, MoEConfig(num_experts=0, layer_pattern=pattern)) == ()


def test_what_cannot_be_a_table_says_why():
    with pytest.raises(ConfigError) as raised:
        moe_layers(TINY, MoEConfig(num_experts=4, layer_pattern=(1, 4)))
    assert str(raised.value) == ("moe.layer_pattern names layer 4, but model.num_layers is 4: use layers 0 to 3")
    with pytest.raises(
        ConfigError, match=r"model\.num_query_groups 3 does not divide model\.num_attention_heads 4: use one"
    ):
        dimensions(TINY.model_copy(update={"num_query_groups": 3}), MoEConfig())
    with pytest.raises(ConfigError, match=r"model\.num_attention_heads 3 does not divide model\.hidden_size 8"):
        dimensions(TINY.model_copy(update={"num_attention_heads": 3}), MoEConfig())


@settings(deadline=None)
@given(st.integers(1, 100_000), st.integers(1, 1024))
def test_padded_vocabulary(vocab_size, multiple):
    padded = padded_vocab_size(ModelConfig(vocab_size=vocab_size, vocab_size_multiple=multiple))
    assert padded % multiple == 0
    assert 0 <= padded - vocab_size < multiple


def test_initial_values_of_the_paper_family():
    model = TINY.model_copy(update={"num_query_groups": 2})
    moe = MoEConfig(num_experts=6, shared_expert_ffn_hidden_size=20, shared_expert_mix="residual")
    init = {p.name: p.init for p in param_table(model, moe)}
    assert init["embedding.weight"] == Normal(8**-0.5)
    assert init["layers.0.attention.qkv.weight"].bound == pytest.approx(math.sqrt(1 / 2) * math.sqrt(6 / (8 + 8)))
    assert init["layers.0.attention.qkv.bias"] == Uniform(8**-0.5)
    assert init["layers.0.attention.out.weight"] == Uniform(math.sqrt(6 / 16))
    assert init["layers.0.attention.out.bias"] == Constant(0.0)
    assert init["layers.0.ffn.fc1.weight"] == init["layers.1.experts.fc1.bias"] == Uniform(8**-0.5)
    assert init["layers.0.ffn.fc2.weight"] == init["layers.1.experts.fc2.bias"] == Uniform(32**-0.5)
    assert init["layers.1.experts.fc2.weight"] == Uniform(32**-0.5)
    assert init["layers.1.router.weight"] == Uniform(8**-0.5)
    assert init["layers.1.shared_expert.fc1.weight"] == init["layers.1.shared_expert.fc1.bias"] == Uniform(8**-0.5)
    assert init["layers.1.shared_expert.fc2.weight"] == init["layers.1.shared_expert.fc2.bias"] == Uniform(20**-0.5)
    assert init["layers.1.shared_expert_mix.weight"] == init["layers.1.shared_expert_mix.bias"] == Uniform(8**-0.5)
    assert init["final_norm.weight"] == Constant(1.0)
    assert init["final_norm.bias"] == Constant(0.0)


def test_initial_values_of_the_normal_rule():
    model = MODERN.model_copy(update={"use_bias": True, "init_std": 0.04})
    moe = MoEConfig(num_experts=6, shared_expert_ffn_hidden_size=20, shared_expert_mix="residual")
    table = param_table(model, moe)
    small = Normal(0.04 / math.sqrt(2 * 4))
    for parameter in table:
        if parameter.kind == "norm":
            expected = Constant(1.0)
        elif parameter.name.endswith("bias"):
            expected = Constant(0.0)
        elif parameter.name.endswith(("attention.out.weight", "fc2.weight")):
            expected = small
        else:
            expected = Normal(0.04)
        assert parameter.init == expected, parameter.name


def test_biases_and_norms_are_marked():
    for parameter in param_table(TINY, MoEConfig(num_experts=4)):
        assert parameter.is_bias_or_norm == (parameter.name.endswith("bias") or "norm" in parameter.name)
    marked = {p.name for p in param_table(MODERN, MoEConfig()) if p.is_bias_or_norm}
    assert {"layers.0.attention.q_norm.weight", "final_norm.weight"} <= marked


def test_seeds_are_the_documented_hash_and_differ_by_name_and_run():
    digest = hashlib.blake2b(b"7:layers.1.experts.fc1.weight/3").digest()
    assert seed_of(7, "layers.1.experts.fc1.weight/3") == int.from_bytes(digest[:8], "little") >> 1
    seeds = {seed_of(seed, f"name/{i}") for seed in range(10) for i in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
