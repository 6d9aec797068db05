"""A rank that evaluates: tokenizes what is text (the first rank does), scores set by set, keeps what is found.

One model at a time is in memory; the next checkpoint of a run is read into the same one.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megamoe.inference.worker import forward_model  # first: it quietens the engines, which others import

# isort: split
import torch.distributed as dist

from megamoe.config.schema import Config
from megamoe.data.tokenizers import tokenizer_of_model
from megamoe.evaluation.corpora import OpenSet, open_set, tokenize
from megamoe.evaluation.results import Results, tokens_folder
from megamoe.evaluation.scoring import score_set
from megamoe.evaluation.sets import TextSet
from megamoe.evaluation.sums import Sums, set_result
from megamoe.evaluation.table import shown
from megamoe.evaluation.together import first_ranks_text, on_first_rank
from megamoe.inference.model import ForwardModel
from megamoe.printing import printing
from megamoe.progress import StatusLine
from megamoe.training.restore import load_model


def run_rank(payload: Mapping[str, Any]) -> None:
    """A rank's side of `megamoe evaluate`. What the first rank has read stands for all."""
    config = Config.model_validate(payload["config"])
    models = Results(payload["results"]).waiting()
    with forward_model(config, Path(models[0][0]["folder"])) as model:
        evaluation = Evaluation(model, json.loads(first_ranks_text(model, json.dumps(dict(payload)))))
        evaluation.run()
    evaluation.show()


class Evaluation:
    """All models and sets of one command, on this rank."""

    def __init__(self, model: ForwardModel, payload: Mapping[str, Any]) -> None:
        self.model, self.payload = model, payload
        self.results = Results(payload["results"])
        self.out = None if payload["out"] is None else Path(payload["out"])
        self.speaks = dist.get_rank() == 0
        self.line = StatusLine(sys.stderr)
        self.written = time.monotonic()
        self.texts = [TextSet.from_description(tree) for tree in self.results.tree["sets"]]

    def run(self) -> None:
        """Everything that is not done yet."""
        waiting = self.results.waiting()
        loaded = waiting[0][0]["folder"]
        with self._tokens() as folder:
            needed = sorted({number for _, numbers in waiting for number in numbers})
            prefixes = {number: folder / f"{number:03d}-{self.texts[number].settings.name}" for number in needed}
            self._tokenize(prefixes)
            config = self.model.config
            opened = {
                number: open_set(
                    self.texts[number], prefix, tokenizer=config.data.tokenizer, vocab_size=config.model.vocab_size
                )
                for number, prefix in prefixes.items()
            }
            for place, (entry, numbers) in enumerate(waiting, start=1):
                if entry["folder"] != loaded:
                    load_model(self.model, Path(entry["folder"]))
                    loaded = entry["folder"]
                for number in numbers:
                    self._score(entry, number, opened[number], f"model {place} of {len(waiting)}, ")
            self.line.end()
            dist.barrier()  # until then a rank may still read its tokens, on another node with no hold on the files

    def show(self) -> None:
        """To stdout, on the first rank."""
        if self.speaks:
            with suppress(BrokenPipeError), printing():  # all is done: who reads no more has seen enough
                print(shown(self.results.tree, as_json=self.payload["json"]), flush=True)

    def _score(self, entry: dict[str, Any], number: int, opened: OpenSet, which: str) -> None:
        sums, place = Results.progress(entry["sets"][number])
        first, last = opened.plan.span
        begun, before = time.monotonic(), sums.seconds
        computed = sums.num_computed_tokens

        def done(sums: Sums, place: tuple[int, int]) -> None:
            sums.seconds = before + time.monotonic() - begun
            if not self.speaks:
                return
            if self.line.is_due:
                rate = (sums.num_computed_tokens - computed) / max(1e-9, sums.seconds - before)
                share = sums.num_tokens / (last - first)
                left = (sums.seconds - before) * (1 - share) / max(1e-9, share)
                self.line.show(
                    f"{which if len(self.results.tree['models']) > 1 else ''}{opened.name} {share:4.0%}  "
                    f"{rate:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02} left"
                )
            self.results.keep_progress(entry, number, sums, place)
            if time.monotonic() - self.written >= self.payload["save_interval_seconds"]:
                self._write()

        with self.model.capacity(drop_tokens=self.results.tree["capacity"]["drops_tokens"]):
            score_set(self.model, opened, sums, place, done)
        result = set_result(
            sums, num_documents=opened.plan.num_documents, num_text_bytes=opened.text_bytes(sums.num_bytes)
        )
        self.results.finish_set(entry, number, result)
        if self.speaks and result["nats"] is None:
            self.line.end(
                f"megamoe: warning: {entry['checkpoint']}, set {opened.name}: the loss is not finite: the weights have "
                "diverged, or run.precision is too narrow for them; its figures are null"
            )
        if self.speaks and result["num_text_bytes"] is None and (why := opened.why_uncounted()) is not None:
            self.line.end(f"megamoe: note: {why}")
        self._write()

    def _write(self) -> None:
        if self.speaks and self.out is not None:
            self.results.write(self.out)
            self.written = time.monotonic()

    def _tokenize(self, prefixes: Mapping[int, Path]) -> None:
        config = self.model.config
        texts = [(self.texts[number], prefix) for number, prefix in prefixes.items()]
        wanted = [(text, prefix) for text, prefix in texts if text.settings.format != "indexed"]
        if not wanted:
            return

        def work(tick: Any) -> None:
            def told(what: str) -> None:
                if self.line.is_due:
                    self.line.show(what)
                tick()

            tokenizer = tokenizer_of_model(config.data.tokenizer, config.model.vocab_size)
            for text, prefix in wanted:
                tokenize(text, tokenizer, prefix, told)

        on_first_rank(self.model, work)

    @contextmanager
    def _tokens(self) -> Iterator[Path]:
        """A folder that all ranks see: beside the results, where a run that goes on finds it; else a temporary one."""
        if self.out is not None:
            folder = tokens_folder(self.out)
        else:
            own = tempfile.mkdtemp(prefix="megamoe-evaluate-") if self.speaks else ""
            folder = Path(first_ranks_text(self.model, own))
        try:
            yield folder
        finally:
            if self.speaks and (self.out is None or self.results.is_complete):
                shutil.rmtree(folder, ignore_errors=True)
