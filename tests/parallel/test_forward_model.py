"""Forward passes with and without a cache, of ragged batches, under every layout: what transformers computes.

One launch for each number of ranks goes through all models and layouts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.errors import CheckpointError
from megamoe.inference.model import ForwardModel
from megamoe.inference.rows import TokenRows
from megamoe.inference.settings import forward_config
from megamoe.launch.environment import rank_environment
from tests.harness import run_ranks
from tests.parallel.forward_worlds import both_sides, checkpoint_of, forward_model, make_model, model_of
from tests.parallel.worlds import parallel
from tests.unit.convert_cases import VOCAB

MODELS = ("llama", "qwen3 moe", "ernie", "xglm", "custom")
DENSE = ("llama", "xglm")
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"one": ()},
    2: {"tp2": parallel(tp=2), "pp2": parallel(pp=2), "ep2": parallel(ep=2)},
    4: {"tp2 pp2": parallel(tp=2, pp=2), "ep4": parallel(ep=4), "tp2 etp2 ep2": parallel(tp=2, etp=2, ep=2)},
    8: {"tp2 pp2 ep2": parallel(tp=2, pp=2, ep=2)},
}
TOLERANCE = 1e-5
PREFIXES = torch.tensor([[7, 3, 5], [2, 9, 4]])  # how much of each text goes first, and second: [micro-batch, text]
PARTS = torch.tensor([[4, 5, 2], [6, 1, 3]])
NUM_DRAWN = 6
pytestmark = pytest.mark.timeout(600)  # the first test waits for all launches


def texts() -> torch.Tensor:
    """int64 [micro-batch, text, token]."""
    return torch.randint(0, VOCAB, (2, 3, 13), generator=torch.Generator().manual_seed(11))


def layouts_of(model: str, size: int) -> dict[str, tuple[str, ...]]:
    return {name: s for name, s in LAYOUTS[size].items() if model not in DENSE or "ep" not in name}


CASES_HERE = [(model, size, name) for model in MODELS for size in LAYOUTS for name in layouts_of(model, size)]


def cut(starts: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    """Tokens starts[m, i] ... of each text, filled up with a token that would be noticed, to one length."""
    out = torch.full((*counts.shape, int(counts.max())), VOCAB - 1)
    for m, i in np.ndindex(*counts.shape):
        out[m, i, : counts[m, i]] = texts()[m, i, starts[m, i] : starts[m, i] + counts[m, i]]
    return list(out)


def compute(model: ForwardModel) -> dict[str, Any]:
    """Everything that is looked at, the same on each rank."""
    whole = [TokenRows(rows[:, :-1], rows[:, 1:]) for rows in texts()]
    found: dict[str, Any] = {"losses": torch.stack(model.losses(whole)).numpy()}
    caches = [model.new_cache(3, 13) for _ in texts()]
    first = zip(cut(torch.zeros_like(PREFIXES), PREFIXES), caches, PREFIXES, strict=True)
    model.fill([TokenRows(tokens, cache=cache, num_new=count) for tokens, cache, count in first])
    copies = [cache.rows(torch.arange(3), 16) for cache in caches]
    second = zip(cut(PREFIXES, PARTS), copies, PARTS, strict=True)
    rows = [TokenRows(tokens, cache=cache, num_new=count) for tokens, cache, count in second]
    found["parts"] = torch.stack(model.logits(rows)).numpy()
    found["branches"] = branches(model, caches)
    found["drawn"] = greedy(model)
    return found


def branches(model: ForwardModel, caches: list[Any]) -> np.ndarray:
    """Losses of two endings of each text, by a copy of the cache of what they share: [micro-batch, 2 * text, 3]."""
    which = torch.tensor([0, 0, 1, 1, 2, 2])
    rows = []
    for number, (cache, many) in enumerate(zip(caches, texts(), strict=True)):
        endings = torch.stack([many[i, j : j + 4] for i, j in zip(which, (3, 5, 1, 0, 8, 9), strict=True)])
        kept = torch.arange(3).expand(6, 3)
        copy = cache.rows(which, 13)
        rows.append(TokenRows(endings, torch.roll(endings, -1, 1)[:, :3], kept, copy))
        assert copy.starts.tolist() == PREFIXES[number][which].tolist()
    return torch.stack(model.losses(rows)).numpy()


def greedy(model: ForwardModel) -> list[list[int]]:
    """The likeliest continuation of each text's beginning."""
    caches = [model.new_cache(3, 16) for _ in texts()]
    tokens, counts, drawn = cut(torch.zeros_like(PREFIXES), PREFIXES), list(PREFIXES), []
    for _ in range(NUM_DRAWN):
        rows = [TokenRows(t, cache=c, num_new=n) for t, c, n in zip(tokens, caches, counts, strict=True)]
        ids = model.choose(rows, lambda number, logits: logits.argmax(-1))
        drawn.append(torch.cat(ids))
        tokens, counts = [each[:, None] for each in ids], [torch.ones(3, dtype=torch.int64)] * 2
    return torch.stack(drawn, dim=1).tolist()


def compute_all(size: int, root: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for name in MODELS:
        for layout, settings in layouts_of(name, size).items():
            with model_of(root, name, settings, size) as model:
                found[name, layout] = compute(model)
    return found


def theirs(model: torch.nn.Module) -> dict[str, Any]:
    """The same by transformers, text by text, without caches but in `generate`."""
    found: dict[str, Any] = {"logits": [], "drawn": [], "branches": []}
    with torch.no_grad():
        for number, many in enumerate(texts()):
            for i, text in enumerate(many):
                found["logits"].append(model(text[None]).logits[0].float())
                start = int(PREFIXES[number, i])
                drawn = model.generate(
                    text[None, :start], do_sample=False, max_new_tokens=NUM_DRAWN, eos_token_id=None, pad_token_id=0
                )
                found["drawn"].append(drawn[0, start:].tolist())
                for j in ((3, 5), (1, 0), (8, 9))[i]:
                    both = torch.cat([text[:start], text[j : j + 4]])
                    logits = model(both[None]).logits[0, start : start + 3].log_softmax(-1)
                    found["branches"].append(-logits.gather(1, both[start + 1 :, None])[:, 0])
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part, values in other.items():
        np.testing.assert_array_equal(one[part], values)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return both_sides(tmp_path_factory.mktemp("forward"), MODELS, [*LAYOUTS], theirs, compute_all, same=same)


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("model", "size", "layout"), CASES_HERE)
def test_losses_and_continuations_are_those_of_transformers(model, size, layout, outcomes):
    expected, ours = outcomes["theirs"][model], outcomes["ours"][model, layout]
    logits = torch.stack(expected["logits"]).view(2, 3, 13, -1)
    wanted = -logits[:, :, :-1].log_softmax(-1).gather(3, texts()[:, :, 1:, None])[..., 0]
    close(ours["losses"], wanted)
    for number in range(2):
        for i in range(3):
            start, count = int(PREFIXES[number, i]), int(PARTS[number, i])
            close(ours["parts"][number, i, :count], logits[number, i, start : start + count])
    close(ours["branches"].reshape(12, 3), torch.stack(expected["branches"]))
    assert ours["drawn"] == expected["drawn"]


def told_of(root: str, name: str) -> str:
    """What ranks hear of which the second opens `name` where the first opens the first model."""
    checkpoint = checkpoint_of(Path(root) / (name if rank_environment().rank else "first"), "llama")
    try:
        with forward_model(forward_config(checkpoint, parallel(tp=2), num_ranks=2), checkpoint):
            return "nothing"
    except CheckpointError as error:
        return str(error)


def test_ranks_that_were_given_different_checkpoints_are_refused(tmp_path, monkeypatch):
    """As those of a launcher may be, where each looks for the newest checkpoint of a run that is still training."""
    for name in ("first", "copy"):
        make_model(tmp_path / name, "llama")
    seed_with = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seed_with(seed + 1))
    make_model(tmp_path / "other", "llama")
    assert run_ranks(told_of, 2, str(tmp_path), "copy", init=False) == ["nothing"] * 2, "saved apart, but the same"
    path = checkpoint_of(tmp_path / "other", "llama")
    assert run_ranks(told_of, 2, str(tmp_path), "other", init=False) == [
        f"{path}, step 0, is another checkpoint on rank 1 than on the first: name a checkpoint's own folder, not a run "
        "that is still training"
    ] * 2
