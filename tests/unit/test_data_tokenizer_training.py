"""Training a sentencepiece model: same bytes every time, bounded samples, errors that say what to change."""

import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.config.schema import TokenizerConfig
from megamoe.data.tokenizer_training import TrainingSettings, _parts, sample_lines, train_tokenizer
from megamoe.data.tokenizers import build_tokenizer
from megamoe.errors import DataError

TOOLS = Path(__file__).parents[2] / "tools"
WORDS = ["river", "stone", "under", "light", "wander", "golden", "morning", "whisper", "thunder", "meadow"]


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    lines = [" ".join(WORDS[(3 * i + j * j) % 10] for j in range(9)) + f" {i * i}" for i in range(300)]
    path.write_text("\n".join(lines) + "\n\n" + "x" * 5000 + "\n")
    return path


def settings_for(corpus: Path, name: str, **changes) -> TrainingSettings:
    return TrainingSettings((str(corpus),), str(corpus.parent / name), **{"vocab_size": 290} | changes)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_bytes_twice_and_from_jsonl(corpus, model_type):
    as_jsonl = corpus.parent / "text.jsonl"
    as_jsonl.write_text(json.dumps({"text": corpus.read_text()}) + "\n")
    for name, source in (("a", corpus), ("b", corpus), ("c", as_jsonl)):
        assert train_tokenizer(settings_for(source, name, model_type=model_type), io.StringIO()) is True
    models = [(corpus.parent / f"{name}.model").read_bytes() for name in "abc"]
    assert models[0] == models[1] == models[2]
    assert build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(corpus.parent / "a.model"))).vocab_size == 290


def test_special_tokens_stay_whole(corpus):
    train_tokenizer(settings_for(corpus, "a", special_tokens=("<|user|>",)), io.StringIO())
    tokenizer = build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(corpus.parent / "a.model")))
    ids = tokenizer.encode("river<|user|>stone")
    assert ids.count(4) == 1
    assert tokenizer.decode(ids) == "river<|user|>stone"


def test_a_second_run_does_nothing(corpus):
    settings = settings_for(corpus, "a")
    train_tokenizer(settings, io.StringIO())
    log = io.StringIO()
    assert train_tokenizer(settings, log) is False
    assert log.getvalue() == f"{settings.output}.model is complete and was made from the same inputs: nothing to do\n"
    with pytest.raises(DataError) as caught:
        train_tokenizer(settings_for(corpus, "a", vocab_size=291), io.StringIO())
    assert str(caught.value) == (
        f"{settings.output}.model exists and was made from something else (vocab_size differs): "
        f"add --overwrite to replace it, or choose another --output"
    )
    assert train_tokenizer(settings_for(corpus, "a", vocab_size=291, overwrite=True), io.StringIO()) is True


def test_samples_are_bounded_uniform_and_repeatable():
    lines = [b"%05d" % number for number in range(10_000)]
    sample, num_lines, num_bytes = sample_lines(iter(lines), budget_bytes=5000, seed=1)
    assert (len(sample), num_lines, num_bytes) == (1000, 10_000, 50_000)
    assert sample == sorted(sample)
    assert sample == sample_lines(iter(lines), budget_bytes=5000, seed=1)[0]
    assert sample != sample_lines(iter(lines), budget_bytes=5000, seed=2)[0]
    first_half = sum(line < b"05000" for line in sample)
    assert 430 < first_half < 570  # 4.5 standard deviations
    assert sample_lines(iter(lines), budget_bytes=10**9, seed=1)[0] == lines


def test_long_lines_are_cut_and_nothing_is_lost():
    line = "word " * 3000 + "x" * 2500
    parts = list(_parts(line))
    assert max(map(len, parts)) <= 1000
    assert "".join(parts).replace(" ", "") == line.replace(" ", "")


def test_settings_that_cannot_work(corpus):
    def error_of(**changes) -> str:
        with pytest.raises(DataError) as caught:
            train_tokenizer(settings_for(corpus, "a", **changes), io.StringIO())
        return str(caught.value)

    assert error_of(vocab_size=260) == (
        "--vocab-size 260 is too small: 4 special tokens, 256 bytes and 0 tokens of yours need 261 or more"
    )
    too_large = error_of(vocab_size=5000)
    assert too_large.startswith("--vocab-size 5000 is too large for this text: use ")
    assert too_large.endswith(" or less, or bring more text")
    assert error_of(vocab_size=262).startswith("sentencepiece cannot train --vocab-size 262 on this text: Vocabulary")
    assert error_of(character_coverage=0.5) == "--character-coverage 0.5 is not between 0.98 and 1"
    assert error_of(special_tokens=("</s>",)) == (
        "--special-token '</s>' is empty, given twice, or one of <s>, <pad>, </s>, <unk>"
    )
    assert error_of(sample_bytes=0) == "--sample-megabytes must be above 0"
    corpus.write_text("\n")
    assert error_of() == f"the inputs hold no text: {corpus}"
    assert not list(corpus.parent.glob("a.*"))


def test_command(corpus):
    prefix = corpus.parent / "m"
    command = [sys.executable, str(TOOLS / "train_tokenizer.py"), str(corpus), "--output", str(prefix)]
    done = subprocess.run([*command, "--vocab-size", "290"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{prefix}.model: 290 pieces in " in done.stderr
    failed = subprocess.run([*command, "--vocab-size", "9"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: --vocab-size 9 is too small: ")


@pytest.mark.parametrize("tool", ["train_tokenizer.py", "preprocess_data.py", "make_quickstart_corpus.py"])
def test_help_is_quick(tool):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(TOOLS / tool), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "--output" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, about 0.07 s here: other load on the machine does not count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_tools_do_not_import_torch():
    code = (
        "import sys; import megamoe.data.preprocess, megamoe.data.tokenizer_training, megamoe.data.datasets, "
        "megamoe.data.batches; assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=TOOLS.parent)
