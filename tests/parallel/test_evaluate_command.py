"""`megamoe evaluate` as it is typed: killed and gone on from, refused in one sentence, on a folder of Hugging Face."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.numpy import load_file, save_file

from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.convert.from_hf import import_
from megamoe.convert.hf_tables import conversion, from_hf_config, to_hf_config
from megamoe.data.tokenizers import EOS_ID, ByteTokenizer
from megamoe.runs.run_folder import checkpoint_name, checkpoints_path
from tests.parallel.test_convert_layouts import write_folder
from tests.unit.convert_cases import random_ours, to_theirs

TEXT = "Größe and 日本語, line {}.\nA second line of it.\n\n"
NUM_DOCUMENTS = 400
TIMEOUT_SECONDS = 200
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, a small mixture of experts over bytes; run/, the same with two checkpoints; text.txt; sets.yaml."""
    site = tmp_path_factory.mktemp("evaluate")
    config = load_config("laptop-moe", [
        "model.num_layers=2", "model.hidden_size=16", "model.num_attention_heads=2", "model.ffn_hidden_size=16",
        "model.vocab_size=260", "model.vocab_size_multiple=4", "model.seq_length=32", "moe.num_experts=4",
        "moe.dropless=true",
    ])  # fmt: skip
    theirs = to_hf_config(config, dtype="float32")
    table = conversion(config, theirs)
    write_folder(site / "hf", theirs, to_theirs(table, {k: 0.2 * v for k, v in random_ours(table).items()}))
    import_(site / "hf", site / "run", conversion(from_hf_config(theirs), theirs), workers=0)
    (site / "text.txt").write_text("".join(TEXT.format(i) for i in range(NUM_DOCUMENTS)), encoding="utf-8")
    (site / "sets.yaml").write_text(
        "sets:\n"
        "  - {name: one, path: text.txt, domain: in_domain, max_tokens: 300}\n"
        "  - {name: two, path: text.txt, domain: out_of_domain, reading: documents, context_tokens: 24}\n"
    )
    return site


def started(site: Path, *arguments: str, first_path: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    places = [first_path, Path(__file__).parents[2]]
    search = os.pathsep.join(str(place) for place in places if place is not None)
    environment = dict(os.environ) | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-m", "megamoe", "evaluate", *arguments], cwd=site, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def evaluated(site: Path, *arguments: str, first_path: Path | None = None) -> dict[str, Any]:
    process = started(site, *arguments, "--json", first_path=first_path)
    out, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, error
    return json.loads(out, parse_constant=pytest.fail)  # and nothing else is printed there: no NaN either


def refusal(site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.chdir(site)
    assert main(["evaluate", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err.removeprefix("megamoe: error: ").strip()


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if key not in ("seconds", "tokens_per_second")}
    return [without_times(each) for each in tree] if isinstance(tree, list) else tree


@pytest.fixture(scope="module")
def whole(site: Path) -> dict[str, Any]:
    return evaluated(site, "run", "--sets", "sets.yaml", "--out", "whole.json", "--save-interval", "0")


def test_a_killed_evaluation_ends_with_the_same_numbers_to_the_bit(site, whole, tmp_path):
    out = site / "killed.json"
    command = ("run", "--sets", "sets.yaml", "--out", "killed.json", "--save-interval", "0")
    process = started(site, *command)
    give_up = time.monotonic() + TIMEOUT_SECONDS
    while not (out.exists() and "progress" in json.loads(out.read_text())["models"][0]["sets"][1]):
        assert time.monotonic() < give_up and process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    left = json.loads(out.read_text())
    assert [each["is_complete"] for each in left["models"][0]["sets"]] == [True, False]
    assert 0 < left["models"][0]["sets"][1]["progress"]["next_unit"] < NUM_DOCUMENTS
    again = evaluated(site, *command)
    assert without_times(again) == without_times(whole) == without_times(json.loads(out.read_text()))
    assert not (site / "killed.json.tokens").exists()
    # Nothing is to do: no model is built, torch is not even loaded.
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is loaded')\n")
    (site / "killed.json.tokens").mkdir()  # what a death after the last write leaves
    (site / "killed.json.tokens" / "000-one.bin").write_bytes(b"ids")
    assert evaluated(site, *command, first_path=tmp_path) == again
    assert not (site / "killed.json.tokens").exists()


def test_perplexity_and_bits_are_those_of_transformers_and_of_the_file(site, whole):
    from megamoe.hf import MegamoeForCausalLM

    model, tokenizer = MegamoeForCausalLM.from_pretrained(site / "hf").eval(), ByteTokenizer()
    nats, num_tokens = 0.0, 0
    texts = [TEXT.format(i).rstrip("\n") for i in range(NUM_DOCUMENTS)]
    with torch.no_grad():
        for text in texts:
            ids = np.array([EOS_ID, *tokenizer.encode(text), EOS_ID])
            num_tokens += len(ids) - 1
            places = np.arange(1, len(ids))
            starts = 12 * np.maximum(0, np.ceil((places - 24) / 12).astype(int))  # of the context of each place
            for start in np.unique(starts):
                wanted = places[starts == start]
                logits = model(torch.from_numpy(ids[None, start : wanted[-1]])).logits[0].double()
                nats -= float(logits.log_softmax(-1)[wanted - 1 - start, ids[wanted]].sum())
    one, two = whole["models"][0]["sets"]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (two["num_tokens"], two["num_documents"], two["num_text_bytes"]) == (num_tokens, NUM_DOCUMENTS, num_bytes)
    assert two["nats_per_token"] == pytest.approx(nats / num_tokens, rel=1e-5)
    assert two["perplexity"] == math.exp(two["nats"] / num_tokens)
    assert two["bits_per_byte"] == pytest.approx(two["nats"] / math.log(2) / num_bytes, rel=1e-12)
    assert one["num_tokens"] == 9 * 32 and one["num_units"] == 9
    first = b"\0".join(text.encode() for text in texts)[1 : 1 + 9 * 32]
    assert one["num_text_bytes"] == len(first.replace(b"\0", b""))
    model_entry = whole["models"][0]
    assert model_entry["overall"]["nats_per_token"] == (one["nats"] + two["nats"]) / (one["num_tokens"] + num_tokens)
    assert list(model_entry["domains"]) == ["in_domain", "out_of_domain"]
    assert whole["capacity"] == {"drops_tokens": False, "why": "default"} and whole["layout"]["num_ranks"] == 1


def test_a_hugging_face_folder_and_several_ranks_say_the_same(site, whole):
    found = evaluated(site, "hf", "--sets", "sets.yaml", "--local-ranks", "4", *(
        "parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2", "run.micro_batch_size=3",
        "data.tokenizer.kind=byte",
    ))  # fmt: skip
    assert found["models"][0]["checkpoint"] == "hf" and found["layout"]["data_parallel_size"] == 2
    for ours, one_rank in zip(found["models"][0]["sets"], whole["models"][0]["sets"], strict=True):
        assert ours["nats"] == pytest.approx(one_rank["nats"], rel=1e-6)
        for key in ("num_tokens", "num_documents", "num_text_bytes", "num_units", "num_computed_tokens"):
            assert ours[key] == one_rank[key]


def test_the_same_command_goes_on_from_a_hugging_face_folders_results(site, tmp_path, capsys, monkeypatch):
    """Its tokenizer is a file, which lies in another folder at each import."""
    shutil.copytree(site / "hf", tmp_path / "hf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.format(i) for i in range(50)]), model_prefix=str(tmp_path / "hf" / "tokenizer"),
        vocab_size=50, model_type="bpe", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "t.txt").write_text(TEXT)
    command = ("hf", "--text", "t.txt", "--reading", "documents", "--out", "h.json")
    first = evaluated(tmp_path, *command)
    again = evaluated(tmp_path, *command)
    assert again["models"][0]["sets"] == first["models"][0]["sets"], "seconds included: nothing is computed again"
    assert again["is_complete"] and first["tokenizer"]["kind"] == "sentencepiece"
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights[min(weights)][0] += 1
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert refusal(tmp_path, capsys, monkeypatch, *command) == (
        "h.json holds results of another model, hf at step 0: add --overwrite to start anew, or choose another --out"
    )


def test_sigterm_ends_an_evaluation_and_removes_what_it_has_imported(site, tmp_path):
    """In the middle of the scoring, in one process."""
    arguments = ("hf", "--sets", "sets.yaml", "--out", str(tmp_path / "h.json"), "--save-interval", "0")
    process = started(site, *arguments, "data.tokenizer.kind=byte", TMPDIR=str(tmp_path))
    give_up = time.monotonic() + TIMEOUT_SECONDS
    while not ((tmp_path / "h.json").exists() and "progress" in (tmp_path / "h.json").read_text()):
        assert time.monotonic() < give_up and process.poll() is None, process.communicate()
        time.sleep(0.005)
    assert any(path.name.startswith("megamoe-imported-") for path in tmp_path.iterdir())
    process.terminate()
    _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 143 and "Traceback" not in error
    assert not any(path.name.startswith("megamoe-imported-") for path in tmp_path.iterdir())


def test_every_checkpoint_of_a_run_is_scored_into_one_file(site, whole, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    checkpoints_path(run).mkdir(parents=True)
    kept = checkpoints_path(site / "run") / checkpoint_name(0)
    (checkpoints_path(run) / checkpoint_name(0)).symlink_to(kept)
    theirs = json.loads((site / "hf" / "config.json").read_text())
    table = conversion(from_hf_config(theirs), theirs)
    write_folder(tmp_path / "hf", theirs, to_theirs(table, {k: 0.1 * v for k, v in random_ours(table, 6).items()}))
    import_(tmp_path / "hf", tmp_path / "other", table, workers=0)
    (checkpoints_path(tmp_path / "other") / checkpoint_name(0)).rename(checkpoints_path(run) / checkpoint_name(7))
    # A third one has diverged: a row of the embedding is no number, and routers see it.
    weights = {k: 0.1 * v for k, v in random_ours(table).items()}
    weights["weight", "embedding.weight"][4 + "ß".encode()[1]] = np.nan
    write_folder(tmp_path / "lost", theirs, to_theirs(table, weights))
    import_(tmp_path / "lost", tmp_path / "diverged", table, workers=0)
    (checkpoints_path(tmp_path / "diverged") / checkpoint_name(0)).rename(checkpoints_path(run) / checkpoint_name(9))
    arguments = ("--text", str(site / "text.txt"), "--out", str(tmp_path / "curve.json"), "--save-interval", "0")
    found = evaluated(site, str(run), "--every", *arguments)
    one, other, diverged = found["models"]
    assert diverged["is_complete"] and diverged["sets"][0]["num_tokens"] == one["sets"][0]["num_tokens"]
    assert diverged["sets"][0]["nats"] is diverged["overall"]["perplexity"] is None
    assert Path(other["folder"]).name == checkpoint_name(7)
    alone = evaluated(site, str(checkpoints_path(run) / checkpoint_name(7)), "--text", str(site / "text.txt"))
    assert without_times(alone["models"][0]["sets"]) == without_times(other["sets"]) != without_times(one["sets"])
    # Nothing of another run stands in the file; a step that was saved anew takes the place of the old one.
    assert refusal(site, capsys, monkeypatch, "run", "--every", *arguments).startswith(
        f"{tmp_path}/curve.json holds results of another model, {run}/checkpoints/step_"
    )
    (checkpoints_path(run) / checkpoint_name(9)).rename(tmp_path / "old")
    (checkpoints_path(run) / checkpoint_name(7)).rename(checkpoints_path(run) / checkpoint_name(9))
    again = evaluated(site, str(run), "--every", *arguments)
    assert [Path(model["checkpoint"]).name for model in again["models"]] == [checkpoint_name(0), checkpoint_name(9)]
    assert without_times(again["models"][1]["sets"]) == without_times(other["sets"])


def test_what_cannot_be_is_said_in_one_sentence(site, whole, capsys, monkeypatch, tmp_path):
    def said(*arguments: str) -> str:
        return refusal(site, capsys, monkeypatch, *arguments)

    text = ("--text", "text.txt")
    assert said("gone", *text) == "gone is no checkpoint, and no folder with checkpoints"
    assert said("run", "--text", "gone.txt") == (
        "set gone.txt: no file matches gone.txt: give a text file, a .jsonl file, a glob, or the path of a .bin/.idx "
        "pair without the ending"
    )
    assert said("run", *text, "moe.eval_capacity_factor=2") == (
        "moe.eval_capacity_factor alone would not make experts drop tokens: give --capacity-factor or "
        "--capacity-fraction"
    )
    assert said("run", *text, "--capacity-factor", "2").startswith("this model was trained dropless (moe.dropless)")
    assert said("run", *text, "parallel.zero_stage=1").startswith("parallel.zero_stage cannot be set for a forward")
    assert said("run", *text, "--context", "64") == (
        "set text.txt: context_tokens 64 is longer than the model's sequences: use at most 32"
    )
    assert said("run", *text, "--out", "whole.json").startswith(
        "whole.json holds results of another evaluation: the sets differ (2 there, 1 here): add --overwrite"
    )
    assert said("run", *text, "data.tokenizer.kind=gpt2_bpe") == (
        "data.tokenizer.kind gpt2_bpe needs data.tokenizer.path: give a folder with vocab.json and merges.txt"
    )
    (site / "torn.idx").write_bytes(b"MMIDIDX\0\0")
    (site / "torn.bin").write_bytes(b"")
    assert said("run", "--text", "torn") == "torn.idx is truncated: its header is 34 bytes, it ends at byte 9"
    assert said("hf", *text, "--every").startswith("hf is no run's folder with checkpoints")
    assert said("run", *text, "--steps", "3") == "run has no checkpoint of step 3: it has those of steps 0"
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff")
    process = started(site, "run", "--text", str(tmp_path / "bad.txt"), "--local-ranks", "2")
    _, error = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 2
    assert f"{tmp_path}/bad.txt, line 2, byte 1: not UTF-8 (invalid start byte)" in error and "Traceback" not in error
