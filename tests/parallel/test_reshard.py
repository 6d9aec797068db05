"""A checkpoint of one layout, loaded under another, is the same state to the bit, and trains on as the unbroken run.

One launch for each number of ranks saves from all its layouts, one more loads what the others wrote. The states that
are compared were put together by other code than that of checkpoints (`checkpoint_cases`).
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megamoe.runs.run_folder import checkpoint_name, checkpoints_path
from megamoe.training.restore import load_checkpoint
from megamoe.training.saving import save_checkpoint
from tests.harness import run_ranks
from tests.parallel.checkpoint_cases import (
    CASES,
    MODELS,
    THOROUGH,
    Case,
    comparable,
    differences,
    store,
    stored,
    whole_state,
)
from tests.parallel.worlds import column, samples, steps, trainer_of

NUM_SAVED_STEPS = 2
NUM_NEXT_STEPS = 10
SOURCES_EACH = len(CASES) - 1 if THOROUGH else 5
LOSS_TOLERANCE = 1e-5
TIMEOUT_SECONDS = 3600 if THOROUGH else 900
JUMP = 3  # steps through the list of layouts from which a target takes its sources

Job = tuple[str, Case]  # model, layout


def jobs(world: int) -> list[Job]:
    models = MODELS if THOROUGH else MODELS[:1]
    return [(model, case) for model in models for case in CASES if case.world == world]


def sources(target: Case) -> list[Case]:
    """Which layouts a target is loaded from: spread over the list, itself never among them."""
    at = CASES.index(target)
    others = [CASES[(at + JUMP * number) % len(CASES)] for number in range(1, len(CASES))]
    return others[:SOURCES_EACH]


def pairs() -> list[tuple[str, Case, Case]]:
    models = MODELS if THOROUGH else MODELS[:1]
    return [(model, source, target) for model in models for target in CASES for source in sources(target)]


def folder_of(root: str, model: str, case: Case) -> Path:
    return Path(root) / model / case.name


def save_all(work: Sequence[Job], root: str) -> list[list[float]]:
    """Train, save, write down the whole state, and train on: the losses of the unbroken run."""
    found = []
    for model, case in work:
        settings, folder = case.config(model), folder_of(root, model, case)
        batches = samples(settings, NUM_SAVED_STEPS + NUM_NEXT_STEPS)
        with trainer_of(settings) as trainer:
            steps(trainer, batches[:NUM_SAVED_STEPS])
            save_checkpoint(trainer, folder)
            state = whole_state(trainer)
            if state is not None:
                store(comparable(state), f"{folder}/state.npz")
            found.append(column(steps(trainer, batches[NUM_SAVED_STEPS:]), "lm_loss"))
    return found


def load_all(work: Sequence[Job], root: str) -> list[dict[str, Any]]:
    """Every source under every target layout of this number of ranks: what differs, and the next losses."""
    found = []
    for model, case in work:
        settings = case.config(model)
        batches = samples(settings, NUM_SAVED_STEPS + NUM_NEXT_STEPS)
        with trainer_of(settings) as trainer:
            for source in sources(case):
                folder = folder_of(root, model, source)
                notes = load_checkpoint(trainer, checkpoints_path(folder) / checkpoint_name(NUM_SAVED_STEPS)).notes
                state = whole_state(trainer)
                wrong = [] if state is None else differences(comparable(state), stored(f"{folder}/state.npz"))
                counts = (trainer.step, trainer.samples, trainer.skipped_steps)
                losses = column(steps(trainer, batches[NUM_SAVED_STEPS:]), "lm_loss")
                found.append({"wrong": wrong, "losses": losses, "notes": notes, "counts": counts})
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(model, source, target) -> what came of it, with the unbroken run's losses beside."""
    root, worlds = str(tmp_path_factory.mktemp("reshard")), sorted({case.world for case in CASES})
    unbroken: dict[tuple[str, str], list[float]] = {}
    for world in worlds:
        work = jobs(world)
        ranks = run_ranks(save_all, world, work, root, init=False, timeout_seconds=TIMEOUT_SECONDS)
        unbroken |= {(model, case.name): losses for (model, case), losses in zip(work, ranks[0], strict=True)}
    found = {}
    for world in worlds:
        work = jobs(world)
        ranks = run_ranks(load_all, world, work, root, init=False, timeout_seconds=TIMEOUT_SECONDS)
        keys = [(model, source, case) for model, case in work for source in sources(case)]
        for (model, source, case), outcome in zip(keys, ranks[0], strict=True):
            outcome["unbroken"] = unbroken[model, source.name]
            found[model, source.name, case.name] = outcome
    return found


def test_enough_ordered_pairs_are_tried():
    assert len(pairs()) == len(set(pairs())) >= (300 if THOROUGH else 60)
    worlds = {(source.world, target.world) for _, source, target in pairs()}
    assert len(worlds) >= 12, worlds  # growing, shrinking, and folding anew at the same size


@pytest.mark.timeout(TIMEOUT_SECONDS * 8)
def test_every_pair_loads_to_the_bit_and_trains_on(outcomes):
    assert len(outcomes) == len(pairs())
    for key, outcome in outcomes.items():
        assert outcome["wrong"] == [], key
        assert outcome["counts"] == (NUM_SAVED_STEPS, NUM_SAVED_STEPS * 16, 0), key
        assert outcome["losses"] == pytest.approx(outcome["unbroken"], rel=LOSS_TOLERANCE), key


def test_what_differs_is_told(outcomes):
    """Every key of the layout, and that random streams begin anew."""
    notes = outcomes["paper_all", "w8-tp2-etp2-ep2-zero2", "w8-tp2-pp2-ep2-spTrue-zero1"]["notes"] if THOROUGH else None
    for (_, source, target), outcome in outcomes.items():
        told = "; ".join(outcome["notes"])
        for word, key in (("tp", "tensor_parallel_size"), ("ep", "expert_parallel_size"), ("pp", "pipeline")):
            sizes = [next((p for p in name.split("-") if p.startswith(word)), f"{word}1") for name in (source, target)]
            assert (f"parallel.{key}" in told) == (sizes[0] != sizes[1]), (source, target, told)
        assert "random streams begin anew from the seed and step 2" in told or zero_only(source, target)
    assert notes is None or any("zero_stage 2 there, 1 here" in note for note in notes)


def zero_only(source: str, target: str) -> bool:
    """Whether two layouts differ in the ZeRO stage alone, which moves no random stream."""
    return source.rsplit("-", 1)[0] == target.rsplit("-", 1)[0]


# --- chains -----------------------------------------------------------------------------------------------------------

NUM_HOPS = 10
NUM_CHAINS = 3 if THOROUGH else 1
CHAIN_SEED = 20261124


def hops(chain: int) -> list[Case]:
    """A random walk over the layouts, from one back to itself, in an order that visits each number of ranks."""
    draw = random.Random(CHAIN_SEED + chain)
    inner = draw.choices(CASES, k=NUM_HOPS - 1)
    start = draw.choice(CASES)
    return [start, *inner, start]


def hop(model: str, case: Case, source: str | None, target: str, precision: str = "fp32") -> list[str] | None:
    """Load, save; the first hop trains, the last one compares with it."""
    settings = case.config(model, f"run.precision={precision}")
    with trainer_of(settings) as trainer:
        if source is None:
            steps(trainer, samples(settings, NUM_SAVED_STEPS))
        else:
            load_checkpoint(trainer, checkpoints_path(source) / checkpoint_name(NUM_SAVED_STEPS))
        save_checkpoint(trainer, target)
        state = whole_state(trainer)
        if state is not None:
            store(comparable(state, precision=precision), f"{target}/state.npz")
    return None


@pytest.mark.parametrize("chain", range(NUM_CHAINS))
def test_ten_random_hops_come_back_to_the_bit(tmp_path, chain):
    print(f"chain seed {CHAIN_SEED + chain}: {[case.name for case in hops(chain)]}")
    source = None
    for number, case in enumerate(hops(chain)):
        target = str(tmp_path / str(number))
        run_ranks(hop, case.world, MODELS[1], case, source, target, init=False, timeout_seconds=TIMEOUT_SECONDS)
        source = target
    first, last = stored(f"{tmp_path}/0/state.npz"), stored(f"{tmp_path}/{NUM_HOPS}/state.npz")
    assert differences(last, first) == []
    assert any(key[0] == "balance_bias" and values.any() for key, values in first.items())


# --- precision --------------------------------------------------------------------------------------------------------


def precisions(root: str) -> dict[str, Any]:
    """fp32 -> bf16 -> fp16 -> bf16 at another stage -> fp32, each time what is in the masters."""
    walk = (("fp32", 0), ("bf16", 1), ("bf16", 2), ("fp32", 2), ("bf16", 1))
    found = []
    for number, (precision, zero) in enumerate(walk):
        case = Case("", 2, (f"parallel.zero_stage={zero}", "parallel.expert_parallel_size=2"))
        with trainer_of(case.config("bias", f"run.precision={precision}")) as trainer:
            if number == 0:
                steps(trainer, samples(trainer.config, NUM_SAVED_STEPS))
            else:
                load_checkpoint(trainer, checkpoints_path(f"{root}/{number - 1}") / checkpoint_name(NUM_SAVED_STEPS))
            save_checkpoint(trainer, f"{root}/{number}")
            found.append(whole_state(trainer))
            next_loss = steps(trainer, samples(trainer.config, NUM_SAVED_STEPS + 1)[NUM_SAVED_STEPS:])[0]["lm_loss"]
            found[-1] = {"state": found[-1], "next_loss": next_loss}
    return found


def test_masters_and_moments_survive_other_precisions_and_stages(tmp_path):

    first, *others = run_ranks(precisions, 2, str(tmp_path), init=False, timeout_seconds=TIMEOUT_SECONDS)[0]
    expected = {key: v for key, v in first["state"].items() if key[0] != "master"}
    for other in others:
        state = other["state"]
        masters = {("weight", name): v for (kind, name), v in state.items() if kind == "master"}
        rest = {key: v for key, v in state.items() if key[0] not in ("master", "weight")}
        assert differences(masters | rest, expected) == []
        rounded = {("weight", name): v for (kind, name), v in state.items() if kind == "weight"}
        exact = {key: v for key, v in expected.items() if key[0] == "weight"}
        if differences(rounded, exact):  # a 16-bit run: its weights are the masters, rounded
            bf16 = {key: torch.from_numpy(v).bfloat16().float().numpy() for key, v in exact.items()}
            assert differences(rounded, bf16) == []
        assert other["next_loss"] == pytest.approx(first["next_loss"], rel=2e-2)
    assert others[2]["next_loss"] == pytest.approx(first["next_loss"], rel=LOSS_TOLERANCE), "fp32 again: as before"
