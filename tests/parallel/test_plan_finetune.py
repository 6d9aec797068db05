"""Plans of fine-tunings, with frozen parts and with a classifier's head, against real gloo ranks: no difference.

Frozen parts of a tensor-parallel or recomputed layer skip collectives that the plan of a layer does not tell apart, so
calls are compared where nothing is frozen, and outside of layers' passes where something is.
"""

from collections import Counter

import pytest

from megamoe.errors import MegamoeError
from megamoe.topology.updates import check_all_train
from tests.harness import run_ranks
from tests.parallel.plan_cases import random_configs
from tests.parallel.plan_ranks import audit_configs
from tests.parallel.test_plan_exact import _called, _compare_states, _planned

SEED, COUNT = 9, 10
FREEZES = (("experts",), ("embeddings", "norms"), ("routers", "attention"), ())


@pytest.fixture(scope="module", params=[1, 2])
def audited(request):
    world, found = request.param, []
    for number, freeze in enumerate(FREEZES):
        labels = 3 * (number % 2 == 1) or (5 if not freeze else 0)
        fixed = {"finetune__freeze": freeze, "model__num_labels": labels}
        configs = random_configs(SEED + number, world, COUNT, **fixed)
        for config in configs:
            try:
                check_all_train(config)
                found.append(config)
            except MegamoeError:
                continue
    by_rank = run_ranks(audit_configs, world, found, init=False, timeout_seconds=200)
    return world, list(zip(found, zip(*by_rank, strict=True), strict=True))


def test_states_to_the_byte(audited):
    world, pairs = audited
    assert len(pairs) > COUNT
    for config, ranks in pairs:
        for rank, seen in enumerate(ranks):
            _compare_states(config, world, rank, seen)


def test_collectives(audited):
    world, pairs = audited
    for config, ranks in pairs:
        for rank, seen in enumerate(ranks):
            planned, called = _planned(config, world, rank, seen["rows"]), _called(seen["calls"])
            if config.finetune.freeze:
                planned, called = (Counter({k: n for k, n in c.items() if k[3] == "update"}) for c in (planned, called))
            assert planned == called, (rank, planned - called, called - planned, config)
