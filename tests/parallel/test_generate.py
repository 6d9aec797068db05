"""Greedy texts are transformers', prompt by prompt, alone and in batches, under every layout; draws are a text's."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.config.loading import load_config
from megamoe.errors import CheckpointError, MegamoeError, OutputError
from megamoe.generation import worker
from megamoe.generation.loop import Limits, Text, generate
from megamoe.generation.settings import Sampling
from megamoe.inference.model import ForwardModel
from tests.parallel.forward_worlds import both_sides, model_of
from tests.parallel.worlds import parallel
from tests.unit.convert_cases import SEQ, VOCAB

MODELS = ("llama", "qwen3 moe", "custom")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "alone": (1, ()),
    "batches of 4": (1, ("run.micro_batch_size=4",)),
    "tp2, batches of 7": (2, (*parallel(tp=2), "run.micro_batch_size=7")),
    "pp2, batches of 3": (2, (*parallel(pp=2), "run.micro_batch_size=3")),
    "dp2, batches of 8": (2, ("run.micro_batch_size=8",)),
    "tp2 pp2 dp2, batches of 5": (8, (*parallel(tp=2, pp=2), "run.micro_batch_size=5")),
}
WITH_EXPERTS = {"tp2 pp2 dp2, batches of 5": parallel(ep=2), "dp2, batches of 8": parallel(ep=2)}
END, NUM_NEW = 4, 8
LIMITS = Limits(num_new=NUM_NEW, context=SEQ, end_ids=(END,))
WARM = Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=5)
pytestmark = pytest.mark.timeout(600)  # the first test waits for all launches


def prompts() -> list[list[int]]:
    """Fifty, from one token to all but one of the context."""
    draw = np.random.default_rng(17)
    return [draw.integers(6, VOCAB, 1 + number % (SEQ - 1)).tolist() for number in range(50)]


def settings_of(model: str, layout: str) -> tuple[str, ...]:
    return LAYOUTS[layout][1] + (() if model == "llama" else WITH_EXPERTS.get(layout, ()))


def texts(model: ForwardModel, sampling: Sampling) -> list[tuple[list[int], str]]:
    found = {text.number: text for done in generate(model, prompts(), LIMITS, sampling) for text in done}
    assert sorted(found) == list(range(50))
    return [(found[number].new, found[number].finish) for number in range(50)]


@torch.no_grad()
def diverged(model: ForwardModel) -> list[str]:
    """What is said, greedy and drawn, when no weight is a number any more."""
    for parameter in model.chunk.parameters():
        parameter.fill_(torch.nan)
    said = []
    for sampling in (Sampling(), WARM):
        with pytest.raises(MegamoeError) as caught:
            texts(model, sampling)
        said.append(str(caught.value))
    return said


def compute_all(size: int, root: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for name in MODELS:
        for layout, (ranks, _) in LAYOUTS.items():
            if ranks == size:
                with model_of(root, name, settings_of(name, layout), size) as model:
                    found[name, layout] = {"greedy": texts(model, Sampling()), "drawn": texts(model, WARM)}
                    found[name, layout]["diverged"] = diverged(model)
    return found


@torch.no_grad()
def theirs(model: torch.nn.Module) -> list[list[int]]:
    found = []
    for prompt in prompts():
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=min(NUM_NEW, SEQ - len(prompt)), eos_token_id=END,
            pad_token_id=5,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


def same(one: object, other: object) -> None:
    assert one == other


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sizes = sorted({ranks for ranks, _ in LAYOUTS.values()})
    return both_sides(tmp_path_factory.mktemp("generate"), MODELS, sizes, theirs, compute_all, same=same)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_texts_are_those_of_transformers(model, layout, outcomes):
    found, expected = outcomes["ours"][model, layout]["greedy"], outcomes["theirs"][model]
    assert [new for new, _ in found] == expected
    for prompt, (new, finish) in zip(prompts(), found, strict=True):
        full = len(prompt) + len(new) == SEQ
        assert finish == ("end" if new[-1] == END else "length" if len(new) == NUM_NEW else "context")
        assert finish != "context" or full


def test_some_texts_end_in_each_way(outcomes):
    finishes = {finish for found in outcomes["ours"].values() for _, finish in found["greedy"] + found["drawn"]}
    assert finishes == {"end", "length", "context"}


@pytest.mark.parametrize("model", MODELS)
def test_a_texts_draws_depend_on_nothing_else(model, outcomes):
    drawn = [outcomes["ours"][model, layout]["drawn"] for layout in LAYOUTS]
    assert all(other == drawn[0] for other in drawn[1:])
    assert drawn[0] != outcomes["ours"][model, "alone"]["greedy"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_says_that_logits_are_not_finite(layout, outcomes):
    """The longest prompt is the first to be continued."""
    assert outcomes["ours"]["custom", layout]["diverged"] == 2 * [
        "prompt 14: after 0 new tokens the model's logits are not finite: its weights have diverged, or run.precision "
        "fp32 is too narrow for them"
    ]


def test_what_stands_in_the_file_stays_until_a_model_is_there(tmp_path, monkeypatch):
    @contextmanager
    def damaged(config: object, checkpoint: Path) -> Iterator[None]:
        raise CheckpointError(f"{checkpoint} is damaged")
        yield

    monkeypatch.setattr(worker, "forward_model", damaged)
    (tmp_path / "texts").write_text("before")
    payload = {
        "config": load_config("laptop-moe").model_dump(mode="json"), "checkpoint": "here", "prompts": [],
        "limits": {"num_new": 1, "context": 8}, "sampling": {}, "out": str(tmp_path / "texts"), "json": False,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="here is damaged"):
        worker.run_rank(payload)
    assert (tmp_path / "texts").read_text() == "before"


def test_a_full_disk_is_said_in_one_sentence():
    payload = {"out": "/dev/full", "json": False}
    config = load_config("laptop-moe")
    with pytest.raises(OutputError) as caught, worker._lines(payload, config, is_first=True) as show:
        show("x", Text(0, [5], [6], "length"))
    assert str(caught.value) == (
        "/dev/full cannot be written (No space left on device): free space or choose an output on another disk"
    )
