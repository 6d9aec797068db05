"""Continue a text with the model as it stands, on all its ranks. For a look at a run; generation proper has a cache."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.data.batches import MicroBatch
from megamoe.data.tokenizers import Tokenizer
from megamoe.phases import phase
from megamoe.training.build import Trainer
from megamoe.training.hooks import BaseHook, Say
from megamoe.training.step import Batch


@torch.no_grad()
def sample_tokens(
    trainer: Trainer, prompt: Sequence[int], num_tokens: int, *, temperature: float, seed: int
) -> list[int]:
    """Draw `num_tokens` ids after `prompt`, each from the softmax of logits / temperature (0: the most likely).

    Every step runs the whole context through the pipeline, and experts take all tokens. Collective over all ranks, same
    result on each.
    """
    ids, generator = list(prompt), torch.Generator().manual_seed(seed)
    length, vocab_size = trainer.config.model.seq_length, trainer.config.model.vocab_size
    with trainer.evaluating(drop_tokens=False):  # a text must not depend on the padding beside it
        for _ in range(num_tokens):
            logits = _last_logits(trainer, ids[-length:])
            token = torch.zeros((), dtype=torch.int64)
            if logits is not None:
                logits = logits[:vocab_size].float().cpu()
                if temperature == 0.0:
                    token = logits.argmax()
                else:
                    token = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[0]
            ids.append(_from_last_stage(trainer, token))
    return ids[len(prompt) :]


def _last_logits(trainer: Trainer, context: Sequence[int]) -> Tensor | None:
    """Logits [V] after the last token of `context`; None but on the last stage."""
    config = trainer.config
    tokens = np.zeros((config.run.micro_batch_size, config.model.seq_length), dtype=np.int64)
    tokens[:, : len(context)] = context
    # The interleaved schedule wants at least as many micro-batches as stages.
    count = trainer.groups.grid.pipeline if config.parallel.virtual_pipeline_parallel_size > 1 else 1

    def copies() -> Iterator[MicroBatch]:
        for _ in range(count):
            yield MicroBatch(tokens, tokens)

    results = trainer.schedule.logits(Batch(copies(), count))
    if results is None:
        return None
    part = results[0][0, len(context) - 1].contiguous()  # [V / t]
    parts = [torch.empty_like(part) for _ in range(trainer.groups.grid.tensor)]
    dist.all_gather(parts, part, group=trainer.groups.tensor)
    return torch.cat(parts)


def _from_last_stage(trainer: Trainer, token: Tensor) -> int:
    grid = trainer.groups.grid
    device = trainer.schedule.device
    shared = token.to(device)
    dist.broadcast(shared, src=grid.rank_at(pipeline=grid.pipeline - 1), group=trainer.groups.world)
    return int(shared)


class Sampler(BaseHook):
    """Prints a continuation of a prompt when training ends."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, num_tokens: int, say: Say) -> None:
        self.tokenizer, self.prompt, self.num_tokens, self.say = tokenizer, prompt, num_tokens, say

    @phase("sample")
    def on_end(self, trainer: Trainer) -> None:
        prompt = self.tokenizer.encode(self.prompt) or [self.tokenizer.end_of_document_id]
        drawn = sample_tokens(trainer, prompt, self.num_tokens, temperature=0.8, seed=trainer.config.run.seed)
        self.say(f"sample: {self.prompt}{self.tokenizer.decode([*prompt, *drawn])[len(self.prompt):]}")
