"""A rank's side of `megamoe generate`; the first rank prints."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO

from megamoe.inference.worker import forward_model  # first: it quietens the engines, which others import

# isort: split
import torch.distributed as dist

from megamoe.checkpoint.outputs import writing
from megamoe.config.schema import Config
from megamoe.data.tokenizers import Tokenizer, build_tokenizer
from megamoe.generation.loop import Limits, Text, generate
from megamoe.generation.settings import Sampling
from megamoe.printing import printing


def run_rank(payload: Mapping[str, Any]) -> None:
    """Continue payload["prompts"] (texts with their "ids"). Texts are printed in the order of the prompts; into a file
    they go as they are done, with the number of the prompt."""
    config = Config.model_validate(payload["config"])
    limits, sampling = Limits(**payload["limits"]), Sampling(**payload["sampling"])
    prompts, in_order = payload["prompts"], payload["out"] is None
    # The model first: a file that stands there is emptied only when there is something to write.
    with (
        forward_model(config, Path(payload["checkpoint"])) as model,
        _lines(payload, config, is_first=dist.get_rank() == 0) as show,
    ):
        waiting: dict[int, Text] = {}
        shown = 0
        with model.capacity(drop_tokens=False):
            for done in generate(model, [prompt["ids"] for prompt in prompts], limits, sampling):
                if not in_order:
                    for text in done:
                        show(prompts[text.number]["text"], text)
                    continue
                waiting |= {text.number: text for text in done}
                while shown in waiting:
                    show(prompts[shown]["text"], waiting.pop(shown))
                    shown += 1


@contextmanager
def _lines(payload: Mapping[str, Any], config: Config, *, is_first: bool) -> Iterator[Any]:
    """What shows one text: on the first rank as JSON or plain, in a file or on stdout; on others nothing."""
    if not is_first:
        yield lambda prompt, text: None
        return
    tokenizer = build_tokenizer(config.data.tokenizer)
    with _output(payload["out"]) as file:
        as_json = payload["json"] or payload["out"] is not None

        def show(prompt: str, text: Text) -> None:
            result = result_of(prompt, text, tokenizer)
            with _writing(payload["out"]):
                print(json.dumps(result, ensure_ascii=False) if as_json else _plain(result), file=file, flush=True)

        yield show


@contextmanager
def _output(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with _writing(path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (what happens between is another matter)
    try:
        yield file
    finally:
        with _writing(path):  # after a full disk it tries again
            file.close()


def _writing(path: str | None) -> AbstractContextManager[None]:
    if path is None:
        return printing(is_alone=dist.get_world_size() == 1)
    return writing(Path(path), goes_on=False)


def result_of(prompt: str, text: Text, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is told of one text. Ids that the tokenizer does not know, of a larger model, give no text."""
    known = [[i for i in ids if i < tokenizer.vocab_size] for ids in (text.prompt, [*text.prompt, *text.new])]
    before, whole = (tokenizer.decode(ids) for ids in known)
    return {
        "number": text.number, "prompt": prompt, "completion": whole[len(before) :], "finish": text.finish,
        "num_prompt_tokens": len(text.prompt), "completion_ids": text.new,
    }  # fmt: skip


def _plain(result: Mapping[str, Any]) -> str:
    return f"{result['prompt']}{result['completion']}\n"
