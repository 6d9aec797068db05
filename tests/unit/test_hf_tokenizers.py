"""Tokenizers in Hugging Face folders: AutoTokenizer gives megamoe's ids, or the conversion is refused."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from megamoe.config.schema import TokenizerConfig
from megamoe.convert import hf_tokenizers
from megamoe.convert.hf_tokenizer_import import import_tokenizer
from megamoe.convert.hf_tokenizers import PROBES, TokenizerExport, export_tokenizer, prove
from megamoe.convert.sentencepiece_json import read_model
from megamoe.data.tokenizers import build_tokenizer
from megamoe.errors import ConversionError

ROOT = Path(__file__).parents[2]
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TRAINED = IDENTITY | {"split_digits": True, "allow_whitespace_only_pieces": True}  # as tools/train_tokenizer.py does
# name -> algorithm and settings of a sentencepiece model
MODELS = {
    "bpe": ("bpe", TRAINED),
    "bpe_nmt_nfkc": ("bpe", {}),
    "bpe_nfkc_cf": ("bpe", {"normalization_rule_name": "nfkc_cf", "byte_fallback": False}),
    "bpe_no_prefix": ("bpe", IDENTITY | {"add_dummy_prefix": False}),
    "bpe_symbols": ("bpe", TRAINED | {"user_defined_symbols": ["<eod>", "<|x.*|>"]}),
    "unigram": ("unigram", {}),
    "unigram_identity": ("unigram", TRAINED | {"byte_fallback": False}),
    "unigram_all_characters": ("unigram", TRAINED | {"byte_fallback": False, "character_coverage": 1.0}),
    "unigram_symbols": ("unigram", TRAINED | {"user_defined_symbols": ["<eod>"]}),
}
KINDS = [*MODELS, "gpt2_bpe", "byte"]


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Lines of prose, tables and code, kept in a file of their own, and made ones of rare characters."""
    real = (Path(__file__).parent / "tokenizer_lines.txt").read_text(encoding="utf-8").splitlines()
    made = [
        f"{chr(0x370 + i)}{chr(0x4E00 + 37 * i)} {chr(0x1F600 + i)}, x{i}\u00b2 e\u0301{chr(0x100 + i)}\t."
        for i in range(60)
    ]
    return real + made


def decided(lines: list[str], kind: str) -> list[str]:
    """Lines that a model of this kind cuts in one way only.

    In a run of spaces a unigram model finds several cuts of equal score. Which one it takes hangs on the rounding of
    sums, and sentencepiece's are of other precision than the library's: such lines are refused.
    """
    return [line for line in lines if "   " not in line] if kind.startswith("unigram") else lines


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, lines) -> dict[str, TokenizerConfig]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "text.txt").write_text("\n".join(lines))
    configs = {"byte": TokenizerConfig(kind="byte")}
    for name, (algorithm, settings) in MODELS.items():
        train_sentencepiece(folder, name, algorithm, settings)
        configs[name] = TokenizerConfig(kind="sentencepiece", path=str(folder / f"{name}.model"))
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(folder / "text.txt")], vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "gpt2").mkdir()
    bpe.save_model(str(folder / "gpt2"))
    return configs | {"gpt2_bpe": TokenizerConfig(kind="gpt2_bpe", path=str(folder / "gpt2"))}


def train_sentencepiece(folder: Path, name: str, algorithm: str, settings: dict) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / name), vocab_size=700, model_type=algorithm,
        minloglevel=2, **{"byte_fallback": True, "pad_id": 1, "bos_id": 0, "eos_id": 2, "unk_id": 3, "num_threads": 1,
                          "hard_vocab_limit": False, "character_coverage": 0.98} | settings,
    )  # fmt: skip


def export(config: TokenizerConfig, folder: Path, lines: list[str]) -> TokenizerExport:
    made = export_tokenizer(config, model_rows=1024, max_length=64, texts=lines)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.files.items():
        (folder / name).write_bytes(content)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_gives_the_same_ids(tokenizers, tmp_path, lines, kind):
    lines = decided(lines, kind)
    ours, made = build_tokenizer(tokenizers[kind]), export(tokenizers[kind], tmp_path, lines)
    assert made.num_compared_texts >= len(lines) + len(PROBES)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*PROBES, *lines]
    if not kind.startswith("unigram"):  # two paths of equal score: the libraries' roundings decide
        texts += [a + "\n" + b for a, b in itertools.pairwise(lines)]
    ids = ours.encode_batch(texts)
    assert theirs(texts)["input_ids"] == ids
    assert [theirs.encode(text) for text in texts[:50]] == ids[:50]
    unknown = theirs.unk_token_id
    for text, own in zip(texts, ids, strict=True):
        if unknown is None or unknown not in own:
            assert theirs.decode([*own, theirs.eos_token_id], skip_special_tokens=True) == ours.decode(own), text
    theirs.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(texts)["input_ids"] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_are_carried(tokenizers, tmp_path, kind):
    made, ours = export(tokenizers[kind], tmp_path, []), build_tokenizer(tokenizers[kind])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    pad = ours.end_of_document_id if kind == "gpt2_bpe" else 1
    assert made.special.settings() == {
        "bos_token_id": ours.end_of_document_id, "eos_token_id": ours.end_of_document_id, "pad_token_id": pad,
    }  # fmt: skip
    assert {f"{role}_id": getattr(theirs, f"{role}_id") for role in ("bos_token", "eos_token", "pad_token")} == (
        made.special.settings()
    )
    assert len(theirs) == ours.vocab_size and theirs.model_max_length == 64 and theirs.padding_side == "left"
    batch = theirs(["a", "a b c"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == pad


@pytest.mark.parametrize("kind", KINDS)
def test_and_back(tokenizers, tmp_path, lines, kind):
    lines = decided(lines, kind)
    export(tokenizers[kind], tmp_path / "theirs", lines)
    config = import_tokenizer(tmp_path / "theirs", tmp_path / "ours", texts=lines)
    assert config.kind == tokenizers[kind].kind
    original, again = build_tokenizer(tokenizers[kind]), build_tokenizer(config)
    assert again.encode_batch(lines) == original.encode_batch(lines)
    assert again.end_of_document_id == original.end_of_document_id
    if kind == "gpt2_bpe":  # also from the two files alone, and from tokenizer.json alone
        for kept in (("vocab.json", "merges.txt"), ("tokenizer.json",)):
            some = tmp_path / kept[0]
            some.mkdir()
            for name in kept:
                (some / name).write_bytes((tmp_path / "theirs" / name).read_bytes())
            config = import_tokenizer(some, tmp_path / f"from_{kept[0]}")
            assert build_tokenizer(config).encode_batch(lines) == original.encode_batch(lines)


def test_ids_that_differ_are_refused_with_the_line(tokenizers, monkeypatch, lines):
    """A conversion that goes wrong: the order of the merges, and a normaliser that is forgotten."""
    make = hf_tokenizers.tokenizer_json

    def reversed_merges(model):
        tree = json.loads(make(model))
        tree["model"]["merges"].reverse()
        return json.dumps(tree)

    def no_normalizer(model):
        return json.dumps(json.loads(make(model)) | {"normalizer": None})

    for wrong in (reversed_merges, no_normalizer):
        monkeypatch.setattr(hf_tokenizers, "tokenizer_json", wrong)
        with pytest.raises(ConversionError, match=r"the text 'In the beginning .* has other ids .* from token \d+ on"):
            export_tokenizer(tokenizers["bpe"], model_rows=1024, max_length=64)
    monkeypatch.setattr(hf_tokenizers, "tokenizer_json", make)
    assert export_tokenizer(tokenizers["bpe"], model_rows=1024, max_length=64).num_compared_texts >= len(PROBES)


def test_given_texts_are_compared_too(tokenizers, lines):
    """A text of one symbol alone is where the two libraries part."""
    with pytest.raises(ConversionError, match="the text '<eod>' has other ids"):
        export_tokenizer(tokenizers["bpe_symbols"], model_rows=1024, max_length=64, texts=[*lines, "<eod>"])


def test_texts_that_decode_differently_are_refused(tokenizers):
    made = export_tokenizer(tokenizers["bpe"], model_rows=1024, max_length=64)
    tree = json.loads(made.files["tokenizer.json"])
    tree["decoder"]["decoders"].pop()
    with pytest.raises(ConversionError, match=r"decodes to 'In the .* and to ' In the"):
        prove(build_tokenizer(tokenizers["bpe"]), json.dumps(tree), PROBES)


def test_a_model_with_too_few_rows_is_refused():
    with pytest.raises(ConversionError, match="the tokenizer has 260 ids, but the model 256 rows"):
        export_tokenizer(TokenizerConfig(kind="byte"), model_rows=256, max_length=64)


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        ("char", {}, "of the kind char: only bpe and unigram"),
        ("bpe", {"treat_whitespace_as_suffix": True}, "treats spaces as suffixes"),
    ],
)
def test_models_without_an_equal_are_refused(tmp_path, lines, algorithm, settings, message):
    (tmp_path / "text.txt").write_text("\n".join(lines))
    train_sentencepiece(tmp_path, "m", algorithm, settings)
    with pytest.raises(ConversionError, match=message):
        export_tokenizer(
            TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "m.model")), model_rows=4096, max_length=64
        )


def test_the_model_file_is_read_as_sentencepiece_reads_it(tokenizers):
    """Against the library's own reader: pieces, scores, kinds and special ids."""
    for name in MODELS:
        path = tokenizers[name].path
        library, model = sentencepiece.SentencePieceProcessor(model_file=path), read_model(Path(path).read_bytes())
        assert [piece.text for piece in model.pieces] == [library.id_to_piece(i) for i in range(library.vocab_size())]
        assert [piece.score for piece in model.pieces] == [library.get_score(i) for i in range(library.vocab_size())]
        assert [piece.kind == 3 for piece in model.pieces] == [library.is_control(i) for i in range(len(model.pieces))]
        assert model.ids == {"unk": 3, "bos": 0, "eos": 2, "pad": 1}
    with pytest.raises(ConversionError, match="damaged"):
        read_model(Path(tokenizers["bpe"].path).read_bytes()[:-3])


def refused(tmp_path: Path, message: str, **changes) -> None:
    """Import of an exported GPT-2 tokenizer with changes to its tokenizer.json must fail with `message`."""
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    folder = tmp_path / "changed"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tree | changes))
    with pytest.raises(ConversionError, match=message):
        import_tokenizer(folder, tmp_path / "out")


def test_what_cannot_be_imported_is_refused(tokenizers, tmp_path, lines):
    with pytest.raises(ConversionError, match="holds no tokenizer that megamoe reads"):
        import_tokenizer(tmp_path, tmp_path / "out")
    export(tokenizers["gpt2_bpe"], tmp_path, [])
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    refused(tmp_path, "changes texts by NFC", normalizer={"type": "NFC"})
    refused(tmp_path, "splits texts by ByteLevel", pre_tokenizer=tree["pre_tokenizer"] | {"add_prefix_space": True})
    refused(tmp_path, "splits texts by None", pre_tokenizer=None)
    refused(tmp_path, "of the kind WordLevel", model={"type": "WordLevel", "vocab": {}, "unk_token": "x"})
    refused(tmp_path, "BPE with byte fallback", model=tree["model"] | {"byte_fallback": True})
    word = tree["added_tokens"][0] | {"content": "hello", "special": False, "id": 600}
    refused(tmp_path, "looks for the added token 'hello'", added_tokens=[*tree["added_tokens"], word])
    vocabulary = {("<end>" if key == "<|endoftext|>" else key): i for key, i in tree["model"]["vocab"].items()}
    refused(tmp_path, r"has no <\|endoftext\|>", model=tree["model"] | {"vocab": vocabulary}, added_tokens=[])
    other = tmp_path / "other"
    other.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (other / name).write_bytes((tmp_path / name).read_bytes())
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(ConversionError, match="Qwen2Tokenizer, which splits texts in another way"):
        import_tokenizer(other, tmp_path / "out")


def test_a_tokenizer_json_that_disagrees_with_its_model_is_refused(tokenizers, tmp_path):
    export(tokenizers["bpe"], tmp_path, [])
    wrong = Path(tokenizers["bpe_nmt_nfkc"].path).read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(wrong)
    with pytest.raises(ConversionError, match=r"has other ids by tokenizer.json than by megamoe's"):
        import_tokenizer(tmp_path, tmp_path / "out")


def test_nothing_here_needs_torch():
    program = "import sys, megamoe.convert.hf_tokenizer_import, tokenizers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=ROOT)
