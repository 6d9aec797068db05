"""The tables for Hugging Face classes, held against transformers' own models, folders and configurations."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from megamoe.config.schema import Config
from megamoe.convert.hf_families.computed import differences
from megamoe.convert.hf_tables import choose_architecture, conversion, from_hf_config, to_hf_config
from megamoe.convert.links import WEIGHT, Conversion, Duplicate, check_names
from megamoe.errors import ConversionError
from tests.parity.reference import forward
from tests.unit.convert_cases import CASES, as_weights, changed, random_ours, to_ours, to_theirs, tokens

TOLERANCE = 1e-5
# Written by whoever writes the file, or of the tokenizer: not of the model.
NOT_OF_THE_MODEL = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_name_or_path"}


class Saved:
    """One case's model as save_pretrained wrote it: config.json, tensors, and the logits of the model itself."""

    def __init__(self, name: str, folder: Path, **options: Any) -> None:
        model = CASES[name].build()
        model.save_pretrained(folder, **options)
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")
        with torch.no_grad():
            self.logits = model(tokens()).logits
        self.ours = from_hf_config(self.config)
        self.table = conversion(self.ours, self.config, stored=self.tensors.keys())

    def our_logits(self, config: Config | None = None, table: Conversion | None = None) -> torch.Tensor:
        with torch.no_grad():
            return forward(config or self.ours, as_weights(to_ours(table or self.table, self.tensors)), tokens())[0]

    def error(self, **changes: Any) -> float:
        """Largest difference of the plain reference's logits from the model's."""
        return (self.our_logits(**changes) - self.logits).abs().max().item()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda name: Saved(name, tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("name", CASES)
def test_the_table_names_what_save_pretrained_writes(name: str, saved) -> None:
    """Names and shapes, without a look at the folder; the table proves itself on both sides."""
    model = saved(name)
    table = conversion(model.ours, model.config)
    assert {key: values.shape for key, values in model.tensors.items()} == table.theirs
    assert table.notes == () and not table.paddings
    table.prove()


@pytest.mark.parametrize("name", CASES)
def test_tensors_come_back_bitwise_and_the_plain_reference_gives_the_logits(name: str, saved) -> None:
    model = saved(name)
    back = to_theirs(model.table, to_ours(model.table, model.tensors))
    assert back.keys() == model.tensors.keys()
    for key, values in model.tensors.items():
        assert values.tobytes() == back[key].tobytes(), key
    assert model.logits.std() > 0.1
    assert model.error() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_comes_back(name: str, saved) -> None:
    """Read by transformers itself, so that defaults and other spellings count as what they mean."""
    model, case = saved(name), CASES[name]
    written = to_hf_config(model.ours, dtype="F32")
    assert written["architectures"] == [f"{case.kind}ForCausalLM"]
    theirs, again = (case.config_class.from_dict(dict(keys)).to_dict() for keys in (model.config, written))
    # the ranges of layers that Ernie's three keys name may be the same in different words
    free = NOT_OF_THE_MODEL | ({"moe_layer_start_index"} if name == "ernie" else set())
    assert {k: v for k, v in theirs.items() if k not in free} == {k: v for k, v in again.items() if k not in free}
    assert from_hf_config(written) == model.ours


@pytest.mark.parametrize("name", CASES)
def test_every_model_also_fits_the_custom_class(name: str, saved) -> None:
    """Tensors there and back, bitwise; the configuration means the same after it."""
    config = saved(name).ours
    keys = to_hf_config(config, dtype="bfloat16", architecture="MegamoeForCausalLM")
    assert differences(config, from_hf_config(json.loads(json.dumps(keys)))) == []
    table = conversion(config, keys)
    ours = random_ours(table)
    for key, values in to_ours(table, to_theirs(table, ours)).items():
        assert values.tobytes() == ours[key].tobytes(), key


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "ernie, shared"])
def test_stacked_experts_are_read_too(name: str, tmp_path: Path, saved) -> None:
    """What save_pretrained(save_original_format=False) writes; the links then give the same tensors of ours."""
    stacked, listed = Saved(name, tmp_path, save_original_format=False), saved(name)
    assert {key: values.shape for key, values in stacked.tensors.items()} == stacked.table.theirs
    assert stacked.table.theirs != listed.table.theirs
    wanted = to_ours(listed.table, listed.tensors)
    for key, values in to_ours(stacked.table, stacked.tensors).items():
        assert values.tobytes() == wanted[key].tobytes(), key


def test_tied_weights_that_are_stored_twice_are_one(saved) -> None:
    model = saved("llama, tied")
    names = [*model.tensors, "lm_head.weight"]
    table = conversion(model.ours, model.config, stored=names)
    assert table.duplicates == (Duplicate("lm_head.weight", "model.embed_tokens.weight"),)
    assert set(table.theirs) == set(names)
    twice = to_theirs(table, to_ours(table, model.tensors))
    assert twice["lm_head.weight"].tobytes() == model.tensors["model.embed_tokens.weight"].tobytes()


def test_padded_vocabulary_both_ways(saved) -> None:
    """Read into a multiple: rows of zeros, with a note. Written: all rows are theirs, for the same softmax."""
    model = saved("mixtral")
    padded = from_hf_config(model.config, vocab_multiple=64)
    table = conversion(padded, model.config)
    assert {(p.ours, p.our_box) for p in table.paddings} == {
        ((WEIGHT, name), ((96, 128), (0, 32))) for name in ("embedding.weight", "output.weight")
    }
    assert "counted in its softmax" in table.notes[0]
    ours = to_ours(table, model.tensors)
    assert ours[WEIGHT, "embedding.weight"].shape == (128, 32) and not ours[WEIGHT, "output.weight"][96:].any()
    written = to_hf_config(padded, dtype="F16")
    assert written["vocab_size"] == 128 and written["dtype"] == "float16"
    whole = conversion(padded, written)
    assert whole.theirs["lm_head.weight"] == (128, 32) and not whole.paddings and "96 to 127" in whole.notes[0]
    with pytest.raises(ConversionError, match="vocab_size of the other format is 160"):
        conversion(padded, {**written, "vocab_size": 160})


# -- from our side ----------------------------------------------------------------------------------------------------

PAPER = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 90,
    "vocab_size_multiple": 32,
}
MODERN = {
    **PAPER, "normalization": "rmsnorm", "norm_epsilon": 3e-6, "activation": "swiglu", "position_embedding": "rope",
    "rope_base": 777.0, "use_bias": False, "tie_embeddings": False, "scale_embeddings": False, "num_query_groups": 2,
}  # fmt: skip
EXPORTS = {
    "Llama": (MODERN | {"use_bias": True, "head_dim": 12}, {}),
    "Qwen3": (MODERN | {"qk_norm": "head", "tie_embeddings": True}, {}),
    "Mixtral": (MODERN, {"layer_pattern": 1, "top_k": 3, "gate_order": "select_then_softmax", "dropless": False}),
    "Olmoe": (MODERN | {"qk_norm": "full"}, {"layer_pattern": 1, "normalize_gates": False}),
    "Qwen3Moe": (MODERN | {"qk_norm": "head"}, {"layer_pattern": [0, 3], "expert_ffn_hidden_size": 20}),
    "Ernie4_5_Moe": (MODERN, {"expert_ffn_hidden_size": 20, "shared_expert_ffn_hidden_size": 60, "layer_pattern": [2]}),
    "XGLM": (PAPER | {"activation": "gelu_tanh"}, {}),
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_what_is_written_loads_into_the_class_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Every tensor is used, none is made up; the drops that are turned off are off on our side, too."""
    model, moe = EXPORTS[kind]
    config = Config.model_validate({"model": model, "moe": {"num_experts": 4, "dropless": True, **moe} if moe else {}})
    assert choose_architecture(config)[0] == f"{kind}ForCausalLM"
    keys = to_hf_config(config, dtype="float32", drops_off=True)
    table = conversion(config, keys, drops_off=True)
    ours = {key: 0.3 * values for key, values in random_ours(table).items()}
    save_file(to_theirs(table, ours), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(keys))
    theirs, info = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected = theirs.eval()(tokens()).logits
        logits, _ = forward(changed(config, moe={"dropless": True}), as_weights(ours), tokens())
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


# -- deliberate faults ------------------------------------------------------------------------------------------------


def moved(table: Conversion, old: str, new: str) -> Conversion:
    """The links that end in a tensor of ours or theirs named `old` go to `new` and the other way round."""
    swap = {old: new, new: old}
    return replace(table, links=tuple(replace(k, theirs=swap.get(k.theirs, k.theirs)) for k in table.links))


EXPERT = "model.layers.1.block_sparse_moe.experts."
SWAPS = {
    "swapped gate and linear half": (f"{EXPERT}0.w1.weight", f"{EXPERT}0.w3.weight"),
    "permuted experts": (f"{EXPERT}0.w2.weight", f"{EXPERT}1.w2.weight"),
    "swapped norms": ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
    "another layer": ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
    "keys for values": ("model.layers.2.self_attn.k_proj.weight", "model.layers.2.self_attn.v_proj.weight"),
}


@pytest.mark.parametrize("fault", SWAPS)
def test_a_fault_that_covers_everything_is_seen_in_the_logits(fault: str, saved) -> None:
    """Shapes and coverage agree, so only the function can tell."""
    model = saved("mixtral")
    wrong = moved(model.table, *SWAPS[fault])
    wrong.prove()
    assert model.error(table=wrong) > 100 * TOLERANCE


def test_wrong_grouping_of_heads_is_seen_in_the_logits(saved) -> None:
    """Query rows of the two groups exchanged; and Ernie's rows left in their own order."""
    model = saved("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    first, second = (link for link in model.table.links if link.theirs == name)
    others = [link for link in model.table.links if link.theirs != name]
    crossed = (replace(first, their_box=second.their_box), replace(second, their_box=first.their_box))
    wrong = replace(model.table, links=(*others, *crossed))
    wrong.prove()
    assert model.error(table=wrong) > 100 * TOLERANCE
    ernie = saved("ernie")
    straight = tuple(replace(link, view=None, order=None) for link in ernie.table.links)
    assert ernie.error(table=replace(ernie.table, links=straight)) > 100 * TOLERANCE


def test_a_transposed_matrix_is_refused_or_seen(saved) -> None:
    model = saved("llama")
    square = next(k for k in model.table.links if k.theirs == "model.layers.0.self_attn.o_proj.weight")
    others = tuple(link for link in model.table.links if link is not square)
    turned = replace(model.table, links=(*others, replace(square, view=(32, 32), order=(1, 0))))
    assert model.error(table=turned) > 100 * TOLERANCE
    long = next(k for k in model.table.links if k.theirs == "model.layers.0.mlp.down_proj.weight")
    others = tuple(link for link in model.table.links if link is not long)
    with pytest.raises(ConversionError, match=r"model.layers.0.mlp.down_proj.weight"):
        replace(model.table, links=(*others, replace(long, their_box=((0, 48), (0, 32))))).prove()


def test_dropped_doubled_and_unknown_tensors_are_named(saved) -> None:
    model = saved("mixtral")
    name = f"{EXPERT}2.w1.weight"
    one = next(link for link in model.table.links if link.theirs == name)
    with pytest.raises(ConversionError, match=r"layers.1.experts.fc1.weight"):
        replace(model.table, links=tuple(link for link in model.table.links if link is not one)).prove()
    with pytest.raises(ConversionError, match=r"layers.1.experts.fc1.weight|experts.2.w1.weight"):
        replace(model.table, links=(*model.table.links, one)).prove()
    with pytest.raises(ConversionError, match=r"lacks model.layers.1.block_sparse_moe.experts.2.w1.weight"):
        check_names(model.table.theirs, model.tensors.keys() - {name}, "the folder")
    with pytest.raises(ConversionError, match=r"unknown model.layers.9.mlp.gate.weight"):
        check_names(model.table.theirs, [*model.tensors, "model.layers.9.mlp.gate.weight"], "the folder")


def test_a_layer_too_few_is_named(saved) -> None:
    model = saved("llama")
    short = conversion(changed(model.ours, model={"num_layers": 3}), {**model.config, "num_hidden_layers": 3})
    with pytest.raises(ConversionError, match=r"unknown model.layers.3"):
        check_names(short.theirs, model.tensors, "the folder")


# what the two sides disagree on -> what a message says
DISAGREEMENTS = {
    "rope_base": ({"rope_base": 9_999.0}, {}),
    "norm_epsilon": ({"norm_epsilon": 1e-6}, {}),
    "num_query_groups": ({"num_query_groups": 1}, {}),
    "scale_embeddings": ({"scale_embeddings": True}, {}),
    "tie_embeddings": ({"tie_embeddings": True}, {}),
    "top_k": ({}, {"top_k": 3}),
    "normalize_gates": ({}, {"normalize_gates": False}),
    "experts of each MoE layer": ({}, {"layer_pattern": 2}),
    "routed_scaling_factor": ({}, {"routed_scaling_factor": 2.0}),
    "shared_expert_ffn_hidden_size": ({}, {"shared_expert_ffn_hidden_size": 48}),
}


@pytest.mark.parametrize("key", DISAGREEMENTS)
def test_two_configurations_that_differ_are_refused(key: str, saved) -> None:
    model_changes, moe_changes = DISAGREEMENTS[key]
    mixtral = saved("mixtral")
    wrong = changed(mixtral.ours, model=model_changes, moe=moe_changes)
    with pytest.raises(ConversionError, match=f"not of one model: .*{key} is"):
        conversion(wrong, mixtral.config)


def test_a_wrong_rope_base_is_seen_in_the_logits(saved) -> None:
    model = saved("qwen3")
    assert model.error(config=changed(model.ours, model={"rope_base": 10_000.0})) > 100 * TOLERANCE
