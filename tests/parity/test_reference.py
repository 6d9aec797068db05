"""The reference itself, held against Hugging Face models, torch's own optimizers and the literal gate."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from megamoe.config.schema import Config
from tests.parity.gate_reference import paper_capacity, paper_gate
from tests.parity.mixture_reference import mixture
from tests.parity.reference import ReferenceRun, feed_forward, forward, global_batch, learning_rate

VOCAB, HIDDEN, HEADS, FFN, EXPERTS, SEQ = 96, 32, 4, 48, 4, 16
MODERN = {
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "use_bias": False,
    "tie_embeddings": False,
    "scale_embeddings": False,
}
HF_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": SEQ,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def make_config(**sections: dict) -> Config:
    model = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "vocab_size": VOCAB,
        "vocab_size_multiple": 1,
        "seq_length": SEQ,
    }
    return Config.model_validate({**sections, "model": {**model, **sections.get("model", {})}})


def build(model_class: type, config: transformers.PretrainedConfig) -> torch.nn.Module:
    """A Hugging Face model whose every weight is random: norms off 1, biases off 0."""
    torch.manual_seed(7)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.15 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def fuse_qkv(parts: list[Tensor], num_groups: int) -> Tensor:
    """Stack q, k and v rows group by group."""
    per_group = [part.unflatten(0, (num_groups, -1)) for part in parts]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def from_llama_family(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of Llama, Qwen3, Mixtral, Qwen3-MoE or OLMoE under the names of the parameter table."""
    state = {name: w.detach() for name, w in model.state_dict().items()}
    ours = {
        "embedding.weight": state["model.embed_tokens.weight"],
        "final_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for i in range(model.config.num_hidden_layers):
        old, new = f"model.layers.{i}", f"layers.{i}"
        qkv = [state[f"{old}.self_attn.{c}_proj.weight"] for c in "qkv"]
        ours[f"{new}.attention.qkv.weight"] = fuse_qkv(qkv, model.config.num_key_value_heads)
        ours[f"{new}.attention.out.weight"] = state[f"{old}.self_attn.o_proj.weight"]
        ours[f"{new}.attention_norm.weight"] = state[f"{old}.input_layernorm.weight"]
        ours[f"{new}.ffn_norm.weight"] = state[f"{old}.post_attention_layernorm.weight"]
        for part in ("q_norm", "k_norm"):
            if f"{old}.self_attn.{part}.weight" in state:
                ours[f"{new}.attention.{part}.weight"] = state[f"{old}.self_attn.{part}.weight"]
        if f"{old}.mlp.gate.weight" in state:
            ours[f"{new}.router.weight"] = state[f"{old}.mlp.gate.weight"]
            ours[f"{new}.experts.fc1.weight"] = state[f"{old}.mlp.experts.gate_up_proj"].unflatten(1, (2, -1))
            ours[f"{new}.experts.fc2.weight"] = state[f"{old}.mlp.experts.down_proj"]
        else:
            halves = [state[f"{old}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
            ours[f"{new}.ffn.fc1.weight"] = torch.stack(halves)
            ours[f"{new}.ffn.fc2.weight"] = state[f"{old}.mlp.down_proj.weight"]
    return ours


def from_xglm(model: torch.nn.Module) -> dict[str, Tensor]:
    state = {name: w.detach() for name, w in model.state_dict().items()}
    ours = {"embedding.weight": state["model.embed_tokens.weight"]}
    renamed = {
        "attention.out": "self_attn.out_proj",
        "attention_norm": "self_attn_layer_norm",
        "ffn_norm": "final_layer_norm",
        "ffn.fc1": "fc1",
        "ffn.fc2": "fc2",
    }
    for kind in ("weight", "bias"):
        ours[f"final_norm.{kind}"] = state[f"model.layer_norm.{kind}"]
        for i in range(model.config.num_layers):
            qkv = [state[f"model.layers.{i}.self_attn.{c}_proj.{kind}"] for c in "qkv"]
            ours[f"layers.{i}.attention.qkv.{kind}"] = fuse_qkv(qkv, HEADS)
            for new, old in renamed.items():
                ours[f"layers.{i}.{new}.{kind}"] = state[f"model.layers.{i}.{old}.{kind}"]
    return ours


def sample_tokens(num_sequences: int = 3, extra: int = 0, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (num_sequences, SEQ + extra), generator=generator)


def qwen3_moe(**changes: object) -> transformers.Qwen3MoeConfig:
    """MoE in every second layer, gates normalised, queries and keys normalised per head."""
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return transformers.Qwen3MoeConfig(**HF_COMMON, **{**moe, "decoder_sparse_step": 2, "head_dim": 16, **changes})


def mixture_settings(**changes: object) -> dict:
    return {"num_experts": EXPERTS, "top_k": 2, "dropless": True, "layer_pattern": 1, **changes}


LLAMA_FAMILY = {
    "llama": lambda: (
        build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**HF_COMMON)),
        make_config(model={**MODERN, "num_query_groups": 2}),
    ),
    "qwen3": lambda: (
        build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**HF_COMMON, head_dim=16)),
        make_config(model={**MODERN, "num_query_groups": 2, "head_dim": 16, "qk_norm": "head"}),
    ),
    "mixtral": lambda: (
        build(transformers.MixtralForCausalLM, transformers.MixtralConfig(**HF_COMMON, num_local_experts=EXPERTS)),
        make_config(model={**MODERN, "num_query_groups": 2}, moe=mixture_settings()),
    ),
    "qwen3_moe": lambda: (
        build(transformers.Qwen3MoeForCausalLM, qwen3_moe()),
        make_config(
            model={**MODERN, "num_query_groups": 2, "head_dim": 16, "qk_norm": "head"},
            moe=mixture_settings(layer_pattern=2, expert_ffn_hidden_size=24),
        ),
    ),
    "olmoe": lambda: (
        build(
            transformers.OlmoeForCausalLM,
            transformers.OlmoeConfig(**HF_COMMON, num_experts=EXPERTS, num_experts_per_tok=3),
        ),
        make_config(
            model={**MODERN, "num_query_groups": 2, "qk_norm": "full"},
            moe=mixture_settings(top_k=3, normalize_gates=False),
        ),
    ),
}


@pytest.mark.parametrize("family", LLAMA_FAMILY)
def test_logits_equal_hugging_face(family: str) -> None:
    model, config = LLAMA_FAMILY[family]()
    tokens = sample_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        logits, _ = forward(config, from_llama_family(model), tokens)
    assert expected.std() > 0.1  # random weights must not have collapsed to a constant
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_logits_of_the_papers_dense_model_equal_xglm() -> None:
    model = build(transformers.XGLMForCausalLM, xglm_config())
    tokens = sample_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        logits, mixed = forward(make_config(), from_xglm(model), tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert mixed == {}


def xglm_config() -> transformers.XGLMConfig:
    return transformers.XGLMConfig(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        ffn_dim=FFN,
        num_layers=2,
        attention_heads=HEADS,
        max_position_embeddings=SEQ,
        activation_function="gelu",
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        scale_embedding=True,
        attn_implementation="eager",
    )


def test_balance_loss_of_all_choices_equals_hugging_face() -> None:
    """Theirs sums the k shares where ours averages them, so it is k times as large; one layer, or they pool layers."""
    model = build(transformers.Qwen3MoeForCausalLM, qwen3_moe())
    moe = mixture_settings(layer_pattern=2, expert_ffn_hidden_size=24, balance_loss="all_choices")
    config = make_config(model={**MODERN, "num_query_groups": 2, "head_dim": 16, "qk_norm": "head"}, moe=moe)
    tokens = sample_tokens()
    with torch.no_grad():
        expected = model(tokens, output_router_logits=True).aux_loss
        _, mixed = forward(config, from_llama_family(model), tokens)
    assert float(mixed[1].balance_loss) == pytest.approx(float(expected) / 2, rel=1e-6)


def test_gelu_tanh_is_the_approximation() -> None:
    weights = from_xglm(build(transformers.XGLMForCausalLM, xglm_config()))
    model = build(transformers.XGLMForCausalLM, xglm_config())
    for layer in model.model.layers:
        layer.activation_fn = torch.nn.GELU(approximate="tanh")
    tokens = sample_tokens()
    with torch.no_grad():
        expected = model(tokens).logits
        logits, _ = forward(make_config(model={"activation": "gelu_tanh"}), weights, tokens)
        erf, _ = forward(make_config(), weights, tokens)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - erf).abs().max() > 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_equal_a_hugging_face_training_loop(optimizer: str) -> None:
    """Three steps with clipping and warm-up on two data ranks of two micro-batches each."""
    model = build(transformers.Qwen3MoeForCausalLM, qwen3_moe())
    settings = {"name": optimizer, "lr": 1e-2, "schedule": "constant", "warmup_steps": 2, "clip_grad": 0.5}
    config = make_config(
        model={**MODERN, "num_query_groups": 2, "head_dim": 16, "qk_norm": "head"},
        moe=mixture_settings(layer_pattern=2, expert_ffn_hidden_size=24, balance_loss_coeff=0.0),
        optimizer={**settings, "weight_decay": 0.1, "eps": 1e-4},  # Adam's usual eps would blow rounding errors up
    )
    run = ReferenceRun(config, from_llama_family(model))
    if optimizer == "sgd":
        theirs = torch.optim.SGD(model.parameters(), weight_decay=0.1)
    else:
        theirs = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), eps=1e-4, weight_decay=0.1)
    for step in range(3):
        samples = sample_tokens(8, extra=1, seed=step)
        ours = run.step(global_batch(samples, micro_batch_size=2, data_parallel_size=2))
        logits = model(samples[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())
        theirs.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        theirs.param_groups[0]["lr"] = [0.5e-2, 1e-2, 1e-2][step]
        theirs.step()
        assert ours.lm_loss == pytest.approx(loss.item(), rel=1e-6)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-5) and norm > 0.5
    for name, expected in from_llama_family(model).items():
        torch.testing.assert_close(run.weights[name], expected, atol=2e-6, rtol=1e-5, msg=name)


def mixture_weights(generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {
        "router.weight": (EXPERTS, HIDDEN),
        "experts.fc1.weight": (EXPERTS, FFN, HIDDEN),
        "experts.fc1.bias": (EXPERTS, FFN),
        "experts.fc2.weight": (EXPERTS, HIDDEN, FFN),
        "experts.fc2.bias": (EXPERTS, HIDDEN),
    }
    return {f"layers.1.{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@pytest.mark.parametrize("num_slices", [1, 2])
def test_capacity_drops_as_the_literal_gate_does_in_each_slice(num_slices: int) -> None:
    generator = torch.Generator().manual_seed(11)
    weights, x = mixture_weights(generator), torch.randn(24, HIDDEN, generator=generator)
    config = make_config(moe={"num_experts": EXPERTS})
    x = x + 0.5 * weights["layers.1.router.weight"][0]  # crowd expert 0
    one_expert = partial(feed_forward, activation="gelu")
    mixed = mixture(x, weights, "layers.1", config.moe, one_expert, num_slices=num_slices)

    logits = x @ weights["layers.1.router.weight"].T
    expected, drops = torch.zeros(24, HIDDEN), 0
    size = 24 // num_slices
    for start in range(0, 24, size):
        gate = paper_gate(logits[start : start + size].tolist(), paper_capacity(size, EXPERTS))
        for i, (choices, gates, kept) in enumerate(zip(gate.choices, gate.gates, gate.kept, strict=True)):
            drops += kept.count(False)
            for e, g in zip(choices, gates, strict=True):
                w = {name.removeprefix("layers.1.experts."): t[e] for name, t in weights.items()}
                hidden = F.gelu(w["fc1.weight"] @ x[start + i] + w["fc1.bias"])
                expected[start + i] += g * (w["fc2.weight"] @ hidden + w["fc2.bias"])
    assert mixed.num_dropped == drops > 0
    torch.testing.assert_close(mixed.output, expected, atol=1e-5, rtol=1e-5)
    whole = paper_gate(logits.tolist(), paper_capacity(24, EXPERTS))  # balance: over all slices together
    assert float(mixed.balance_loss) == pytest.approx(whole.balance_loss, rel=1e-6)


def test_slices_of_the_sequence_are_routed_apart() -> None:
    generator = torch.Generator().manual_seed(11)
    weights, x = mixture_weights(generator), torch.randn(24, HIDDEN, generator=generator)
    config = make_config(moe={"num_experts": EXPERTS})
    one_expert = partial(feed_forward, activation="gelu")
    outputs = [mixture(x, weights, "layers.1", config.moe, one_expert, num_slices=n).output for n in (1, 2)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


def small_run(**sections: dict) -> ReferenceRun:
    """The paper's model with one MoE layer, random weights."""
    generator = torch.Generator().manual_seed(5)
    weights = from_xglm(build(transformers.XGLMForCausalLM, xglm_config()))
    weights = {name: w for name, w in weights.items() if not name.startswith("layers.1.ffn.")}
    config = make_config(**{"moe": {"num_experts": EXPERTS}, **sections})
    return ReferenceRun(config, {**weights, **mixture_weights(generator)})


def test_expert_gradients_are_scaled_before_the_norm() -> None:
    base = {"name": "sgd", "lr": 0.1, "schedule": "constant", "weight_decay": 0.0}
    batch = global_batch(sample_tokens(4, extra=1), 2, 2)
    scaled_settings = {**base, "expert_grad_scaling": "sqrt_world_size", "expert_grad_world_size": 9}
    plain, scaled = small_run(optimizer=base), small_run(optimizer=scaled_settings)
    before = {name: w.detach().clone() for name, w in plain.weights.items()}
    norm, scaled_norm = plain.step(batch).grad_norm, scaled.step(batch).grad_norm
    squares = {True: 0.0, False: 0.0}
    for name, start in before.items():
        moved, moved_scaled = plain.weights[name] - start, scaled.weights[name] - start
        factor = 3.0 if ".experts." in name else 1.0
        torch.testing.assert_close(moved_scaled, factor * moved, atol=1e-6, rtol=1e-4)
        squares[".experts." in name] += (moved / 0.1).double().square().sum().item()
    assert norm == pytest.approx(math.sqrt(squares[True] + squares[False]), rel=1e-3)
    assert scaled_norm == pytest.approx(math.sqrt(9 * squares[True] + squares[False]), rel=1e-3)


def test_weight_decay_groups_and_expert_rate() -> None:
    """With no gradient to speak of, SGD moves a weight by lr * decay alone: fast for experts, not at all for norms."""
    settings = {"name": "sgd", "lr": 1e6, "schedule": "constant", "weight_decay": 1e-7, "clip_grad": 1e-12}
    changes = {"decay_norms_and_biases": False, "expert_lr_scale": "inverse_sqrt_experts"}
    run = small_run(optimizer={**settings, **changes})
    before = {name: w.detach().clone() for name, w in run.weights.items()}
    run.step(global_batch(sample_tokens(4, extra=1), 2, 2))
    for name, start in before.items():
        kept = 1.0 if name.endswith("bias") or "norm" in name else 0.95 if ".experts." in name else 0.9
        torch.testing.assert_close(run.weights[name], kept * start, atol=1e-5, rtol=1e-4, msg=name)


def test_totals_add_up_and_drops_are_counted() -> None:
    result = small_run().step(global_batch(sample_tokens(4, extra=1), 2, 1))
    assert result.loss == pytest.approx(result.lm_loss + 0.01 * result.balance_loss, rel=1e-9)
    assert result.balance_loss > 0.9 and result.num_dropped > 0


def test_bf16_stays_near_fp32() -> None:
    batch = global_batch(sample_tokens(4, extra=1), 2, 1)
    full = small_run(moe={"num_experts": EXPERTS, "dropless": True})
    half = ReferenceRun(full.config, full.weights, dtype=torch.bfloat16)
    expected, result = full.step(batch), half.step(batch)
    assert result.lm_loss == pytest.approx(expected.lm_loss, rel=2e-2) and result.lm_loss != expected.lm_loss
    assert half.weights["embedding.weight"].dtype == torch.float32


def test_global_batch_deals_samples_round_robin() -> None:
    samples = torch.arange(8)[:, None].repeat(1, 5) * 10 + torch.arange(5)
    dealt = global_batch(samples, micro_batch_size=2, data_parallel_size=2)
    assert [[tokens[:, 0].tolist() for tokens, _ in rank] for rank in dealt] == [
        [[0, 10], [40, 50]],
        [[20, 30], [60, 70]],
    ]
    tokens, labels = dealt[1][0]
    assert tokens.tolist() == [[20, 21, 22, 23], [30, 31, 32, 33]] and labels[0].tolist() == [21, 22, 23, 24]


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({"schedule": "constant", "warmup_steps": 4}, {1: 0.25, 2: 0.5, 4: 1.0, 5: 1.0, 100: 1.0}),
        ({"schedule": "linear", "warmup_steps": 10, "decay_steps": 50}, {5: 0.5, 10: 1.0, 30: 0.5, 50: 0.0, 60: 0.0}),
        ({"schedule": "linear", "min_lr": 0.2}, {1: 0.992, 50: 0.6, 100: 0.2}),
        ({"schedule": "cosine", "min_lr": 0.1, "warmup_steps": 20}, {10: 0.5, 20: 1.0, 60: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "wsd_decay_steps": 20}, {1: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        ({"schedule": "wsd"}, {90: 1.0, 95: 0.5}),
    ],
)
def test_schedule_points(settings: dict, points: dict[int, float]) -> None:
    config = make_config(optimizer={"lr": 1.0, **settings}, run={"num_steps": 100})
    assert {step: learning_rate(config, step) for step in points} == pytest.approx(points)
