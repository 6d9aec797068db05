"""The architecture for transformers: the plain reference's logits, with and without a cache, padding and megamoe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megamoe.convert.custom_code import AUTO_MAP, custom_files
from megamoe.hf import MegamoeConfig, MegamoeForCausalLM
from megamoe.hf.modeling_megamoe import Router
from megamoe.moe.routers import build_router
from megamoe.moe.routing import settle
from tests.parity.reference import forward
from tests.unit.hf_cases import CASES, case, counts, hf_settings, hf_weights

ROOT = Path(__file__).parents[2]
GENERATED = 8


def write_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> None:
    """An export of one case: what the converter writes, without the converter."""
    config, weights, biases = case(name)
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {
        key: value if key.endswith("balance_bias") else value.to(dtype)
        for key, value in hf_weights(config, weights, biases).items()
    }
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["MegamoeForCausalLM"], "model_type": "megamoe", "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."), "eos_token_id": 2, "pad_token_id": 1, **hf_settings(config),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    for file, content in custom_files().items():
        (folder / file).write_bytes(content)


def load(folder: Path, **options) -> MegamoeForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    for name in CASES:
        write_folder(root / name, name)
    return {name: root / name for name in CASES}


def some_tokens(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(11))


@torch.no_grad()
def reference_logits(name: str, tokens: torch.Tensor) -> torch.Tensor:
    config, weights, biases = case(name)
    return forward(config, weights, tokens, biases=biases)[0]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_reference_s(folders, name):
    model, tokens = load(folders[name]), some_tokens()
    expected = reference_logits(name, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    kept = model(tokens, logits_to_keep=2).logits  # a product of other sizes, which may be summed in another order
    torch.testing.assert_close(kept, model(tokens).logits[:, -2:], rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_cache_changes_nothing(folders, name):
    model, tokens = load(folders[name]), some_tokens()
    whole, cache, parts = model(tokens).logits, None, []
    for piece in tokens.split([5, 1, 1, 5], dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_padding_on_the_left_changes_nothing(folders, name):
    """By the mask alone, and so does not who else is in the batch."""
    model, tokens = load(folders[name]), some_tokens()
    lengths = (12, 7, 1)
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        padded[row, :-length] = 1
        mask[row, :-length] = 0
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits = model(padded, attention_mask=mask).logits
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, -length:]).logits[0]
            torch.testing.assert_close(logits[row, -length:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper_moe", "modern"])
def test_padding_and_a_cache_together_change_nothing(folders, name):
    model, tokens = load(folders[name]), some_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    whole, cache, start = model(tokens, attention_mask=mask).logits, None, 0
    for length in (6, 1, 5):
        seen = start + length
        out = model(tokens[:, start:seen], attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits[0], whole[0, start:seen], rtol=1e-5, atol=1e-5)
        behind = max(start, 4)  # what is hidden is nobody's
        torch.testing.assert_close(out.logits[1, behind - start :], whole[1, behind:seen], rtol=1e-5, atol=1e-5)
        cache, start = out.past_key_values, seen


def greedy(name: str, prompt: torch.Tensor) -> list[int]:
    """Greedy continuation of one prompt [1, t] by the reference, without a cache; it ends with token 2."""
    tokens = prompt
    while tokens.shape[1] < prompt.shape[1] + GENERATED:
        tokens = torch.cat([tokens, reference_logits(name, tokens)[:, -1:].argmax(-1)], dim=1)
        if tokens[0, -1] == 2:
            break
    return tokens[0, prompt.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper_moe", "modern", "sigmoid_groups", "pyramid"])
def test_greedy_generation_of_a_padded_batch_is_the_reference_s(folders, name):
    model, tokens = load(folders[name]), some_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    out = model.generate(tokens * mask + (1 - mask), attention_mask=mask, max_new_tokens=GENERATED, do_sample=False)
    for row, start in enumerate((0, 6, 0)):
        expected = greedy(name, tokens[row : row + 1, start:])
        assert out[row, 12:].tolist() == expected + [1] * (GENERATED - len(expected))


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper_moe", "modern", "sigmoid_groups", "shared_residual", "not_normalized"])
def test_bf16_stays_close_and_selection_biases_stay_fp32(tmp_path, name):
    write_folder(tmp_path, name, torch.bfloat16)
    model, tokens = load(tmp_path, dtype=torch.bfloat16), some_tokens()
    assert model.dtype is torch.bfloat16
    config, weights, biases = case(name)
    for layer, bias in biases.items():
        assert torch.equal(model.model.layers[layer].mlp.gate.balance_bias, bias)
    expected = forward(config, {key: w.to(torch.bfloat16) for key, w in weights.items()}, tokens, biases=biases)[0]
    # The median: single tokens may take another expert, where two are nearly equal.
    error = (model(tokens).logits.float() - expected).abs().median() / expected.abs().mean()
    assert error < 0.02, error


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, (_, moe) in CASES.items() if moe["num_experts"]])
def test_routers_choose_what_megamoe_s_choose(name, dtype):
    """To the bit, ties included: features are small whole numbers, and so scores are often equal."""
    config, _, _ = case(name)
    num_experts = next(iter(counts(config).values()))
    gate = Router(MegamoeConfig(**hf_settings(config)), num_experts).to(dtype)
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (400, 24), generator=generator).to(dtype) / 4
    gate.weight.copy_(torch.randint(-1, 2, gate.weight.shape, generator=generator))
    bias = None
    if config.moe.balance_bias_update_rate:
        bias = torch.randint(-2, 3, (num_experts,), generator=generator) / 32
        gate.balance_bias = bias
    logits = torch.nn.functional.linear(x, gate.weight).float()
    top_two = logits.sort(dim=-1, descending=True).values[:, :2]
    assert (top_two[:, 0] == top_two[:, 1]).sum() > 10
    choice = build_router(config.moe)(logits, bias)
    expected = settle(
        choice.expert_index, choice.gate, num_experts=num_experts, capacity=None,
        normalization="after_drops" if config.moe.normalize_gates else "none", scale=config.moe.routed_scaling_factor,
    )  # fmt: skip
    own_logits, chosen, gates = gate(x)
    assert torch.equal(own_logits, logits)
    assert torch.equal(chosen, expected.expert_index)
    assert torch.equal(gates, expected.gate)


@pytest.mark.parametrize("name", ["paper_moe", "sigmoid_groups", "shared_residual", "head_norm"])
def test_gradients_are_the_reference_s(folders, name):
    config, weights, biases = case(name)
    tokens, ours = some_tokens(), {key: weight.requires_grad_() for key, weight in weights.items()}
    logits = forward(config, ours, tokens, biases=biases)[0]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    grads = dict(zip(ours, torch.autograd.grad(loss, list(ours.values())), strict=True))
    expected = hf_weights(config, grads, {})
    model = load(folders[name])
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        own = model(tokens, labels=tokens).loss
        own.backward()
        torch.testing.assert_close(own, loss)
        for key, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@torch.no_grad()
def test_what_can_be_looked_at(folders):
    model, tokens = load(folders["pyramid"], attn_implementation="eager"), some_tokens()
    out = model(tokens, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [logits.shape for logits in out.router_logits] == [(36, 2), (36, 4), (36, 6)]
    assert len(out.hidden_states) == 6 and torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert len(out.attentions) == 5 and out.attentions[0].shape == (3, 4, 12, 12)
    assert torch.all(out.attentions[0].triu(1) == 0)
    embedded = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, out.logits)
    assert torch.equal(model(tokens, return_dict=False)[0], out.logits)


HIDDEN = """
import sys
class Hidden:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] == "megamoe" else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = map(Hidden, sys.meta_path)
"""
PROGRAM = """
import importlib.util, sys
import torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("megamoe") is None, "megamoe can be imported here"
torch.manual_seed(0)
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    tokens = torch.load(sys.argv[1], weights_only=True)
    with torch.no_grad():
        logits = model(tokens).logits
    generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
    from safetensors.torch import save_file
    save_file({"logits": logits, "generated": generated}, folder + "/seen.safetensors")
"""


def test_a_machine_without_megamoe_gets_the_same(folders, tmp_path):
    """In a fresh interpreter, in an empty folder, in which nothing called megamoe can be imported."""
    from safetensors.torch import load_file

    names = ["paper_moe", "sigmoid_groups"]
    tokens = some_tokens()
    saved = []
    for name in names:  # as exported, and as somebody saves it who loaded it
        again = tmp_path / f"{name}_saved"
        load(folders[name]).save_pretrained(again)
        saved += [folders[name], again]
        assert set(custom_files()) <= {path.name for path in again.iterdir()}
        assert (
            json.loads((again / "config.json").read_text())["auto_map"].items()
            >= {
                "AutoConfig": AUTO_MAP["AutoConfig"],
                "AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"],
            }.items()
        )
    torch.save(tokens, tmp_path / "tokens.pt")
    hidden = tmp_path / "site"
    hidden.mkdir()
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", without_megamoe(PROGRAM), str(tmp_path / "tokens.pt"), *map(str, saved)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=240, cwd=hidden, env=environment
    )
    assert done.returncode == 0, done.stderr
    for folder, name in zip(saved, [names[0], names[0], names[1], names[1]], strict=True):
        seen, model = load_file(folder / "seen.safetensors"), load(folders[name])
        with torch.no_grad():
            assert torch.equal(seen["logits"], model(tokens).logits)
        assert torch.equal(seen["generated"], model.generate(tokens, max_new_tokens=4, do_sample=False))


def without_megamoe(program: str) -> str:
    """The program where nothing finds megamoe, however it is installed here and wherever the interpreter lies."""
    return HIDDEN + program


def test_the_files_that_travel_import_no_megamoe():
    for name, content in custom_files().items():
        assert "import megamoe" not in content.decode() and "from megamoe" not in content.decode(), name
    assert {value.split(".")[0] + ".py" for value in AUTO_MAP.values()} == set(custom_files())


def test_with_megamoe_no_flag_is_needed(folders):
    assert type(load(folders["modern"])) is MegamoeForCausalLM
    assert type(AutoConfig.from_pretrained(folders["modern"])) is MegamoeConfig


@pytest.mark.parametrize("name", ["paper_moe", "pyramid", "sigmoid_groups", "head_norm"])
def test_config_survives_being_saved(folders, tmp_path, name):
    """By transformers' names where it has them; k never as `top_k`, which `generate` would take for its own."""
    config = AutoConfig.from_pretrained(folders[name])
    config.save_pretrained(tmp_path)
    settings, given = json.loads((tmp_path / "config.json").read_text()), hf_settings(case(name)[0])
    assert "top_k" not in settings and settings["num_experts_per_tok"] == given["num_experts_per_tok"]
    assert settings["num_hidden_layers"] == given["num_layers"]
    again = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again | {"_name_or_path": None} == config.to_dict() | {"_name_or_path": None}
    assert load(folders[name]).generation_config.top_k is None
    assert MegamoeConfig(num_experts=4, top_k=3).num_experts_per_tok == 3
    for key, value in given.items():
        if value is not None:
            assert getattr(config, key) == value, key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "activation is 'relu': use gelu, gelu_tanh, swiglu"),
        ({"num_query_groups": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_experts": 4, "layer_pattern": [9]}, "layer_pattern names layer 9, but num_hidden_layers is 4"),
        ({"num_experts": 4, "num_experts_by_layer": [4]}, "num_experts_by_layer has 1 entries for 2 layers"),
        ({"num_experts": 2, "top_k": 4}, "layer 1 has 2 experts, fewer than num_experts_per_tok"),
        ({"num_experts": 4, "num_expert_groups": 3}, "num_expert_groups 3 does not divide 4 experts"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MegamoeConfig(**settings)


def test_fresh_weights_are_drawn():
    model = AutoModelForCausalLM.from_config(MegamoeConfig(**hf_settings(case("sigmoid_groups")[0])))
    gate = model.model.layers[0].mlp.gate
    assert torch.equal(gate.balance_bias, torch.zeros(12)) and 0.01 < gate.weight.std() < 0.03
    assert torch.equal(model.model.layer_norm.weight, torch.ones(24))


def test_importing_megamoe_brings_no_transformers():
    program = "import sys, megamoe, megamoe.convert.custom_code; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=ROOT)
