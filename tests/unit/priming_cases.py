"""Lines as the official releases of the paper's six tasks have them, written by hand, and where the files lie."""

import json
from pathlib import Path
from typing import Any

HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he", "split": "val", "split_type": "indomain", "label": 3,
    "endings": ["is using wrap.", "is ripping tiles.", "is holding a cube.", "starts pulling up roofing."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}  # fmt: skip
HELLASWAG_WIKIHOW = HELLASWAG | {"activity_label": "Health", "ctx_b": "", "label": 0}
PIQA = {"goal": "To open a jar,", "sol1": "turn the lid.", "sol2": "turn the jar into sand."}
RECORD = {
    "source": "Daily mail",
    "passage": {
        "text": "Ann met the Bob in Rome.\n@highlight\nAnn saw Rome",
        "entities": [
            {"start": 19, "end": 22}, {"start": 0, "end": 2}, {"start": 8, "end": 14}, {"start": 36, "end": 38},
        ],
    },
    "qas": [
        {"query": "@placeholder was met in Rome", "answers": [{"start": 8, "end": 14, "text": "the Bob"}], "idx":
         {"passage": 0, "query": 0}},
        {"query": "They were in @placeholder", "answers": [{"start": 19, "end": 22, "text": "Rome"}], "idx":
         {"passage": 0, "query": 1}},
    ],
    "idx": 0,
}  # fmt: skip
WINOGRANDE = {
    "qID": "3FCTE-1", "sentence": "Ann gave Eve the book because _ had read it.", "option1": "Ann", "option2": "Eve",
    "answer": "1",
}  # fmt: skip
STORYCLOZE = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,RandomFifthSentenceQuiz1,"
    "RandomFifthSentenceQuiz2,AnswerRightEnding\n"
    'b929,"Rick grew up, alone.",He stole.,He was caught.,He went home.,He was happy.,"He robbed ""us"".",2\n'
)
OPENBOOKQA = {
    "id": "7-980",
    "question": {
        "stem": "The sun is responsible for",
        "choices": [{"text": "puppies learning", "label": "A"}, {"text": "plants sprouting", "label": "B"}],
    },
    "answerKey": "B",
}


def write_lines(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_releases(folder: Path) -> None:
    """The files that the shipped tasks name."""
    for name in ("hellaswag_val", "hellaswag_train"):
        write_lines(folder / f"{name}.jsonl", HELLASWAG, HELLASWAG_WIKIHOW)
    for name in ("valid", "train"):
        write_lines(folder / f"piqa/{name}.jsonl", PIQA, PIQA)
        (folder / f"piqa/{name}-labels.lst").write_text("0\n1\n")
    for name in ("val", "train"):
        write_lines(folder / f"ReCoRD/{name}.jsonl", RECORD)
    for name in ("dev", "train_xl"):
        write_lines(folder / f"winogrande_1.1/{name}.jsonl", WINOGRANDE)
    (folder / "storycloze").mkdir()
    for name in ("test", "val"):
        (folder / f"storycloze/{name}.csv").write_text(STORYCLOZE, encoding="utf-8")
    for name in ("test", "train"):
        write_lines(folder / f"OpenBookQA-V1-Sep2018/Data/Main/{name}.jsonl", OPENBOOKQA)
