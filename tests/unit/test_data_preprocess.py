"""Text to dataset: kinds of input, the two rules, workers, repeated runs, and errors that name file and line."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megamoe.config.schema import TokenizerConfig
from megamoe.data import preprocess as module
from megamoe.data import readers
from megamoe.data.indexed import IndexedDataset
from megamoe.data.manifest import read_manifest
from megamoe.data.preprocess import PreprocessSettings, preprocess
from megamoe.data.readers import find_sources
from megamoe.errors import DataError

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
BYTE = TokenizerConfig(kind="byte")
DOCUMENTS = ["First line.\nSecond, with é.", "Another document.", "  Third\n\tone  "]
TXT = "\n\n".join(DOCUMENTS) + "\n"
JSONL = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(DOCUMENTS))
END = 2


def ids(text: str) -> list[int]:
    return [byte + 4 for byte in text.encode()]


def run(tmp_path: Path, *inputs: Path | str, **changes) -> list[list[int]]:
    """Preprocess into tmp_path/out; the documents as lists of ids."""
    settings = {"tokenizer": BYTE, "overwrite": True, **changes}
    preprocess(PreprocessSettings(tuple(map(str, inputs)), str(tmp_path / "out"), **settings), io.StringIO())
    dataset = IndexedDataset(tmp_path / "out")
    return [dataset.document(number).tolist() for number in range(dataset.num_documents)]


def packed(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":  # two frames: files written in pieces, or joined by cat, have several
        compressor = zstandard.ZstdCompressor()
        content = compressor.compress(content[:9]) + compressor.compress(content[9:])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_every_kind_of_input_gives_the_same_documents(tmp_path, name):
    path = packed(tmp_path / name, (JSONL if "jsonl" in name else TXT).encode())
    assert run(tmp_path, path) == [[*ids(text), END] for text in DOCUMENTS]


def test_paper_rules(tmp_path):
    path = packed(tmp_path / "a.txt", b"One.\nTwo.\n\nThree.\n")
    assert run(tmp_path, path, rules="paper") == [
        [*ids("One."), END, *ids("Two."), END, END],
        [*ids("Three."), END, END],
    ]
    # Blank lines inside a document are dropped: two ends in a row always mean that a document ends.
    inside = packed(tmp_path / "b.jsonl", json.dumps({"text": "One.\n\n\nTwo.\n"}).encode())
    assert run(tmp_path, inside, rules="paper") == [[*ids("One."), END, *ids("Two."), END, END]]


def test_document_rules_keep_text_as_it_is(tmp_path):
    text = "\n One.\n\n\nTwo. \n"
    path = packed(tmp_path / "a.jsonl", json.dumps({"text": text}).encode())
    assert run(tmp_path, path) == [[*ids(text), END]]


def test_txt_documents(tmp_path):
    path = packed(tmp_path / "a.txt", b"\xef\xbb\xbfOne.\r\nTwo.\r\n \r\n\r\n\r\nThree.\r\n\r\n")
    assert run(tmp_path, path) == [[*ids("One.\nTwo."), END], [*ids("Three."), END]]
    assert run(tmp_path, path, txt_documents="file") == [[*ids("One.\nTwo.\n \n\n\nThree."), END]]


def test_documents_without_text_are_left_out(tmp_path):
    lines = ['{"text": ""}', "", '{"text": " \\n"}', '{"text": "x"}']
    path = packed(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert run(tmp_path, path) == [[*ids("x"), END]]
    assert run(tmp_path, path, rules="paper") == [[*ids("x"), END, END]]


def test_other_key(tmp_path):
    path = packed(tmp_path / "a.jsonl", b'{"body": "x"}\n')
    assert run(tmp_path, path, json_key="body") == [[*ids("x"), END]]


def test_globs_are_sorted_and_files_follow_each_other(tmp_path):
    for name in ("b2.txt", "b1.txt", "c.txt"):
        packed(tmp_path / name, name.encode())
    found = find_sources([str(tmp_path / "c.txt"), str(tmp_path / "b*.txt")])
    assert [Path(source.path).name for source in found] == ["c.txt", "b1.txt", "b2.txt"]
    documents = run(tmp_path, tmp_path / "c.txt", tmp_path / "b*.txt")
    assert documents == [[*ids(name), END] for name in ("c.txt", "b1.txt", "b2.txt")]


def many_documents(tmp_path: Path) -> list[Path]:
    texts = [f"Document {number}.\n" + "word " * (number % 37) + "é" * (number % 5) for number in range(400)]
    return [
        packed(tmp_path / "a.txt.gz", "\n\n".join(texts).encode()),
        packed(tmp_path / "b.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()),
    ]


@pytest.mark.parametrize("rules", ["document", "paper"])
def test_same_bytes_for_one_and_four_workers(tmp_path, monkeypatch, rules):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)  # about 90 chunks
    inputs = many_documents(tmp_path)
    outputs = []
    for num_workers in (1, 4):
        assert len(run(tmp_path, *inputs, rules=rules, num_workers=num_workers)) == 800
        outputs.append([(tmp_path / f"out.{ending}").read_bytes() for ending in ("bin", "idx", "json")])
    assert outputs[0] == outputs[1]


def test_first_error_in_order_is_reported_with_workers_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    lines = [json.dumps({"text": f"line {number}"}) for number in range(1, 200)]
    lines[119] = lines[149] = "{"
    path = packed(tmp_path / "a.jsonl", "\n".join(lines).encode())
    for num_workers in (1, 2):
        with pytest.raises(DataError, match=r"a\.jsonl, line 120: no valid JSON"):
            run(tmp_path, path, num_workers=num_workers)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_manifest(tmp_path):
    content = TXT.encode()
    path = packed(tmp_path / "a.txt", content)
    run(tmp_path, path, rules="paper")
    assert read_manifest(tmp_path / "out") == {
        "format_version": 1,
        "tokenizer": {"kind": "byte", "vocab_size": 260, "sha256": None, "end_of_document_id": 2},
        "rules": "paper",
        "json_key": "text",
        "txt_documents": "blank_line",
        "sources": [{"path": str(path), "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}],
        "num_documents": 3,
        "num_tokens": sum(len(ids(text.replace("\n", ""))) + text.count("\n") + 2 for text in DOCUMENTS),
        "dtype": "uint16",
    }


def test_a_second_run_does_nothing_and_other_inputs_are_refused(tmp_path):
    path = packed(tmp_path / "a.txt", TXT.encode())
    prefix = str(tmp_path / "out")

    def again(**changes) -> tuple[bool, str]:
        log = io.StringIO()
        settings = {"inputs": (str(path),), "output": prefix, "tokenizer": BYTE, **changes}
        return preprocess(PreprocessSettings(**settings), log), log.getvalue()

    assert again()[0] is True
    written = (tmp_path / "out.idx").stat().st_mtime_ns
    done = (False, f"{prefix}.bin is complete and was made from the same inputs: nothing to do\n")
    assert again() == again(num_workers=2) == done
    assert (tmp_path / "out.idx").stat().st_mtime_ns == written

    def refusal(difference: str) -> str:
        return (
            f"{prefix}.bin exists and was made from something else ({difference}): "
            f"add --overwrite to replace it, or choose another --output"
        )

    with pytest.raises(DataError) as caught:
        again(rules="paper")
    assert str(caught.value) == refusal("rules differ")
    assert again(rules="paper", overwrite=True)[0] is True
    path.write_text(TXT + "\nMore.\n")
    with pytest.raises(DataError) as caught:
        again(rules="paper")
    assert str(caught.value) == refusal("sources differ")
    (tmp_path / "out.json").unlink()
    with pytest.raises(DataError) as caught:
        again()
    assert str(caught.value) == refusal("nothing says how it was made")


@pytest.mark.parametrize(("hashed_bytes", "same"), [(1 << 20, True), (10, False)])
def test_a_file_touched_but_unchanged(tmp_path, monkeypatch, hashed_bytes, same):
    monkeypatch.setattr(readers, "HASHED_FILE_BYTES", hashed_bytes)
    path = packed(tmp_path / "a.txt", TXT.encode())
    settings = PreprocessSettings((str(path),), str(tmp_path / "out"), BYTE)
    preprocess(settings, io.StringIO())
    os.utime(path, (1, 1))
    if same:
        assert preprocess(settings, io.StringIO()) is False
        return
    with pytest.raises(DataError, match="sources differ"):
        preprocess(settings, io.StringIO())


def test_incomplete_and_damaged_outputs_are_written_again(tmp_path):
    path = packed(tmp_path / "a.txt", TXT.encode())
    settings = PreprocessSettings((str(path),), str(tmp_path / "out"), BYTE)
    preprocess(settings, io.StringIO())
    whole = (tmp_path / "out.bin").read_bytes()
    (tmp_path / "out.idx").unlink()
    assert preprocess(settings, io.StringIO()) is True
    (tmp_path / "out.bin").write_bytes(whole[:-2])
    log = io.StringIO()
    assert preprocess(settings, log) is True
    assert "out.bin is truncated" in log.getvalue()
    assert (tmp_path / "out.bin").read_bytes() == whole


BAD_JSON = {
    b'{"text": "x"}\n{"text": \n': "line 2: no valid JSON (Expecting value: line 1 column 10 (char 9))",
    b'{"text": "x"}\n\n["text"]\n': "line 3: a JSON list where an object is expected",
    b'{"body": "x", "id": 1}\n': "line 1: no key 'text' (keys here: body, id); name another with --json-key",
    b'{"text": 3}\n': "line 1: 'text' holds a int where text is expected",
    b'{"text": "ab\\ud800"}\n': "line 1: 'text' holds a lone surrogate at character 2",
    b'{"text": "x"}\n{"text": "\xff"}\n': "line 2, byte 11: not UTF-8 (invalid start byte)",
}


@pytest.mark.parametrize("content", BAD_JSON)
def test_bad_jsonl_names_file_and_line(tmp_path, content):
    path = packed(tmp_path / "a.jsonl", content)
    with pytest.raises(DataError) as caught:
        run(tmp_path, path)
    assert str(caught.value) == f"{path}, {BAD_JSON[content]}"


def test_bad_utf8_in_txt_names_line_and_byte(tmp_path):
    path = packed(tmp_path / "a.txt", b"One.\n\n\nTwo.\nThr\xe9e.\n")
    with pytest.raises(DataError) as caught:
        run(tmp_path, path)
    assert str(caught.value) == f"{path}, line 5, byte 4: not UTF-8 (invalid continuation byte)"


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_cut_off_and_damaged_archives(tmp_path, ending):
    lines = b"".join(b"line %d of a long file\n" % number for number in range(20_000))
    path = packed(tmp_path / f"a.txt.{ending}", lines)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"no archive at all"):
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            run(tmp_path, path)
        assert str(caught.value).startswith(f"{path}, after line ")
        assert ": cannot be read further (" in str(caught.value)
    assert not (tmp_path / "out.idx").exists()


def test_unusable_inputs(tmp_path):
    def error_of(*inputs: str, **changes) -> str:
        with pytest.raises(DataError) as caught:
            run(tmp_path, *inputs, **changes)
        return str(caught.value)

    assert error_of(f"{tmp_path}/no*.txt") == f"no input file matches {tmp_path}/no*.txt"
    other = packed(tmp_path / "a.csv", b"x")
    valid = "its name must end in .txt, .jsonl, and both with .gz or .zst"
    assert error_of(str(other)) == f"{other} is no input file: {valid}"
    assert error_of(str(tmp_path)) == f"{tmp_path} is no input file: {valid}"
    blank = packed(tmp_path / "a.txt", b"\n \n\n")
    assert error_of(str(blank)) == f"the inputs hold no text: {blank}"
    assert error_of(str(blank), num_workers=0) == "--workers 0 is not possible: use 1 or more"
    assert not list(tmp_path.glob("out*"))


def test_command(tmp_path):
    path = packed(tmp_path / "a.txt", TXT.encode())
    command = [sys.executable, str(TOOL), str(path), "--tokenizer", "byte", "--workers", "1", "--output"]
    done = subprocess.run([*command, str(tmp_path / "o")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"{tmp_path}/o.bin: 3 documents, " in done.stderr
    assert " docs/s, " in done.stderr
    path.write_bytes(b"\xff")
    failed = subprocess.run([*command, str(tmp_path / "p")], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert failed.stderr == f"error: {path}, line 1, byte 1: not UTF-8 (invalid start byte)\n"
