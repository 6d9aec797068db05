"""The presets: exact sizes, and the optimiser settings of the paper's runs."""

import pytest

from megamoe.config import Config, load_config, validate
from megamoe.config.presets import PRESETS
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import (
    moe_layers,
    num_active_parameters,
    num_parameters,
    padded_vocab_size,
    param_table,
)

# name: layers, hidden, heads, parameters, active per token; at a vocabulary of 51,200 rows
PAPER_SIZES = {
    "dense-125m": (12, 768, 12, 124_377_600, 124_377_600),
    "dense-355m": (24, 1024, 16, 354_740_224, 354_740_224),
    "dense-1.3b": (24, 2048, 32, 1_313_460_224, 1_313_460_224),
    "dense-2.7b": (32, 2560, 32, 2_648_724_480, 2_648_724_480),
    "dense-6.7b": (32, 4096, 32, 6_653_878_272, 6_653_878_272),
    "dense-13b": (40, 5120, 40, 12_847_728_640, 12_847_728_640),
    "moe-15b": (12, 768, 12, 14_605_713_408, 155_071_488),
    "moe-52b": (24, 1024, 16, 51_831_371_776, 461_756_416),
    "moe-207b": (24, 2048, 32, 207_144_611_840, 1_728_819_200),
    "moe-1.1t": (32, 4096, 32, 1_104_219_021_312, 8_835_244_032),
}

# name: GPUs, sequences per GPU, accumulation, peak lr, warmup updates, updates, dropout, weight decay
PAPER_RUNS = {
    "dense-125m": (32, 4, 2, 6e-4, 750, 572_204, 0.1, 0.01),
    "dense-355m": (64, 1, 4, 3e-4, 715, 572_204, 0.0, 0.01),
    "dense-1.3b": (256, 2, 1, 2e-4, 357, 286_102, 0.1, 0.01),
    "dense-2.7b": (128, 4, 1, 1.6e-4, 357, 286_102, 0.1, 0.01),
    "dense-6.7b": (128, 8, 1, 1.2e-4, 187, 143_051, 0.1, 0.01),
    "dense-13b": (256, 4, 1, 1e-4, 187, 143_051, 0.1, 0.01),
    "moe-15b": (64, 4, 1, 6e-4, 750, 572_204, 0.1, 0.01),
    "moe-52b": (128, 2, 1, 3e-4, 715, 572_204, 0.0, 0.01),
    "moe-207b": (256, 2, 1, 1.6e-4, 2000, 286_102, 0.1, 0.0),
    "moe-1.1t": (256, 4, 1, 1.2e-4, 187, 143_051, 0.1, 0.01),
}

MODERN_SIZES = {
    "mixtral-8x7b": (46_702_792_704, 32_000),
    "olmoe-1b-7b": (6_919_161_856, 50_304),
    "qwen3-30b-a3b": (30_532_122_624, 151_936),
}


def sizes(config: Config) -> tuple[int, int]:
    table = param_table(config.model, config.moe)
    return num_parameters(table), num_active_parameters(table, config.moe)


def test_all_presets_are_there():
    laptop = {"laptop-dense", "laptop-moe", "laptop-moe-modern", "quickstart"}
    assert set(PRESETS) == set(PAPER_SIZES) | set(MODERN_SIZES) | laptop
    families = {preset.name: preset.family for preset in PRESETS.values()}
    assert {name for name, family in families.items() if family == "paper"} == set(PAPER_SIZES)
    assert {name for name, family in families.items() if family == "modern"} == set(MODERN_SIZES)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_possible(name):
    validate(load_config(name))


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_sizes_are_exact(name):
    config = load_config(name)
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, *sizes(config)) == PAPER_SIZES[name]
    assert (padded_vocab_size(model), model.seq_length) == (51_200, 2048)
    if name.startswith("moe"):
        assert (config.moe.num_experts, config.moe.top_k) == (512, 2)
        assert moe_layers(model, config.moe) == tuple(range(1, model.num_layers, 2))


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_sizes_follow_from_the_closed_form(name):
    """V h + L (4 h^2 + 8 h) + dense FFNs + experts + routers + 2 h, from shapes alone."""
    config = load_config(name)
    layers, h, experts = config.model.num_layers, config.model.hidden_size, config.moe.num_experts
    ffn, with_experts = 8 * h * h + 5 * h, layers // 2 if experts else 0
    total = 51_200 * h + layers * (4 * h * h + 8 * h) + (layers - with_experts) * ffn + 2 * h
    total += with_experts * experts * (ffn + h)
    assert sizes(config)[0] == total


@pytest.mark.parametrize("name", PAPER_RUNS)
def test_paper_runs(name):
    num_gpus, sequences, accumulation, lr, warmup, updates, dropout, weight_decay = PAPER_RUNS[name]
    config = load_config(name)
    run, optimizer, model = config.run, config.optimizer, config.model
    assert (optimizer.lr, optimizer.warmup_steps, run.num_steps) == (lr, warmup, updates)
    assert (model.attention_dropout, model.hidden_dropout, optimizer.weight_decay) == (dropout, dropout, weight_decay)
    assert run.micro_batch_size == sequences
    assert run.global_batch_size == num_gpus * sequences * accumulation
    assert 300_000_000_000 // (run.global_batch_size * 2048) == updates
    assert optimizer.loss_scale_window_steps == 2**14 // num_gpus // accumulation
    # what all runs share
    assert (optimizer.name, optimizer.schedule, optimizer.min_lr, optimizer.clip_grad) == ("adamw", "linear", 0.0, 0.0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.98, 1e-8)
    assert optimizer.decay_norms_and_biases
    assert (run.precision, optimizer.initial_loss_scale, optimizer.min_loss_scale) == ("fp16", 4.0, 1e-4)
    assert (run.seed, run.eval_interval_steps, config.parallel.recompute) == (1, 1000, "full")
    validate(config, num_gpus)


@pytest.mark.parametrize("name", [name for name in PAPER_RUNS if name.startswith("moe")])
def test_paper_runs_with_experts(name):
    num_gpus = PAPER_RUNS[name][0]
    config = load_config(name)
    assert config.optimizer.expert_grad_scaling == "sqrt_world_size"
    assert config.optimizer.expert_grad_world_size == num_gpus
    assert config.parallel.expert_parallel_size == num_gpus
    assert config.parallel.zero_stage == (2 if name == "moe-1.1t" else 1)
    moe = config.moe
    assert (moe.capacity_factor, moe.eval_capacity_factor, moe.dropless) == (1.0, None, False)
    assert (moe.balance_loss, moe.balance_loss_coeff, moe.normalize_gates) == ("first_choice", 0.01, True)


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_family(name):
    model = load_config(name).model
    assert (model.normalization, model.norm_epsilon, model.activation) == ("layernorm", 1e-5, "gelu")
    assert (model.position_embedding, model.init) == ("sinusoidal", "fairseq")
    assert model.use_bias
    assert model.tie_embeddings
    assert model.scale_embeddings


@pytest.mark.parametrize("name", MODERN_SIZES)
def test_modern_sizes_are_the_published_ones(name):
    config = load_config(name)
    assert (sizes(config)[0], padded_vocab_size(config.model)) == MODERN_SIZES[name]
    model = config.model
    assert (model.normalization, model.activation, model.position_embedding) == ("rmsnorm", "swiglu", "rope")
    assert not (model.use_bias or model.tie_embeddings or model.scale_embeddings)
    assert config.moe.dropless
    assert len(moe_layers(model, config.moe)) == model.num_layers


@pytest.mark.parametrize("name", MODERN_SIZES)
def test_modern_sizes_follow_from_the_shape(name):
    """Counted by hand: untied embeddings, grouped-query attention, gated experts in every layer."""
    config = load_config(name)
    model, moe = config.model, config.moe
    d, heads, groups = model.hidden_size, model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    head_dim = model.head_dim or d // heads
    attention = 2 * d * heads * head_dim + 2 * d * groups * head_dim
    attention += {"none": 0, "head": 2 * head_dim, "full": (heads + groups) * head_dim}[model.qk_norm]
    experts = moe.num_experts * 3 * d * (moe.expert_ffn_hidden_size or model.ffn_hidden_size)
    layer = attention + experts + moe.num_experts * d + 2 * d
    assert sizes(config)[0] == model.num_layers * layer + 2 * model.vocab_size * d + d


def test_modern_routers_are_the_published_ones():
    found = {}
    for name in MODERN_SIZES:
        config = load_config(name)
        moe, model = config.moe, config.model
        found[name] = (
            moe.num_experts,
            moe.top_k,
            moe.normalize_gates,
            model.qk_norm,
            model.rope_base,
            model.norm_epsilon,
        )
    assert found == {
        "mixtral-8x7b": (8, 2, True, "none", 1e6, 1e-5),
        "olmoe-1b-7b": (64, 8, False, "full", 1e4, 1e-5),
        "qwen3-30b-a3b": (128, 8, True, "head", 1e6, 1e-6),
    }
    # 0.01 times the mean over 16 layers is 0.01 / 16 times their sum
    assert load_config("olmoe-1b-7b").moe.balance_loss_coeff == pytest.approx(0.01 / 16, rel=1e-12)
    assert load_config("mixtral-8x7b").moe.balance_loss_coeff == pytest.approx(0.02 * 2 / 32, rel=1e-12)


def test_quickstart_fits_eight_ranks():
    config = load_config("quickstart")
    validate(config, 8)
    grid = Grid.from_config(config.parallel, 8)
    assert (grid.tensor, grid.pipeline, grid.expert, grid.data, config.parallel.zero_stage) == (2, 2, 2, 2, 1)
    assert 2_000_000 <= sizes(config)[0] <= 4_000_000
    assert (config.model.vocab_size, config.model.seq_length, moe_layers(config.model, config.moe)) == (
        4096,
        128,
        (1, 3),
    )


@pytest.mark.parametrize("name", ["laptop-dense", "laptop-moe", "laptop-moe-modern"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_laptop_presets_fit_one_rank_and_a_few(name, world_size):
    validate(load_config(name), world_size)


def test_laptop_families():
    assert load_config("laptop-moe").model == load_config("laptop-dense").model
    assert load_config("laptop-moe-modern").model.normalization == "rmsnorm"
    assert load_config("laptop-dense").moe.num_experts == 0
