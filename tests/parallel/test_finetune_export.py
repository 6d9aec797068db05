"""Classifiers for transformers: the native class where there is one, else ours; the same answers, back to the bit."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.cli import main
from megamoe.config.schema import Config
from megamoe.convert.export_files import export_files
from megamoe.convert.from_hf import import_
from megamoe.convert.hf_tables import choose_architecture, conversion, from_hf_config, to_hf_config
from megamoe.convert.to_hf import export
from megamoe.errors import ConversionError
from megamoe.training.saving import save_checkpoint
from megamoe.verification.own_logits import logits_of
from tests.harness import run_ranks
from tests.parallel.finetune_cases import changed_tensors
from tests.parallel.worlds import config, parallel, trainer_of

TOLERANCE = 1e-5
LABELS = ("no", "yes", "perhaps")
HEAD = ("finetune.objective=classification", "model.num_labels=3", "finetune.labels=['no','yes','perhaps']")
EVERY_LAYER = ("moe.layer_pattern=1",)
# model of the parity grid, more settings, the class that fits
CASES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "llama": ("modern_dense", ("model.qk_norm=none",), "LlamaForSequenceClassification"),
    "qwen3": ("modern_dense", ("model.tie_embeddings=true",), "Qwen3ForSequenceClassification"),
    "mixtral": ("modern", ("model.qk_norm=none",), "MixtralForSequenceClassification"),
    "qwen3 moe": ("modern_second", (), "Qwen3MoeForSequenceClassification"),
    "olmoe": ("modern_full_norm", EVERY_LAYER, "MegamoeForSequenceClassification"),
    "paper dense": ("paper_dense", (), "MegamoeForSequenceClassification"),
    "paper": ("residual", (), "MegamoeForSequenceClassification"),
    "bias": ("bias", (), "MegamoeForSequenceClassification"),
}
LAYOUTS = {"llama": parallel(pp=2), "mixtral": parallel(ep=2), "paper": parallel(tp=2, sp=True)}
IDS = np.random.default_rng(5).integers(6, 120, (3, 16))


def config_of_case(name: str) -> Config:
    model, more, _ = CASES[name]
    # One sequence at a time is how logits are computed: stages must agree on that.
    return config(model, (*more, *HEAD, *LAYOUTS.get(name, ()), "run.micro_batch_size=1"))


def save_all(root: str) -> dict[str, Any]:
    """On a rank: random classifiers, their checkpoints, and their logits [3, 16, labels] on some rank."""
    found = {}
    for name in CASES:
        with trainer_of(config_of_case(name)) as trainer:
            for local in trainer.parameters:
                seed = sum(map(ord, local.parameter.name))  # copies on other ranks stay equal
                whole = torch.randn(local.parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.1
                local.view.add_(whole[local.slices].view(local.shape))
            for bias in trainer.balance_bias.by_layer.values():
                bias.copy_(torch.linspace(-0.2, 0.2, len(bias)))
            folder = save_checkpoint(trainer, f"{root}/{name}/run")
            found[name] = logits_of(trainer, folder, IDS)
    return found


@cache
def world() -> tuple[TemporaryDirectory, dict[str, np.ndarray]]:
    folder = TemporaryDirectory()
    ranks = run_ranks(save_all, 2, folder.name, init=False, timeout_seconds=200)
    return folder, {name: next(r[name] for r in ranks if r[name] is not None) for name in CASES}


def checkpoint_of(name: str) -> Path:
    (folder,) = (Path(world()[0].name) / name / "run" / "checkpoints").glob("step_*")
    return folder


@cache
def exported(name: str) -> Path:
    out, checkpoint = Path(world()[0].name) / name / "hf", checkpoint_of(name)
    with Checkpoint.open(checkpoint) as opened:
        settings, manifest = config_of(opened), opened.manifest
    theirs = to_hf_config(settings, dtype="float32")
    table = conversion(settings, theirs)
    files = export_files(theirs, table, manifest, None, name=name, dtype="float32")
    export(checkpoint, out, table, dtype="fp32", files=files, workers=0)
    return out


@pytest.mark.parametrize("name", CASES)
def test_the_same_answers_in_transformers(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    out, ours = exported(name), world()[1][name]
    architecture = CASES[name][2]
    assert choose_architecture(config_of_case(name))[0] == architecture
    model, info = AutoModelForSequenceClassification.from_pretrained(
        out, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    assert type(model).__name__ == architecture and not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    assert model.config.id2label == dict(enumerate(LABELS))
    model.eval()
    pad = 3
    model.config.pad_token_id = pad
    lengths = [5, 16, 11]
    rows = torch.full((3, 16), pad)
    for row, length in enumerate(lengths):
        rows[row, :length] = torch.from_numpy(IDS[row, :length])
    with torch.no_grad():
        batch = model(rows, attention_mask=(rows != pad).long()).logits.numpy()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(batch[row], ours[row, length - 1], rtol=0, atol=TOLERANCE)
    assert np.abs(ours).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mixtral", "paper", "bias"])
def test_back_to_the_bit(name, tmp_path):
    out = exported(name)
    their_config = json.loads((out / "config.json").read_text())
    settings = from_hf_config(their_config)
    assert settings.finetune.labels == LABELS and settings.model.num_labels == 3
    import_(out, tmp_path / "back", conversion(settings, their_config), workers=0)
    (back,) = (tmp_path / "back" / "checkpoints").glob("step_*")
    with Checkpoint.open(checkpoint_of(name)) as ours, Checkpoint.open(back) as theirs:
        weights = {key: entry.shape for key, entry in theirs.manifest.tensors.items() if key[0] == "weight"}
        assert weights.items() <= {key: entry.shape for key, entry in ours.manifest.tensors.items()}.items()
    assert changed_tensors(checkpoint_of(name), back) == set()


def test_the_command_proves_what_it_writes(tmp_path, capsys):
    out = tmp_path / "hf"
    assert main(["convert", "to-hf", str(checkpoint_of("paper")), str(out), "--no-tokenizer"]) == 0
    found = json.loads((out / "verification.json").read_text())
    assert found["results"][0]["largest_difference"] <= TOLERANCE and found["results"][0]["num_positions"] == 2
    assert "AutoModelForSequenceClassification" in (out / "README.md").read_text()
    assert not (out / "generation_config.json").exists()


def test_a_class_without_a_head_is_refused_with_the_reason():
    settings = config_of_case("olmoe")
    with pytest.raises(ConversionError, match=r"OlmoeForCausalLM cannot express model.num_labels 3: it is a language"):
        to_hf_config(settings, dtype="float32", architecture="OlmoeForCausalLM")
    _, refused = choose_architecture(settings)
    assert "transformers has no classifier of its kind" in refused["OlmoeForCausalLM"][0]
    language_model = settings.model_copy(update={"model": settings.model.model_copy(update={"num_labels": 0})})
    with pytest.raises(ConversionError, match=r"model.num_labels 0: it is a classifier"):
        to_hf_config(language_model, dtype="float32", architecture="Qwen3ForSequenceClassification")
