"""The search: nothing that fits is faster than what it finds, and what it says of the others is so."""

import json

import pytest

from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.config.validation import validate
from megamoe.errors import MegamoeError
from megamoe.plan.cluster import load_cluster
from megamoe.plan.layouts import changed
from megamoe.plan.plan import make_plan
from megamoe.plan.quantities import Load
from megamoe.plan.search import ALTERNATIVES, SearchResult, search
from megamoe.plan.search_report import overrides_of, search_text

MODEL = ("model.num_layers=4", "moe.num_experts=8", "run.global_batch_size=32", "run.precision=bf16",
         "model.seq_length=256", "moe.layer_pattern=2")  # fmt: skip
WORLD_SIZE = 8


@pytest.fixture(scope="module")
def config():
    return load_config("mixtral-8x7b", MODEL)


@pytest.fixture(scope="module", params=(20, 40, 80))
def found(request, config) -> SearchResult:
    """In little, enough and ample memory, GB; two nodes of four."""
    update = {"memory_bytes": request.param * 10**9, "ranks_per_node": 4}
    return search(config, load_cluster("h100-80gb").model_copy(update=update), WORLD_SIZE, Load(1.2))


def every_layout(config, ranks_per_node: int):
    """Written down plainly, those included that the search leaves out as slower or larger than others."""
    for tensor in (1, 2, 4):
        for pipeline in (1, 2, 4):
            for virtual in (1, 2, 4) if pipeline > 1 else (1,):
                for expert in (1, 2, 4, 8):
                    for expert_tensor in {1, tensor}:
                        for zero_stage in (1, 2):
                            for recompute in ("none", "selective", "full"):
                                for all_to_all in ("flat", "hierarchical"):
                                    for micro_batch in (1, 2, 4, 8, 16, 32):
                                        parallel = {
                                            "tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline,
                                            "virtual_pipeline_parallel_size": virtual, "expert_parallel_size": expert,
                                            "expert_tensor_parallel_size": expert_tensor, "zero_stage": zero_stage,
                                            "sequence_parallel": tensor > 1, "recompute": recompute,
                                            "all_to_all": all_to_all, "ranks_per_node": ranks_per_node,
                                        }  # fmt: skip
                                        run = {"micro_batch_size": micro_batch}
                                        tried = changed(config, parallel=parallel, run=run)
                                        try:
                                            validate(tried, WORLD_SIZE)
                                        except MegamoeError:
                                            continue
                                        yield tried


def test_nothing_that_fits_is_faster(found, config):
    fastest, fits = None, 0
    for tried in every_layout(config, 4):
        plan = make_plan(tried, found.cluster, WORLD_SIZE, Load(1.2))
        fits += plan.fits
        if plan.fits and (fastest is None or plan.step.seconds < fastest.step.seconds):
            fastest = plan
    assert (fastest is None) == (not found.best)
    if fastest is not None:
        assert found.best[0].step.seconds == pytest.approx(fastest.step.seconds, rel=1e-9)
        assert fits > found.num_fitting, "the search leaves out what is slower"


def test_what_it_finds_is_what_a_plan_of_it_says(found, config):
    for each in found.best:
        settings = overrides_of(each.config)
        plan = make_plan(load_config("mixtral-8x7b", [*MODEL, *settings]), found.cluster, WORLD_SIZE, Load(1.2))
        assert plan.fits and plan.step.seconds == pytest.approx(each.step.seconds)
        assert plan.worst.memory.num_bytes.total == each.memory.total
    seconds = [each.step.seconds for each in found.best]
    assert seconds == sorted(seconds)


def test_losers_lose(found, config):
    if not found.best:
        return
    for loser in found.losers:
        assert not ALTERNATIVES[loser.name](found.best[0].config, config, found.cluster, WORLD_SIZE)
        if loser.best is not None:
            assert ALTERNATIVES[loser.name](loser.best.config, config, found.cluster, WORLD_SIZE)
            assert loser.best.step.seconds >= found.best[0].step.seconds
    text = search_text(found)
    assert all(f"  {loser.name}: " in text for loser in found.losers)
    assert {loser.name for loser in found.losers} < set(ALTERNATIVES)


def test_where_nothing_fits_the_leanest_is_named(config):
    cluster = load_cluster("h100-80gb").model_copy(update={"memory_bytes": 11 * 10**9, "ranks_per_node": 4})
    found = search(config, cluster, WORLD_SIZE, Load())
    assert not found.best and found.leanest is not None
    totals = [make_plan(tried, cluster, WORLD_SIZE).worst.memory.num_bytes.total for tried in every_layout(config, 4)]
    assert found.leanest[1].total == min(totals) > cluster.memory_bytes
    assert "the leanest needs" in search_text(found)


def test_the_command_ranks_and_says_why(capsys):
    arguments = ["plan", "mixtral-8x7b", *MODEL, "--cluster", "h100-80gb", "--gpus", "8", "--search"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "settings of the first:" in text and "why not" in text
    assert main([*arguments, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert 1 <= len(tree["best"]) <= 10 and tree["num_fitting"] >= len(tree["best"])
    assert f"{tree['best'][0]['step']['seconds']:.3f}" in text
    assert main(["plan", "moe-1.1t", "--cluster", "a100-40gb", "--gpus", "8", "--search"]) == 1
    assert "no layout fits" in capsys.readouterr().out


def test_a_search_that_cannot_begin_says_so(capsys):
    assert main(["plan", "mixtral-8x7b", "--cluster", "h100-80gb", "--gpus", "3000", "--search"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3000" in error
    with pytest.raises(SystemExit) as caught:
        main(["plan", "mixtral-8x7b", "--cluster", "h100-80gb", "--gpus", "8", "--search", "--html", "page.html"])
    assert caught.value.code == 2 and "--html" in capsys.readouterr().err
