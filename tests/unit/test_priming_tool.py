"""The two small tasks made from a text: the same from the same text, with examples that are what they say."""

import json
import random
import subprocess
import sys
from pathlib import Path

from megamoe.priming.examples import load_examples, load_pool
from megamoe.priming.tasks import load_task

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "launch_scripts" / "quickstart_corpus" / "king_james_bible.txt"


def made(folder: Path) -> dict[str, bytes]:
    tool = ROOT / "tools" / "make_priming_tasks.py"
    subprocess.run([sys.executable, tool, "--output", folder, "--examples", "30"], check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_tasks_are_true_and_made_alike(tmp_path):
    first = made(tmp_path / "first")
    random.random()
    assert first == made(tmp_path / "second") and len(first) == 6
    text = " ".join(CORPUS.read_text(encoding="utf-8").split())
    documents = CORPUS.read_text(encoding="utf-8").split("\n\n")
    held_out = " ".join(" ".join(documents[-(len(documents) // 50) :]).split())
    for name in ("continuation", "cloze"):
        task, folder = load_task(str(tmp_path / "first" / f"{name}.yaml"))
        examples, pool = load_examples(task, folder), load_pool(task, folder)
        assert len(examples) == 30 and len(pool) == 500
        for example in examples:
            assert example.shot in held_out and len(set(example.choices)) == 4
        assert sum(other in text for e in examples for other in set(e.texts) - {e.shot}) == 0, "only one is the text's"
        assert {min(example.correct) for example in examples} == {0, 1, 2, 3}
    lines = [json.loads(line) for line in first["continuation_test.jsonl"].splitlines()]
    assert all(len({len(ending.split()) for ending in line["endings"]}) == 1 for line in lines)
