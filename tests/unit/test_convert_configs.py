"""config.json and megamoe's configuration: what is refused by name, what is noted, which class is chosen."""

import json
from typing import Any

import pytest
import torch
import transformers

from megamoe.config.presets import PRESETS
from megamoe.config.schema import Config
from megamoe.convert.hf_families import custom
from megamoe.convert.hf_families.computed import differences
from megamoe.convert.hf_tables import FAMILIES, NATIVE, choose_architecture, conversion, from_hf_config, to_hf_config
from megamoe.convert.links import WEIGHT
from megamoe.errors import ConversionError
from tests.unit.convert_cases import CASES, Case, changed, random_ours, to_ours, to_theirs, tokens

SMALL = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 96,
    "vocab_size_multiple": 32, "seq_length": 16,
}  # fmt: skip
MODERN = {
    **SMALL, "normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "use_bias": False,
    "tie_embeddings": False, "scale_embeddings": False,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "top_k": 2, "layer_pattern": 1, "dropless": True, "balance_loss": "all_choices"}


def make(model: dict[str, Any], moe: dict[str, Any] | None = None) -> Config:
    return Config.model_validate({"model": model, "moe": moe or {}})


def theirs(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a case as transformers has it, with changes."""
    case = CASES[name]
    keys = case.config_class(**case.settings).to_dict()
    return {**keys, "architectures": [f"{case.kind}ForCausalLM"], **changes}


@pytest.mark.parametrize("family", NATIVE, ids=lambda family: family.architecture)
def test_defaults_are_those_of_the_class(family) -> None:
    """A key that config.json leaves out means what the class's own default says."""
    config_class = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))
    config, written = config_class(), config_class().to_dict()
    for key, value in family.defaults.items():
        if key in ("rope_parameters", "rope_scaling"):
            assert value is None
        elif key == "rope_theta":
            assert config.rope_parameters == {"rope_theta": value, "rope_type": "default"}
        elif key in written and key not in ("sliding_window", "layer_types", "mlp_only_layers"):
            mine = {None: config.num_attention_heads} if key == "num_key_value_heads" else {}
            mine |= {-1: config.num_hidden_layers - 1} if key == "moe_layer_end_index" else {}
            mine |= {None: 128} if key == "head_dim" and family.architecture == "LlamaForCausalLM" else {}
            assert written[key] == mine.get(value, value), key
    bare = {"architectures": [family.architecture], "model_type": family.model_type}
    assert differences(from_hf_config(bare), from_hf_config({**written, **bare})) == []


# -- what megamoe cannot express ---------------------------------------------------------------------------------------

THEIRS_REFUSED = [
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}}, "factor in rope_param"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"attention_bias": True}, "attention_bias true .*set attention_bias and mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"quantization_config": {"bits": 4}}, "unknown quantization_config"),
    ("llama", {"sliding_window": 8}, "sliding_window 8"),
    ("llama", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is not converted"),
    ("llama", {"model_type": "mistral"}, "model_type 'mistral'"),
    ("llama", {"num_key_value_heads": 3}, "num_query_groups 3 does not divide"),
    ("llama", {"hidden_size": "wide"}, "hidden_size"),
    ("llama", {"vocab_size": 0}, "vocab_size 0"),
    ("qwen3", {"attention_bias": True}, "attention_bias true"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window 8"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types sliding_attention"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window 4096"),
    ("mixtral", {"num_experts_per_tok": 1}, "top_k 1 with normalize_gates"),
    ("mixtral", {"num_local_experts": 4, "num_experts": 8}, "num_local_experts 4 and num_experts 8"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("olmoe", {"attention_bias": True}, "attention_bias true"),
    ("olmoe", {"head_dim": 16}, "head_dim 16"),
    ("qwen3 moe", {"mlp_only_layers": [1, 3]}, "experts in none of its layers"),
    ("qwen3 moe", {"attention_bias": True}, "attention_bias true"),
    ("ernie", {"use_bias": True}, "use_bias true"),
    ("ernie", {"moe_norm_min": 0.9}, "moe_norm_min 0.9"),
    ("ernie", {"moe_layer_interval": 5}, "experts in none"),
    ("xglm", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("xglm", {"add_cross_attention": True}, "add_cross_attention True"),
    ("xglm", {"pad_token_id": 5}, "pad_token_id 5"),
]


@pytest.mark.parametrize(("name", "changes", "message"), THEIRS_REFUSED, ids=lambda value: str(value)[:40])
def test_what_megamoe_cannot_express_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    from_hf_config(theirs(name))
    with pytest.raises(ConversionError, match=message):
        from_hf_config(theirs(name, **changes))


def test_a_padding_token_takes_a_position_from_xglm() -> None:
    """Why pad_token_id above 1 is refused: that row of the table of positions is zero."""
    case = CASES["xglm"]
    with torch.no_grad():
        plain, one, five = (
            Case("XGLM", {**case.settings, "pad_token_id": pad}).build()(tokens()).logits for pad in (None, 1, 5)
        )
    torch.testing.assert_close(plain, one, atol=0, rtol=0)
    assert (plain - five).abs().max() > 0.1
    assert to_hf_config(from_hf_config(theirs("xglm")), dtype="F32")["pad_token_id"] is None


def test_an_unknown_key_may_be_declared_harmless() -> None:
    keys = theirs("llama", newlinemode="s")
    with pytest.raises(ConversionError, match="unknown newlinemode"):
        from_hf_config(keys)
    assert from_hf_config(keys, ignored=["newlinemode"]) == from_hf_config(theirs("llama"))


def test_older_spellings_mean_the_same() -> None:
    """As files on the hub have them: rope_theta at the top, num_experts and not num_local_experts."""
    new = theirs("qwen3 moe")
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "num_local_experts")}
    old |= {"rope_theta": new["rope_parameters"]["rope_theta"], "rope_scaling": None, "num_experts": 4}
    assert from_hf_config(old) == from_hf_config(new)
    assert from_hf_config({**old, "rope_theta": 77.0}).model.rope_base == 77.0
    assert from_hf_config({k: v for k, v in old.items() if k != "rope_theta"}).model.rope_base == 10_000.0


# -- what a class cannot express ---------------------------------------------------------------------------------------

OURS_REFUSED = [
    ("MixtralForCausalLM", {"qk_norm": "head"}, {}, "model.qk_norm head: it has no norms"),
    ("MixtralForCausalLM", {"scale_embeddings": True}, {}, "model.scale_embeddings true"),
    ("MixtralForCausalLM", {"use_bias": True}, {}, "model.use_bias true"),
    ("MixtralForCausalLM", {"activation": "gelu"}, {}, "model.activation gelu"),
    ("MixtralForCausalLM", {"normalization": "layernorm"}, {}, "model.normalization layernorm"),
    ("MixtralForCausalLM", {"position_embedding": "sinusoidal"}, {}, "model.position_embedding sinusoidal"),
    ("MixtralForCausalLM", {}, {"layer_pattern": 2}, "moe.layer_pattern 2: all its layers"),
    ("MixtralForCausalLM", {}, {"normalize_gates": False}, "moe.normalize_gates false"),
    ("MixtralForCausalLM", {}, {"routed_scaling_factor": 2.5}, "moe.routed_scaling_factor 2.5"),
    ("MixtralForCausalLM", {}, {"score_function": "sigmoid"}, "moe.score_function sigmoid"),
    ("MixtralForCausalLM", {}, {"num_expert_groups": 2, "num_selected_groups": 1}, "moe.num_expert_groups 2"),
    ("MixtralForCausalLM", {}, {"num_experts_by_layer": [2, 2, 4, 4]}, "moe.num_experts_by_layer"),
    ("MixtralForCausalLM", {}, {"shared_expert_ffn_hidden_size": 48}, "it has no shared expert"),
    ("MixtralForCausalLM", {}, {"num_experts": 0}, "moe.num_experts 0: it has experts"),
    ("OlmoeForCausalLM", {"qk_norm": "full", "head_dim": 16}, {}, "model.head_dim 16"),
    ("Qwen3MoeForCausalLM", {}, {}, "model.qk_norm none: it has one over each head"),
    ("Ernie4_5_MoeForCausalLM", {}, {"layer_pattern": [0, 1, 3]}, r"moe.layer_pattern \[0, 1, 3\]"),
    ("Ernie4_5_MoeForCausalLM", {}, {"layer_pattern": [0, 2]}, r"moe.layer_pattern \[0, 2\]"),
    ("Ernie4_5_MoeForCausalLM", {}, {"shared_expert_ffn_hidden_size": 50}, "shared_expert_ffn_hidden_size 50"),
    ("Ernie4_5_MoeForCausalLM", {},
     {"shared_expert_ffn_hidden_size": 48, "shared_expert_mix": "residual"}, "moe.shared_expert_mix residual"),
    ("LlamaForCausalLM", {}, {}, "moe.num_experts 4: it has no experts"),
    ("Qwen3ForCausalLM", {"use_bias": True}, {"num_experts": 0}, "model.use_bias true"),
    ("XGLMForCausalLM", SMALL | {"norm_epsilon": 1e-6}, {"num_experts": 0}, "model.norm_epsilon 1e-06"),
    ("XGLMForCausalLM", SMALL | {"num_query_groups": 2}, {"num_experts": 0}, "model.num_query_groups 2"),
    ("XGLMForCausalLM", SMALL | {"head_dim": 16}, {"num_experts": 0}, "model.head_dim 16"),
    ("XGLMForCausalLM", {}, {"num_experts": 0}, "model.position_embedding rope.*model.use_bias false"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "model", "moe", "message"), OURS_REFUSED, ids=lambda value: str(value)[:40])
def test_what_a_class_cannot_express_is_refused_by_name(
    architecture: str, model: dict[str, Any], moe: dict[str, Any], message: str
) -> None:
    base = MODERN if not model or "num_layers" not in model else {"normalization": "layernorm"}
    config = make({**base, **model}, {**MIXTURE, **moe})
    with pytest.raises(ConversionError, match=f"{architecture} cannot express .*{message}"):
        to_hf_config(config, dtype="F32", architecture=architecture)


def test_drops_are_refused_until_they_are_turned_off() -> None:
    """Also by the custom class, and what was given up is said."""
    for model, wanted in ((MODERN, "MixtralForCausalLM"), (SMALL, "MegamoeForCausalLM")):
        config = make(model, {**MIXTURE, "dropless": False})
        with pytest.raises(ConversionError, match="dropless is false"):
            to_hf_config(config, dtype="F32")
        keys = to_hf_config(config, dtype="F32", drops_off=True)
        assert keys["architectures"] == [wanted] and from_hf_config(keys).moe.dropless
        with pytest.raises(ConversionError, match="dropless is false"):
            conversion(config, keys)
        table = conversion(config, keys, drops_off=True)
        assert any(note.startswith("moe.dropless false") for note in table.notes)
        dropless = make(model, MIXTURE)
        assert not any("dropless" in note for note in conversion(dropless, keys).notes)


TRAINED = [
    ({"hidden_dropout": 0.1}, {}, "model.hidden_dropout 0.1"),
    ({}, {"balance_loss": "first_choice"}, "router_aux_loss_coef is 0"),
    ({}, {"z_loss_coeff": 0.001}, "moe.z_loss_coeff 0.001"),
    ({}, {"input_jitter": 0.1}, "router_jitter_noise jitters what enters the experts, too"),
    ({}, {"gate_order": "select_then_softmax"}, "moe.gate_order select_then_softmax"),
]


@pytest.mark.parametrize(("model", "moe", "message"), TRAINED, ids=lambda value: str(value)[:30])
def test_settings_of_training_without_a_key_are_noted(model: dict, moe: dict, message: str) -> None:
    plain, config = make(MODERN, MIXTURE), make({**MODERN, **model}, {**MIXTURE, **moe})
    assert conversion(plain, to_hf_config(plain, dtype="F32")).notes == ()
    notes = conversion(config, to_hf_config(config, dtype="F32")).notes
    assert len(notes) == 1 and message in notes[0]


def test_the_balance_loss_keeps_its_weight() -> None:
    """Theirs is a mean over layers of whole choices, ours a sum over layers of shares of top_k."""
    config = from_hf_config(theirs("mixtral, three of six", router_aux_loss_coef=0.02))
    assert config.moe.balance_loss == "all_choices" and config.moe.balance_loss_coeff == 0.02 * 3 / 4
    assert to_hf_config(config, dtype="F32")["router_aux_loss_coef"] == 0.02
    assert from_hf_config(theirs("mixtral", router_jitter_noise=0.1)).moe.input_jitter == 0.1


# -- the class that is chosen ------------------------------------------------------------------------------------------

CHOSEN = {
    "dense-125m": "XGLMForCausalLM",
    "moe-15b": "MegamoeForCausalLM",
    "mixtral-8x7b": "MixtralForCausalLM",
    "olmoe-1b-7b": "OlmoeForCausalLM",
    "qwen3-30b-a3b": "Qwen3MoeForCausalLM",
    "laptop-moe-modern": "MixtralForCausalLM",
    "quickstart": "MegamoeForCausalLM",
}


@pytest.mark.parametrize("preset", CHOSEN)
def test_presets_have_their_class(preset: str) -> None:
    config = Config.model_validate(PRESETS[preset].tree)
    name, refused = choose_architecture(config)
    assert name == CHOSEN[preset]
    assert name not in refused and all(refused.values())
    if name == "MegamoeForCausalLM":
        assert set(refused) == {family.architecture for family in NATIVE}
        assert any("num_experts 512" in r or "num_experts 8" in r for r in refused["XGLMForCausalLM"])
    keys = to_hf_config(config, dtype="BF16", drops_off=True)
    assert json.loads(json.dumps(keys)) == keys and keys["dtype"] == "bfloat16"
    assert differences(config, from_hf_config(keys)) == []


def test_modern_models_with_alternate_layers_are_ernies() -> None:
    config = make(MODERN, {**MIXTURE, "layer_pattern": 2, "expert_ffn_hidden_size": 24})
    assert choose_architecture(config)[0] == "Ernie4_5_MoeForCausalLM"
    assert choose_architecture(changed(config, model={"qk_norm": "head"}))[0] == "Qwen3MoeForCausalLM"
    assert choose_architecture(changed(config, moe={"num_experts": 0}))[0] == "LlamaForCausalLM"
    assert choose_architecture(changed(config, model={"qk_norm": "full"}))[0] == "MegamoeForCausalLM"


# -- the custom class --------------------------------------------------------------------------------------------------

WHOLE = {
    "num_experts": 4, "num_experts_by_layer": [2, 4], "layer_pattern": 2, "dropless": True,
    "score_function": "sigmoid", "balance_bias_update_rate": 0.001, "num_expert_groups": 2, "num_selected_groups": 1,
    "top_k": 1, "normalize_gates": False, "expert_ffn_hidden_size": 24, "shared_expert_ffn_hidden_size": 40,
    "shared_expert_mix": "residual", "routed_scaling_factor": 2.5,
}  # fmt: skip


def names_of(model: dict[str, Any], moe: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    config = make(model, moe)
    keys = to_hf_config(config, dtype="F32", architecture="MegamoeForCausalLM")
    table = conversion(config, keys)
    ours = random_ours(table)
    for key, values in to_ours(table, to_theirs(table, ours)).items():
        assert values.tobytes() == ours[key].tobytes(), key
    assert from_hf_config(keys) == changed(config, model={"vocab_size_multiple": 32})
    return dict(table.theirs)


def test_the_names_of_the_papers_experts() -> None:
    found = names_of({**SMALL}, WHOLE)
    layer = {f"self_attn.{part}_proj.{kind}" for part in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    layer |= {f"{part}.{kind}" for part in ("self_attn_layer_norm", "final_layer_norm") for kind in ("weight", "bias")}
    linear = {f"{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")}
    mixture = {"mlp.gate.weight", "mlp.gate.balance_bias", "mlp.shared_expert_mix.weight", "mlp.shared_expert_mix.bias"}
    mixture |= {f"mlp.shared_expert.{part}" for part in linear}
    wanted = {"model.embed_tokens.weight", "model.layer_norm.weight", "model.layer_norm.bias"}
    for number, num_experts in enumerate((0, 2, 0, 4)):
        parts = layer | (mixture if num_experts else {f"mlp.{part}" for part in linear})
        parts |= {f"mlp.experts.{e}.{part}" for e in range(num_experts) for part in linear}
        wanted |= {f"model.layers.{number}.{part}" for part in parts}
    assert found.keys() == wanted
    assert found["model.layers.3.mlp.experts.3.fc1.weight"] == (24, 32)
    assert found["model.layers.3.mlp.gate.balance_bias"] == (4,) and found["model.layers.1.mlp.gate.weight"] == (2, 32)


def test_the_names_of_gated_experts() -> None:
    gate = {**WHOLE, "shared_expert_mix": "sigmoid_gate", "num_experts_by_layer": None}
    found = names_of({**MODERN, "qk_norm": "head", "num_query_groups": 2}, gate)
    layer = "model.layers.1."
    wanted = {f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "out_proj", "q_norm", "k_norm")}
    wanted |= {"self_attn_layer_norm.weight", "final_layer_norm.weight", "mlp.gate.weight", "mlp.gate.balance_bias"}
    wanted |= {"mlp.shared_expert_mix.weight"}
    for prefix in ("shared_expert", *(f"experts.{e}" for e in range(4))):
        wanted |= {f"mlp.{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert {name.removeprefix(layer) for name in found if name.startswith(layer)} == wanted
    assert "lm_head.weight" in found and found["model.layers.0.mlp.up_proj.weight"] == (48, 32)
    assert found[f"{layer}mlp.shared_expert_mix.weight"] == (1, 32)


def test_the_keys_of_the_custom_class() -> None:
    """Flat, megamoe's own names, sizes resolved, layers listed; transformers' names repeat them and must agree."""
    config = make(SMALL | {"ffn_hidden_size": None}, {"num_experts": 4, "dropless": True})
    keys = to_hf_config(config, dtype="F32")
    moe_keys = {*custom.MOE_KEYS, "num_experts_per_tok"} - {"top_k"}  # which transformers takes for one of sampling
    assert set(keys) >= {*custom.MODEL_KEYS, *moe_keys, *custom.USUAL_KEYS, "vocab_size", "auto_map"}
    assert "top_k" not in keys
    assert (keys["ffn_hidden_size"], keys["num_query_groups"], keys["head_dim"]) == (128, 4, 8)
    assert keys["layer_pattern"] == [1, 3] and keys["num_hidden_layers"] == 4 and keys["model_type"] == "megamoe"
    assert from_hf_config(keys) == changed(config, moe={"dropless": True})
    with pytest.raises(ConversionError, match="num_layers 4 and num_hidden_layers 5"):
        from_hf_config({**keys, "num_hidden_layers": 5})
    with pytest.raises(ConversionError, match="lacks rope_base"):
        from_hf_config({key: value for key, value in keys.items() if key != "rope_base"})
    kinds = {name.partition("For")[0] for name in FAMILIES}
    assert kinds == {family.architecture.partition("For")[0] for family in (*NATIVE, custom.FAMILY)}
    classifiers = {name for name, family in FAMILIES.items() if family.is_classifier}
    assert classifiers == {f"{kind}ForSequenceClassification" for kind in kinds - {"XGLM", "Olmoe", "Ernie4_5_Moe"}}


def test_a_shared_expert_of_ernie_is_one_of_ours() -> None:
    keys = theirs("ernie, shared")
    config = from_hf_config(keys)
    assert config.moe.shared_expert_ffn_hidden_size == 2 * 24 and config.moe.expert_ffn_hidden_size == 24
    assert conversion(config, keys).ours[WEIGHT, "layers.1.shared_expert.fc1.weight"] == (2, 48, 32)
