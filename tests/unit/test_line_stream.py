"""Streams of JSON lines: against reading the whole file, whatever the blocks cut."""

import json

import pytest

from megamoe.runs import line_stream
from megamoe.runs.line_stream import json_lines, last_json_lines


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1 << 20])
def test_blocks_cut_lines_anywhere(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(line_stream, "_BLOCK_BYTES", block_bytes)
    lines = [{"step": step, "text": "é" * step} for step in range(40)]
    junk = ["", "[]", "{", "null", '{"a": NaN}']
    text = "\n".join(json.dumps(line) + "\n" + junk[place % 5] for place, line in enumerate(lines))
    path = tmp_path / "lines.jsonl"
    path.write_text(text)
    assert list(json_lines(path)) == lines
    path.write_text(text + "\n" + json.dumps({"step": 41}))
    assert list(json_lines(path))[-1] == {"step": 41}, "the last line needs no end"


@pytest.mark.parametrize("block_bytes", [8, 64, 1 << 20])
def test_a_line_without_end_takes_no_memory_and_no_other_along(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(line_stream, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(line_stream, "MAX_LINE_BYTES", 128)
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"b": "' + "x" * 1000 + '"}\n{"c": 3}\n')
    found = [line for line in json_lines(path) if "b" not in line]
    assert found == [{"a": 1}, {"c": 3}]
    assert ("b" in str(list(json_lines(path)))) == (block_bytes > 1000), "only what came in one block is known whole"


def test_the_end_of_a_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(100)))
    assert last_json_lines(path, 40) == [{"step": 97}, {"step": 98}, {"step": 99}]
    assert len(last_json_lines(path, 1 << 20)) == 100
    assert last_json_lines(tmp_path / "none", 10) == [] == list(json_lines(tmp_path / "none"))
