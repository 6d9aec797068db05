"""What commands that compute are pointed at: Hugging Face folders, imported for a while, and their tokenizers."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from megamoe.checkpoint.manifest import Manifest
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.convert.hf_tables import conversion, to_hf_config
from megamoe.data.tokenizer_training import TrainingSettings, train_tokenizer
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.errors import ConfigError, ConversionError, OutputError
from megamoe.evaluation.plan import model_identity
from megamoe.inference.sources import model_checkpoint
from megamoe.inference.tokenizer import names_tokenizer, notes_of_tokenizer
from tests.unit.convert_cases import random_ours, to_theirs

ROOT = Path(__file__).parents[2]
NAMES_ONE = "; one can be named, as in data.tokenizer.kind=… data.tokenizer.path=…"
TASK = 'name: t\ndata: {file: gone.jsonl}\ntext: "{q} {choice}"\nchoices: a\nlabel: {field: r}\n'
# Imports the folder, says so, and waits inside.
IMPORTS = """
import sys, time
from pathlib import Path
from megamoe.inference.sources import model_checkpoint
with model_checkpoint(Path(sys.argv[1]), keeps_tokenizer=False) as checkpoint:
    print(checkpoint, flush=True)
    time.sleep(60)
"""


def write_model(folder: Path, *, vocab_size: int = 320, seed: int = 5) -> Path:
    config = load_config("laptop-moe", [
        "model.num_layers=1", "model.hidden_size=8", "model.num_attention_heads=2", "model.ffn_hidden_size=8",
        f"model.vocab_size={vocab_size}", "model.vocab_size_multiple=4", "model.seq_length=16", "moe.num_experts=0",
    ])  # fmt: skip
    theirs = to_hf_config(config, dtype="float32")
    table = conversion(config, theirs)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(theirs))
    save_file(to_theirs(table, random_ours(table, seed)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model of 320 ids."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("\n\n".join(["Größe zählt.", "a text of two words and more"] * 30))
    train_tokenizer(
        TrainingSettings(inputs=(str(folder / "corpus.txt"),), output=str(folder / "made"), vocab_size=320)
    )
    return folder / "made.model"


def identity(folder: Path) -> tuple[str, str]:
    with model_checkpoint(folder) as checkpoint:
        with Checkpoint.open(checkpoint) as opened:
            config = config_of(opened)
        found = model_identity(checkpoint, folder, config)
        return found["checkpoint"], found["manifest_checksum"]


def test_an_imported_model_is_known_by_its_weights_however_often_it_is_imported(pieces, tmp_path):
    """Its tokenizer's file lies in another folder each time, and a copy of it has other times."""
    folder = write_model(tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    first = identity(folder)
    os.utime(folder / "model.safetensors", (0, 0))
    assert identity(folder) == first == (str(folder), first[1])
    other = write_model(tmp_path / "other", seed=6)
    (other / "tokenizer.model").write_bytes(pieces.read_bytes())
    assert identity(other)[1] != first[1]


def test_a_runs_checkpoint_is_known_by_its_manifest_also_through_a_link(tmp_path):
    with model_checkpoint(write_model(tmp_path / "hf"), keeps_tokenizer=False) as checkpoint:
        with Checkpoint.open(checkpoint) as opened:
            config = config_of(opened)
        run = tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        link = run / "checkpoints" / checkpoint.name
        link.symlink_to(checkpoint)
        found = model_identity(link, run, config)
        assert found["checkpoint"] == str(link) and found["manifest_checksum"] == Manifest.read(checkpoint).checksum


@pytest.mark.parametrize("command", ["evaluate", "generate", "prime"])
def test_a_folder_without_a_tokenizer_is_used_with_one_that_is_named(command, pieces, tmp_path, monkeypatch, capsys):
    """As far as what is asked for after the import, which is refused here."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("hf"))
    Path("task.yaml").write_text(TASK)
    arguments = {
        "evaluate": ["--text", "gone.txt"], "generate": ["--prompt", "a word " * 90], "prime": ["--task", "task.yaml"],
    }[command]  # fmt: skip
    asked = {
        "evaluate": "no file matches gone.txt", "generate": "tokens: the model continues up to", "prime": "gone.jsonl",
    }[command]  # fmt: skip
    assert main([command, "hf", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megamoe: error: hf holds no tokenizer that megamoe reads") and error.count("\n") == 1
    assert error.endswith(f"{NAMES_ONE}\n")
    for named in (
        ["data.tokenizer.kind=sentencepiece", f"data.tokenizer.path={pieces}"],
        [f"data.tokenizer={{kind: sentencepiece, path: {pieces}}}"],
    ):
        assert main([command, "hf", *arguments, *named]) == 2
        error = capsys.readouterr().err
        assert asked in error and "tokenizer" not in error and error.count("\n") == 1


def test_a_tokenizer_is_named_by_its_kind():
    assert names_tokenizer(["run.precision=bf16", "data.tokenizer.kind=byte"])
    assert names_tokenizer(["data.tokenizer={kind: gpt2_bpe, path: x}"])
    assert not names_tokenizer(["data.tokenizer.path=x"])  # of the kind that the folder's own has
    assert not names_tokenizer(["data.tokenizer={path: x}", "run.precision=bf16"])
    with pytest.raises(ConfigError, match=r'cannot read "data\.tokenizer" in the'):
        names_tokenizer(["data.tokenizer"])


def test_a_tokenizer_of_few_ids_is_noted_by_every_command(tmp_path, monkeypatch, capsys):
    (note,) = notes_of_tokenizer(ByteTokenizer(), 800)
    assert notes_of_tokenizer(ByteTokenizer(), 520) == []
    monkeypatch.chdir(tmp_path)
    write_model(Path("hf"), vocab_size=800)
    Path("task.yaml").write_text(TASK)
    for arguments in (["generate", "hf", "--prompt", "a word " * 90], ["prime", "hf", "--task", "task.yaml"]):
        assert main([*arguments, "data.tokenizer.kind=byte"]) == 2
        assert capsys.readouterr().err.startswith(f"megamoe: note: {note}\nmegamoe: error: ")
    assert note == (
        "the tokenizer (data.tokenizer.kind byte) has 260 ids, the model 800: if it is not the model's own, results "
        "mean nothing"
    )


def test_a_place_that_cannot_hold_the_import_is_named(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "hf")
    with pytest.raises(OutputError) as caught, model_checkpoint(folder, scratch=tmp_path / "none"):
        pass
    assert str(caught.value) == (
        f"the model cannot be imported into {tmp_path}/none (No such file or directory): name a folder that is there, "
        "can be written and has room for it"
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(OutputError, match=r"into the folder for temporary files \(TMPDIR\) \(No such file"):
        model_checkpoint(folder).__enter__()


def imports(folder: Path, scratch: Path, **variables: str) -> "subprocess.Popen[str]":
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)} | variables
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip()
    return process


def test_sigterm_leaves_no_imported_model_behind(tmp_path):
    folder, scratch = write_model(tmp_path / "hf"), tmp_path / "scratch"
    scratch.mkdir()
    process = imports(folder, scratch)
    assert [path.name.startswith("megamoe-imported-") for path in scratch.iterdir()] == [True]
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert list(scratch.iterdir()) == []
    # What a launcher does with its rank, one rank also, is the launcher's to say.
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    process = imports(folder, scratch, **world, MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    process.terminate()
    assert process.wait(30) == -signal.SIGTERM


def test_who_heeds_sigterm_goes_on_to_do_so(tmp_path):
    folder = write_model(tmp_path / "hf")
    before = signal.getsignal(signal.SIGTERM)
    try:
        for theirs in (signal.SIG_IGN, lambda number, frame: None):
            signal.signal(signal.SIGTERM, theirs)
            with model_checkpoint(folder, keeps_tokenizer=False):
                assert signal.getsignal(signal.SIGTERM) is theirs
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with pytest.raises(ConversionError), model_checkpoint(folder):
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        found = []

        def elsewhere() -> None:  # Python lets only the main thread set handlers
            with model_checkpoint(folder, keeps_tokenizer=False):
                found.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(60)
        assert found == [signal.SIG_DFL]
    finally:
        signal.signal(signal.SIGTERM, before)
