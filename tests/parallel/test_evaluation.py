"""Nats of blocks and of documents under every layout: those of transformers, each token scored by a pass of its own.

One launch for each number of ranks goes through all models and layouts.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamoe.config.loading import override_config
from megamoe.config.schema import Corpus, TokenizerConfig
from megamoe.data.datasets import open_blend
from megamoe.data.indexed import IndexedWriter
from megamoe.data.tokenizers import EOS_ID
from megamoe.evaluation import scoring
from megamoe.evaluation.corpora import OpenSet, open_set
from megamoe.evaluation.results import Results, tokens_folder
from megamoe.evaluation.scoring import cut_rounds, round_losses, score_set
from megamoe.evaluation.sets import EvaluationSet, TextSet
from megamoe.evaluation.sums import Sums, set_result
from megamoe.evaluation.worker import Evaluation
from megamoe.inference.model import ForwardModel
from megamoe.inference.settings import forward_config
from megamoe.model import token_nats as token_nats_module
from megamoe.moe.layer import MoELayer
from megamoe.training.held_out import held_out
from megamoe.training.restore import load_weights
from tests.parallel.forward_worlds import both_sides, checkpoint_of, forward_model, model_of
from tests.parallel.worlds import parallel, trainer_of
from tests.unit.convert_cases import VOCAB

MODELS = ("llama", "qwen3 moe", "custom")
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"one": ()},
    2: {"tp2": parallel(tp=2), "pp2": parallel(pp=2), "ep2": parallel(ep=2)},
    4: {"ep4": parallel(ep=4), "tp2 pp2": parallel(tp=2, pp=2)},
    8: {"tp2 pp2 ep2": parallel(tp=2, pp=2, ep=2), "dp8": ()},
}
LENGTHS = (1, 7, 40, 12, 13, 18, 2, 29, 3, 33, 5, 11, 32)  # tokens of the documents
CONTEXT, STRIDE, BLOCK = 12, 5, 16
TOLERANCE = 1e-5
DROPS = ("moe.dropless=false", "moe.capacity_factor=0.75")
pytestmark = pytest.mark.timeout(600)  # the first test waits for all launches


def layouts_of(model: str, size: int) -> dict[str, tuple[str, ...]]:
    chosen = LAYOUTS[size] if model == "custom" else {name: s for name, s in LAYOUTS[size].items() if name != "dp8"}
    return {name: s for name, s in chosen.items() if model != "llama" or "ep" not in name}


CASES_HERE = [(model, size, name) for model in MODELS for size in LAYOUTS for name in layouts_of(model, size)]


def documents() -> list[np.ndarray]:
    generator = np.random.default_rng(4)
    return [np.append(generator.integers(5, VOCAB, length - 1), EOS_ID) for length in LENGTHS]


def opened(root: str, reading: str) -> OpenSet:
    settings = EvaluationSet(
        name="a", path=f"{root}/text", format="indexed", reading=reading, stride_tokens=STRIDE,
        context_tokens=BLOCK if reading == "blocks" else CONTEXT,
    )  # fmt: skip
    return open_set(TextSet(settings, ()), Path("none"), tokenizer=TokenizerConfig(), vocab_size=VOCAB)


def token_nats(model: ForwardModel, text: OpenSet) -> np.ndarray:
    """By position in the corpus; NaN where a token is not scored, twice where it is scored twice."""
    found = np.full(sum(LENGTHS), np.nan)
    windows = list(text.plan.windows())
    for round_ in cut_rounds(windows, 2, 2 * model.num_data_ranks, fills_up=True):
        losses = round_losses(model, text.plan, windows, round_)
        for micro_batch, each in zip(losses, round_.micro_batches, strict=True):
            for row, number in zip(micro_batch, each, strict=True):
                window = windows[number]
                places = slice(window.first_scored, window.first_scored + window.scored)
                assert np.isnan(found[places]).all()
                found[places] = row[: window.scored]
    return found


def score(model: ForwardModel, text: OpenSet, monkeypatch: pytest.MonkeyPatch, is_broken: bool) -> dict[str, Any]:
    """The sums; broken off after one of several small batches and, by way of JSON, gone on from."""
    for constant in ("PASSES", "PASSES_PER_STAGE", "ROUNDS"):
        monkeypatch.setattr(scoring, constant, 1)
    kept: list[tuple[str, tuple[int, int]]] = []

    def done(sums: Sums, place: tuple[int, int]) -> None:
        kept.append((json.dumps(sums.to_json()), place))
        if is_broken and len(kept) == 1:
            raise InterruptedError

    sums = Sums()
    try:
        score_set(model, text, sums, (0, 0), done)
    except InterruptedError:
        text_of_sums, place = kept[-1]
        assert 0 < place[0] < text.plan.num_units
        sums = Sums.from_json(json.loads(text_of_sums))
        score_set(model, text, sums, place, lambda sums, place: None)
    return sums.to_json()


def compute(model: ForwardModel, root: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for reading in ("blocks", "documents"):
        text = opened(root, reading)
        found[reading] = token_nats(model, text)
        with pytest.MonkeyPatch.context() as patch:
            found[f"{reading} sums"], broken = (score(model, text, patch, is_broken) for is_broken in (False, True))
        assert broken == found[f"{reading} sums"]  # to the bit
    return found


def validation(size: int, root: str, checkpoint: Path) -> dict[str, Any]:
    """Training's own validation loss, and the evaluation of the same blocks with the capacity of training."""
    layout = (*parallel(ep=2), "run.micro_batch_size=2", "run.precision=fp32")
    config = override_config(forward_config(checkpoint, layout, num_ranks=size), DROPS, "test")
    text = opened(root, "blocks")
    num_batches = text.plan.num_units // config.run.global_batch_size
    with trainer_of(config) as trainer:
        load_weights(trainer, checkpoint)
        corpus = open_blend([Corpus(path=f"{root}/text")], seq_length=BLOCK, vocab_size=VOCAB)
        theirs = held_out(trainer, corpus, num_batches, "valid")
    sums = Sums()
    with forward_model(config, checkpoint) as model, model.capacity(drop_tokens=True):
        score_set(model, text, sums, (0, 0), lambda sums, place: None)
    return {"theirs": theirs["valid_loss"], "ours": sums.to_json(), "num_batches": num_batches}


def odd_lengths(size: int, root: str, checkpoint: Path) -> dict[str, Any]:
    """With tensor parallelism and a capacity: the sums of documents, and how far a layer's output is from what each
    tensor rank's part of the tokens gives alone."""
    drops = (*DROPS, "moe.eval_capacity_fraction=0.3")
    config = override_config(forward_config(checkpoint, parallel(tp=2), num_ranks=size), drops, "test")
    sums, gaps = Sums(), {}
    with forward_model(config, checkpoint) as model, model.capacity(drop_tokens=True), torch.no_grad():
        score_set(model, opened(root, "documents"), sums, (0, 0), lambda sums, place: None)
        layer = next(module for module in model.chunk.modules() if isinstance(module, MoELayer))
        hidden = torch.randn((7, 2, config.model.hidden_size), generator=torch.Generator().manual_seed(6))
        for length, first in ((7, 4), (1, 1)):  # of one token the second rank has none
            parts = [part for part in (hidden[:first], hidden[first:length]) if len(part)]
            alone = [layer._route_and_apply(part.flatten(0, 1), num_sequences=2)[0].view_as(part) for part in parts]
            gaps[length] = float((layer(hidden[:length])[0] - torch.cat(alone)).abs().max())
        model.statistics.take()
    return {"sums": sums.to_json(), "gaps": gaps}


def late_rank(size: int, root: str, checkpoint: Path) -> dict[str, int]:
    """How many ranks still have the folder of tokens, the last one long after the first one is done; and it goes."""
    out = Path(f"{root}/late.json")
    folder, seen = tokens_folder(out), torch.zeros(2, dtype=torch.int64)
    header = {"sets": [opened(root, "blocks").description.describe()], "capacity": {"drops_tokens": False}}
    tree = Results.begin(header, [{"folder": str(checkpoint), "checkpoint": "", "step": 0}]).tree
    payload = {"results": tree, "out": str(out), "json": False, "save_interval_seconds": 30.0}

    def text_bytes(self: OpenSet, counted: int | None) -> int | None:
        time.sleep(0.5 * dist.get_rank())
        seen[0] += folder.is_dir()
        return counted

    with forward_model(forward_config(checkpoint, (), num_ranks=size), checkpoint) as model:
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OpenSet, "text_bytes", text_bytes)
            Evaluation(model, payload).run()
        dist.barrier()
        seen[1] += folder.is_dir()
        dist.all_reduce(seen)
    return {"in time": int(seen[0]), "afterwards": int(seen[1])}


def compute_all(size: int, root: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for constant, value in (("FEWEST_ROWS", 5), ("LOGIT_BYTES", 1), ("CACHE_BYTES", 3 * 4 * VOCAB)):
        setattr(token_nats_module, constant, value)  # many pieces, the last one smaller
    for name in MODELS:
        for layout, settings in layouts_of(name, size).items():
            with model_of(root, name, settings, size) as model:
                found[name, layout] = compute(model, root)
        if name == "custom" and size == 2:
            found[name, "validation"] = validation(size, root, checkpoint_of(root, name))
            found[name, "odd"] = odd_lengths(size, root, checkpoint_of(root, name))
            found[name, "late"] = late_rank(size, root, checkpoint_of(root, name))
            for precision in ("bf16", "fp16"):
                sums = Sums()
                with model_of(root, name, (*parallel(ep=2), f"run.precision={precision}"), size) as model:
                    score_set(model, opened(root, "documents"), sums, (0, 0), lambda sums, place: None)
                found[name, precision] = {"documents sums": sums.to_json()}
    return found


@torch.no_grad()
def own_pass(model: torch.nn.Module, inputs: np.ndarray, label: int) -> float:
    logits = model(torch.from_numpy(inputs)[None]).logits[0, -1].double()
    return float(logits.logsumexp(-1) - logits[label])


def theirs(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Each token of each document from the beginning of the first window that holds it, by a pass of its own."""
    found: dict[str, np.ndarray] = {}
    corpus = np.concatenate(documents())
    blocks = np.full(len(corpus), np.nan)
    for place in range(1, (len(corpus) - 1) // BLOCK * BLOCK + 1):
        start = (place - 1) // BLOCK * BLOCK
        blocks[place] = own_pass(model, corpus[start:place], corpus[place])
    found["blocks"] = blocks
    nats = []
    for document in documents():
        x = np.append(EOS_ID, document)
        for place in range(1, len(x)):
            skipped = max(0, math.ceil((place - CONTEXT) / STRIDE))  # windows that end before it
            assert place - skipped * STRIDE >= min(place, CONTEXT - STRIDE)
            nats.append(own_pass(model, x[skipped * STRIDE : place], x[place]))
    found["documents"] = np.array(nats)
    return found


def same(one: object, other: object) -> None:
    assert json.dumps(one, default=list) == json.dumps(other, default=list)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("evaluation")
    with IndexedWriter(root / "text", VOCAB) as writer:
        for document in documents():
            writer.add_documents(document.astype(writer.dtype), np.array([len(document)]))
    # Training's loss counts the rows that fill the vocabulary up: where it is compared there are none.
    return both_sides(
        root, MODELS, [*LAYOUTS], theirs, compute_all, same=same, vocab_multiples={"custom": 32}
    )


@pytest.mark.parametrize(("model", "size", "layout"), CASES_HERE)
def test_every_token_is_scored_once_as_transformers_scores_it(model, size, layout, outcomes):
    expected, ours = outcomes["theirs"][model], outcomes["ours"][model, layout]
    for reading in ("blocks", "documents"):
        np.testing.assert_allclose(ours[reading], expected[reading], rtol=TOLERANCE, atol=TOLERANCE)
        scored = expected[reading][~np.isnan(expected[reading])]
        result = set_result(Sums.from_json(ours[f"{reading} sums"]), num_documents=1, num_text_bytes=None)
        assert result["num_tokens"] == len(scored)
        assert result["nats_per_token"] == pytest.approx(scored.mean(), rel=TOLERANCE)
        assert result["perplexity"] == pytest.approx(np.exp(scored.mean()), rel=3 * TOLERANCE)


def test_the_standard_error_is_that_of_whole_documents(outcomes):
    by_token = outcomes["theirs"]["llama"]["documents"]
    sums = np.array([each.sum() for each in np.split(by_token, np.cumsum(LENGTHS)[:-1])])
    rest = sums - by_token.mean() * np.array(LENGTHS)
    expected = math.sqrt((rest**2).sum() * len(rest) / (len(rest) - 1)) / len(by_token)
    ours = Sums.from_json(outcomes["ours"]["llama", "one"]["documents sums"])
    assert ours.num_units == len(LENGTHS)
    assert ours.standard_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_sixteen_bits_are_near(precision, tolerance, outcomes):
    found = Sums.from_json(outcomes["ours"]["custom", precision]["documents sums"])
    assert found.nats == pytest.approx(outcomes["theirs"]["custom"]["documents"].sum(), rel=tolerance)
    assert found.nats != Sums.from_json(outcomes["ours"]["custom", "ep2"]["documents sums"]).nats


def test_blocks_are_scored_as_training_validates_drops_included(outcomes):
    found = outcomes["ours"]["custom", "validation"]
    sums = Sums.from_json(found["ours"])
    assert found["num_batches"] * 4 == sums.num_units  # nothing is left out on either side
    assert sums.nats / sums.num_tokens == pytest.approx(found["theirs"], rel=1e-6)
    plain = Sums.from_json(outcomes["ours"]["custom", "ep2"]["blocks sums"])
    assert abs(sums.nats - plain.nats) > 0.01  # the capacity does bite
    shares = [dropped / choices for choices, dropped in sums.loads.values()]
    assert list(sums.loads) == ["1", "3"] and all(0.05 < share < 0.9 for share in shares)
    assert all(choices == 2 * sums.num_tokens for choices, _ in sums.loads.values())  # top 2


def test_tokens_stay_until_the_last_rank_has_done_with_them(outcomes):
    assert outcomes["ours"]["custom", "late"] == {"in time": 2, "afterwards": 0}


def test_what_fills_a_window_up_takes_no_place_of_an_expert(outcomes):
    """Windows of odd length do not divide by two tensor ranks."""
    found = outcomes["ours"]["custom", "odd"]
    sums = Sums.from_json(found["sums"])
    assert all(choices == 2 * sums.num_computed_tokens for choices, _ in sums.loads.values())  # top 2
    assert all(0.05 < dropped / choices < 0.9 for choices, dropped in sums.loads.values())
    assert all(gap < TOLERANCE for gap in found["gaps"].values()), found["gaps"]
