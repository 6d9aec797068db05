"""Models of Hugging Face classes come in, compute the same logits and draw the same greedy tokens under every layout,
and go back to the bit.

One launch for each number of ranks goes through all models and layouts; each layout saves the checkpoint from which the
model is exported again.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.checkpoint.slices import whole_box
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.convert.custom_code import custom_files
from megamoe.convert.foreign import open_source
from megamoe.convert.from_hf import import_
from megamoe.convert.hf_tables import conversion, from_hf_config, to_hf_config
from megamoe.convert.to_hf import export
from megamoe.runs.run_folder import checkpoint_name, checkpoints_path
from megamoe.training.sampling import sample_tokens
from megamoe.training.saving import save_checkpoint
from megamoe.verification.own_logits import forward_config, logits_of
from tests.harness import run_ranks
from tests.parallel.worlds import parallel, trainer_of
from tests.unit.convert_cases import CASES, random_ours, to_theirs, tokens

MODELS = (
    "llama", "qwen3", "qwen3, tied", "mixtral", "olmoe", "qwen3 moe", "qwen3 moe, listed", "ernie", "xglm", "custom",
)  # fmt: skip
DENSE = ("llama", "qwen3", "qwen3, tied", "xglm")
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"one": ()},
    2: {"tp2": parallel(tp=2), "tp2 sp": parallel(tp=2, sp=True), "pp2": parallel(pp=2), "ep2": parallel(ep=2)},
    4: {
        "tp2 pp2": parallel(tp=2, pp=2),
        "pp4": parallel(pp=4),
        "tp2 ep2 sp": parallel(tp=2, ep=2, sp=True),
        "pp2 vp2 ep2": parallel(pp=2, vp=2, ep=2),
        "ep4": parallel(ep=4),
    },
    8: {"tp2 pp2 ep2 sp": parallel(tp=2, pp=2, ep=2, sp=True)},
}
TOLERANCE = 1e-5
NUM_PROMPT, NUM_DRAWN = 6, 5  # tokens
TIMEOUT_SECONDS = 300
pytestmark = pytest.mark.timeout(900)  # the first test waits for all launches


def layouts_of(model: str, world: int) -> dict[str, tuple[str, ...]]:
    """Expert parallelism needs experts."""
    return {name: s for name, s in LAYOUTS[world].items() if model not in DENSE or "ep" not in name}


PAIRS = [(model, world, name) for model in MODELS for world in LAYOUTS for name in layouts_of(model, world)]


def compute_all(world: int, root: str) -> dict[tuple[str, str], tuple[np.ndarray | None, list[int]]]:
    """On a rank: every model's logits and greedy tokens under every layout of this world; leaves each layout's
    checkpoint behind."""
    found = {}
    for model in MODELS:
        folder = Path(root) / model
        for name, settings in layouts_of(model, world).items():
            checkpoint = checkpoints_path(folder / "run") / checkpoint_name(0)
            config = forward_config(checkpoint, None, tokens().shape[1], settings, world)
            with trainer_of(config) as trainer:
                logits = logits_of(trainer, checkpoint, tokens().numpy())
                prompt = tokens()[0, :NUM_PROMPT].tolist()
                found[model, name] = logits, sample_tokens(trainer, prompt, NUM_DRAWN, temperature=0.0, seed=0)
                save_checkpoint(trainer, folder / name)
    return found


def make_folder(model: str, folder: Path) -> tuple[np.ndarray, list[int]]:
    """A Hugging Face folder with random weights; its logits and greedy tokens by transformers."""
    torch.set_num_threads(1)
    if model != "custom":
        built = CASES[model].build()
        built.save_pretrained(folder)
    else:
        built = make_custom(folder)
    with torch.no_grad():
        drawn = built.generate(
            tokens()[:1, :NUM_PROMPT], do_sample=False, max_new_tokens=NUM_DRAWN, eos_token_id=None, pad_token_id=0
        )
        return built(tokens()).logits.float().numpy(), drawn[0, NUM_PROMPT:].tolist()


def make_custom(folder: Path) -> torch.nn.Module:
    """The paper's mixture of experts, started from megamoe's side."""
    from megamoe.hf import MegamoeForCausalLM

    config = load_config("laptop-moe", [
        "model.num_layers=4", "model.hidden_size=32", "model.num_attention_heads=4", "model.ffn_hidden_size=48",
        "model.vocab_size=96", "model.vocab_size_multiple=32", "model.seq_length=16", "moe.num_experts=4",
        "moe.dropless=true",
    ])  # fmt: skip
    their_config = to_hf_config(config, dtype="float32")
    table = conversion(config, their_config)
    write_folder(folder, their_config, to_theirs(table, {k: 0.15 * v for k, v in random_ours(table).items()}))
    return MegamoeForCausalLM.from_pretrained(folder).eval()


def write_folder(folder: Path, their_config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(their_config))
    for name, content in custom_files().items():
        (folder / name).write_bytes(content)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def table_of(folder: Path) -> tuple[Config, dict[str, Any]]:
    their_config = json.loads((folder / "config.json").read_text())
    return from_hf_config(their_config), their_config


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Their logits and tokens by model, ours by (model, layout), and where the folders are."""
    root = tmp_path_factory.mktemp("convert")
    theirs = {}
    for model in MODELS:
        theirs[model] = make_folder(model, root / model / "hf")
        config, their_config = table_of(root / model / "hf")
        import_(root / model / "hf", root / model / "run", conversion(config, their_config), workers=0)
    ours: dict[tuple[str, str], tuple[np.ndarray, list[int]]] = {}
    for world in LAYOUTS:
        ranks = run_ranks(compute_all, world, world, str(root), init=False, timeout_seconds=TIMEOUT_SECONDS)
        for key in ranks[0]:
            parts = [found[key][0] for found in ranks if found[key][0] is not None]
            ours[key] = np.concatenate(parts, axis=-1), ranks[0][key][1]
    return {"root": root, "theirs": theirs, "ours": ours}


@cache
def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """dtype and bytes of every tensor in a Hugging Face folder."""
    source = open_source(folder)
    found = {n: (t.dtype, source.read(n, whole_box(t.shape)).tobytes()) for n, t in source.tensors.items()}
    source.close()
    return found


def test_enough_round_trips_are_made():
    assert len(PAIRS) >= 60
    assert all(sum(pair[0] == model for pair in PAIRS) >= (6 if model in DENSE else 8) for model in MODELS)


@pytest.mark.parametrize(("model", "world", "layout"), PAIRS)
def test_a_model_computes_the_same_and_goes_back_to_the_bit(model, world, layout, outcomes, tmp_path):
    folder = outcomes["root"] / model
    (theirs, their_draw), (ours, our_draw) = outcomes["theirs"][model], outcomes["ours"][model, layout]
    assert our_draw == their_draw
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    config, their_config = table_of(folder / "hf")
    again = to_hf_config(config, dtype="float32", architecture=their_config["architectures"][0])
    checkpoint = checkpoints_path(folder / layout) / checkpoint_name(0)
    files = {"config.json": json.dumps(again).encode()}
    export(checkpoint, tmp_path / "back", conversion(config, again), dtype="fp32", files=files, workers=0)
    assert stored(tmp_path / "back") == stored(folder / "hf")
    assert from_hf_config(again) == config
