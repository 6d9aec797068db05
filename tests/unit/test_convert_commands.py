"""`megamoe convert`: there and back with verification on, damage found by `verify`, refusals in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.errors import ConversionError
from megamoe.topology.parameters import num_parameters, param_table
from megamoe.verification.verify import verify
from megamoe.verification.windows import window_config
from tests.unit.convert_cases import CASES

MODEL = "mixtral"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, made by transformers; run, made of it by from-hf; back, made of that by to-hf."""
    root = tmp_path_factory.mktemp("commands")
    CASES[MODEL].build().save_pretrained(root / "hf")
    assert main(["convert", "from-hf", str(root / "hf"), str(root / "run"), "--no-tokenizer"]) == 0
    assert main(["convert", "to-hf", str(root / "run"), str(root / "back"), "--no-tokenizer"]) == 0
    return root


def test_there_and_back_is_verified_and_equal_to_the_bit(folders):
    one, other = (load_file(folders / name / "model.safetensors") for name in ("hf", "back"))
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    for name in ("run", "back"):
        verification = json.loads((folders / name / "verification.json").read_text())
        assert verification["method"] == "logits of the whole model"
        (result,) = verification["results"]
        assert result["is_good"] and 0 <= result["largest_difference"] < 1e-5 and result["largest_logit"] > 0.1
    card = (folders / "back" / "README.md").read_text()
    assert "MixtralForCausalLM" in card and "# back" in card
    assert json.loads((folders / "back" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]


def test_rows_that_are_no_tokens_can_be_left_out(folders, tmp_path):
    padded, kept, cut = (str(tmp_path / name) for name in ("padded", "kept", "cut"))
    hf = str(folders / "hf")
    assert main(["convert", "from-hf", hf, padded, "--vocab-multiple", "64", "--no-tokenizer", "--no-verify"]) == 0
    assert main(["convert", "to-hf", padded, kept, "--no-tokenizer", "--no-verify"]) == 0
    assert main(["convert", "to-hf", padded, cut, "--no-tokenizer", "--cut-vocabulary"]) == 0
    (result,) = json.loads((tmp_path / "cut" / "verification.json").read_text())["results"]
    assert result["is_good"]
    theirs, *ours = (load_file(Path(name) / "model.safetensors") for name in (hf, kept, cut))
    assert [len(each["lm_head.weight"]) for each in ours] == [128, 96]
    assert all(np.array_equal(theirs[name], ours[1][name]) for name in theirs) and theirs.keys() == ours[1].keys()


def test_a_model_that_does_not_fit_is_verified_in_windows_of_layers(folders):
    checkpoint = resolve_checkpoint(folders / "run")
    result = verify(checkpoint, folders / "back", available_bytes=memory_for_two_layers(folders / "run"))
    assert result["method"] == "logits of windows of layers"
    assert [part["layers"] for part in result["results"]] == [[0, 2], [2, 4]]
    assert all(part["is_good"] and part["largest_difference"] < 1e-5 for part in result["results"])
    assert sorted(path.name for path in folders.iterdir()) == ["back", "hf", "run"], "no scratch is left"
    with pytest.raises(ConversionError, match=r"0\.9 GiB of free memory do not hold one layer"):
        verify(checkpoint, folders / "back", available_bytes=1_000_000_000)


def test_a_wrong_layer_is_found_in_its_window(folders, tmp_path):
    """Matrices of two layers exchanged: names, shapes and sums are as they were."""
    for path in (folders / "back").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    one, other = "model.layers.2.self_attn.o_proj.weight", "model.layers.3.self_attn.o_proj.weight"
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    available_bytes = memory_for_two_layers(folders / "run")
    with pytest.raises(ConversionError, match=r"layers 2 to 3 of .*: logits differ"):
        verify(resolve_checkpoint(folders / "run"), tmp_path, available_bytes=available_bytes)


def memory_for_two_layers(run: Path) -> int:
    """What `verify` is told is free."""
    part = window_config(load_config(str(run / "config.yaml")), 0, 2)
    return (1 << 30) + 10 * num_parameters(param_table(part.model, part.moe))


@pytest.mark.parametrize("fault", ["swapped experts", "rope"])
def test_verify_finds_what_names_and_shapes_cannot(fault, folders, tmp_path, capsys):
    for path in (folders / "back").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if fault == "rope":
        config = json.loads((tmp_path / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] *= 10
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        tensors = load_file(tmp_path / "model.safetensors")
        pair = [f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 1)]
        tensors[pair[0]], tensors[pair[1]] = tensors[pair[1]], tensors[pair[0]]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "verify", str(folders / "run"), str(tmp_path), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["is_good"] and "the conversion is wrong" in answer["problem"]


def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(folders, tmp_path, capsys):
    out = tmp_path / "out"
    cases = {
        ("to-hf", str(folders / "run"), str(out), "--no-tokenizer", "--architecture", "LlamaForCausalLM"): (
            "LlamaForCausalLM cannot express"
        ),
        ("to-hf", str(folders / "run"), str(folders / "hf"), "--no-tokenizer"): "exists already",
        ("to-hf", str(tmp_path / "none"), str(out)): "is no checkpoint",
        ("from-hf", str(tmp_path), str(out), "--no-tokenizer"): "has no config.json",
        ("from-hf", str(folders / "hf"), str(out)): "holds no tokenizer that megamoe reads",
        ("from-fairseq", str(folders / "hf"), str(out)): str(folders / "hf"),
        ("from-deepspeed", str(folders / "hf"), str(out), "--set", "heads"): "--set heads is not NAME=VALUE",
    }
    for arguments, expected in cases.items():
        assert main(["convert", *arguments]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("megamoe: error: ") and expected in error, error
        assert not out.exists()
