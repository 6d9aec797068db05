"""Our tasks for EleutherAI's lm-evaluation-harness: prompts as we make them, so that both score the same tokens.

lm_eval is given two texts, context and continuation. It moves white space at the context's end to the continuation,
encodes both together, and scores what is longer than the context alone. No torch.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megamoe.config.schema import Config
from megamoe.errors import ConfigError, DataError, OutputError
from megamoe.priming.encoding import Encoder, Prompt
from megamoe.priming.examples import Example
from megamoe.priming.prompts import Prompter
from megamoe.priming.settings import LocatedTask, PrimingSettings
from megamoe.priming.tasks import Task

MEAN_MODULE = "mean_after_prefix"
_MEAN_CODE = '''"""The mean log-probability over a choice's tokens, as lm_eval is to judge by it."""


def process_results(doc, results):
    sums = [each[0] if isinstance(each, (tuple, list)) else each for each in results]
    scores = [total / count for total, count in zip(sums, doc["num_scored_tokens"])]
    return {"acc": float(scores.index(max(scores)) in doc["correct"])}
'''
_README = """Tasks for lm_eval, made by megamoe. Export the model with `megamoe convert to-hf`, then, in this folder:

for task in {tasks}; do
    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 lm_eval --model hf \\
        --model_args pretrained=FOLDER,dtype=float32,trust_remote_code=True{bos} \\
        --include_path . --tasks "$task" --output_path out --log_samples
done

One task at a time: lm_eval 0.4.13 takes requests whose context and continuation together are the same text for one,
also where they are divided differently.
"""


def write_lm_eval_tasks(settings: PrimingSettings, config: Config, folder: Path) -> list[str]:
    """Write NAME.yaml and NAME.jsonl for each task, number of shots and draw; the names.

    Raises ConfigError for what lm_eval cannot express, DataError naming an example that it would cut into other tokens,
    OutputError where the folder is there or cannot be made.
    """
    starts = {each.task.document_start for each in settings.tasks}
    if len(starts) > 1:
        raise ConfigError("some of the tasks start with a document's end and some do not: write them to two folders")
    files: dict[str, str] = {}
    names = []
    for located in settings.tasks:
        for name, tree, docs in _written(located, settings, config):
            names.append(name)
            files[f"{name}.yaml"] = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
            files[f"{name}.jsonl"] = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
            if located.task.score == "mean_after_prefix":
                files[f"{name}.yaml"] += f"process_results: !function {MEAN_MODULE}.process_results\n"
                files[f"{MEAN_MODULE}.py"] = _MEAN_CODE
    files["README.txt"] = _README.format(bos=",add_bos_token=True" if True in starts else "", tasks=" ".join(names))
    try:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except FileExistsError:
        raise OutputError(f"{folder} is there already: name a new folder") from None
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None
    return names


def _written(
    located: LocatedTask, settings: PrimingSettings, config: Config
) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    task = located.task
    if task.score == "sum_minus_unconditional":
        raise ConfigError(f"task {task.name}: lm_eval has no score against the choice after an unconditional text")
    examples, pool = settings.load(located)
    prompter = Prompter(settings, task, config, pool)
    found = []
    for num_shots in settings.shots:
        for draw in range(settings.num_draws if num_shots else 1):
            name = f"{task.name}_{num_shots}shot" + (f"_draw{draw}" if num_shots else "")
            docs = []
            for number, example in enumerate(examples):
                shots = prompter.shots(example, number, num_shots, draw)
                prompt = prompter.prompt(example, shots)
                docs.append(_doc(task, prompter.encoder, example, prompt, shots[prompt.num_dropped_shots :]))
            if any(len(doc["correct"]) > 1 for doc in docs):
                for doc in docs:
                    doc["label"] = doc["correct"]
            found.append((name, _tree(name, task), docs))
    return found


def _tree(name: str, task: Task) -> dict[str, Any]:
    suffix = task.score == "sum_of_suffix"
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        # A whole number as the text tells lm_eval that the choices are contexts of one continuation.
        "doc_to_text": "label" if suffix else "context",
        "doc_to_choice": "contexts" if suffix else "continuations",
        "doc_to_target": "continuation" if suffix else "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _doc(task: Task, encoder: Encoder, example: Example, prompt: Prompt, shots: Sequence[str]) -> dict[str, Any]:
    texts = ["\n".join([*shots, text]) for text in example.texts]
    if encoder.newlines == "end_of_document" and any("\n" in text for text in texts):
        raise ConfigError(
            f"{example.where}: lm_eval cannot encode a newline as the end of a document; write this task with "
            "--newlines as_is, or without shots where its texts have no newlines"
        )
    doc: dict[str, Any] = {
        "label": min(example.correct),
        "correct": sorted(example.correct),
        "num_scored_tokens": [text.num_scored for text in prompt.texts],
    }
    starts = [text.start for text in prompt.texts]
    if task.score == "sum_of_suffix":
        for length in range(1, _common([text[::-1] for text in texts]) + 1):
            if all(_splits(encoder, text[:-length], start) for text, start in zip(texts, starts, strict=True)):
                return doc | {"contexts": [text[:-length] for text in texts], "continuation": texts[0][-length:]}
    else:
        for length in range(_common(texts), 0, -1):
            if _splits(encoder, texts[0][:length], starts[0]):
                return doc | {"context": texts[0][:length], "continuations": [text[length:] for text in texts]}
    raise DataError(
        f"{example.where}: lm_eval would score other tokens of it; leave it out, or use score: sum_of_choice"
    )


def _splits(encoder: Encoder, context: str, start: int) -> bool:
    """Whether the tokens of a context are all before `start`, as lm_eval counts them."""
    shown = context.rstrip()
    return bool(shown) and len(encoder.ids(shown)) == start


def _common(texts: Sequence[str]) -> int:
    shortest = min(map(len, texts))
    return next((i for i in range(shortest) if any(text[i] != texts[0][i] for text in texts)), shortest)
