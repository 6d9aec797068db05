"""The model card and the generation settings of an export."""

import json

import pytest
from transformers import GenerationConfig

from megamoe.config import load_config
from megamoe.convert.hf_tokenizers import SpecialIds
from megamoe.convert.model_card import generation_config, model_card

OPTIONS = {
    "name": "first", "dtype": "bfloat16", "state": {"step": 200, "samples": 3200, "skipped_steps": 1},
    "checksums": {"model.safetensors": "sha256:ab", "config.json": "sha256:cd"}, "has_tokenizer": True,
}  # fmt: skip


def test_what_a_card_says_of_a_mixture():
    config = load_config(
        "quickstart",
        ["data.train=[{path: /data/private/prose, weight: 3}, {path: code}]", "model.vocab_size=4000"],
    )
    card = model_card(config, architecture="MegamoeForCausalLM", notes=["A note."], **OPTIONS)
    # By hand: an FFN; a layer's attention and norms; the embedding, 2 dense and 2 MoE layers, the last norm.
    ffn, layer = 2 * 128 * 512 + 512 + 128, 4 * 128 * 128 + 4 * 128 + 4 * 128
    total = 4096 * 128 + 4 * layer + 2 * ffn + 2 * (8 * ffn + 8 * 128) + 2 * 128
    active = total - 2 * 6 * ffn
    assert f"with {total:,} parameters, of which a token passes {active:,}." in card
    assert "trust_remote_code=True" in card and card.startswith("---\nlibrary_name: transformers\n")
    assert "| layers with experts (from 0) | 1, 3 |" in card and "| experts a token passes | 2, by softmax |" in card
    assert "| `prose` | 75.0% |" in card and "/data" not in card
    assert "| optimizer steps | 200, 1 of them skipped |" in card
    assert "| seen | 3,200 sequences, 409,600 tokens |" in card
    assert "capacity factor 1" in card and "Rows 4000 to 4095 of the vocabulary are padding." in card
    assert "- A note.\n" in card and "| `model.safetensors` | `sha256:ab` |" in card


def test_what_a_card_says_of_a_dense_model():
    card = model_card(load_config("laptop-dense", []), architecture="XGLMForCausalLM", **OPTIONS | {"state": {}})
    assert "A dense language model for `XGLMForCausalLM`" in card and "of which a token passes" not in card
    for absent in ("trust_remote_code", "experts", "- moe", "capacity", "padding", "optimizer steps"):
        assert absent not in card, absent


@pytest.mark.parametrize("special", [SpecialIds(2, 2, 1), None])
def test_generation_settings_load(tmp_path, special):
    (tmp_path / "generation_config.json").write_bytes(generation_config(special))
    loaded = GenerationConfig.from_pretrained(tmp_path)
    assert not loaded.do_sample
    expected = (2, 2, 1) if special else (None, None, None)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == expected
    assert "top_k" not in json.loads(generation_config(special))
