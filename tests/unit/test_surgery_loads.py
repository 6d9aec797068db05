"""Loads of experts, from a JSON file or from what a run has counted."""

import json

import pytest

from megamoe.errors import ConfigError
from megamoe.surgery.loads import read_loads

EXPERTS = {1: 3, 3: 2}


def test_a_run_adds_up_its_lines(tmp_path):
    lines = [
        {"step": 100, "layers": {"1": [5, 0, 1], "3": [2, 4]}},
        {"step": 200, "layers": {"1": [1, 2, 3]}},  # of another model
        {"step": 200, "layers": {"1": [1, 2, 3], "3": [1]}},
        {"step": 200, "layers": {"1": 7, "3": [1, 1]}},
        {"step": 200, "layers": {"1": [1, "x", 3], "3": [1, 1]}},
        {"step": 200, "layers": {"1": [1, 2, 3], "3": [10, 0]}},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 300, "layers": {"1": [9, 9'
    (tmp_path / "expert_loads.jsonl").write_text(text)
    for given in (tmp_path, tmp_path / "expert_loads.jsonl"):
        assert read_loads(given, EXPERTS) == {1: [6.0, 2.0, 4.0], 3: [12.0, 4.0]}


def test_a_file_of_counts(tmp_path):
    (tmp_path / "load.json").write_text('{"3": [1, 0.5], "1": [0, 0, 7]}')
    assert read_loads(tmp_path / "load.json", EXPERTS) == {1: [0.0, 0.0, 7.0], 3: [1.0, 0.5]}


def test_a_run_without_loads_is_named(tmp_path):
    with pytest.raises(ConfigError) as raised:
        read_loads(tmp_path, EXPERTS)
    assert str(raised.value) == (
        f"{tmp_path}/expert_loads.jsonl holds no loads of these layers and experts: give the run's own, or a JSON file "
        "with counts"
    )
    (tmp_path / "expert_loads.jsonl").write_text('{"step": 1, "layers": {"1": [0, 0, 0], "3": [0, 0]}}\n')
    with pytest.raises(ConfigError, match="layer 1 has no token at all: count over some text"):
        read_loads(tmp_path, EXPERTS)
