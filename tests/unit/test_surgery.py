"""Surgery against whole-tensor computations in numpy, and the function it keeps against the plain reference."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest

from megamoe.checkpoint import manifest
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.surgery import execute, numbers
from megamoe.surgery.average import plan_average
from megamoe.surgery.merge import alike_groups, plan_merge
from megamoe.surgery.numbers import decode, encode
from megamoe.surgery.prune import plan_prune
from megamoe.surgery.resize import plan_resize
from megamoe.surgery.sources import Sources
from megamoe.surgery.upcycle import plan_upcycle
from megamoe.topology.parameters import param_table
from tests.unit.checkpoint_cases import load, same, save
from tests.unit.surgery_cases import logits, make, model_tensors, operate, small_config, weights_of

TOLERANCE = 2e-5  # of fp32 logits of size about 1, whose sums are taken in another order
MOE = ["moe.num_experts=4", "moe.layer_pattern=2"]
SIGMOID = ["moe.score_function=sigmoid", "moe.balance_bias_update_rate=0.001"]
LOADS = {1: [5.0, 50.0, 20.0, 25.0], 3: [30.0, 0.0, 0.0, 70.0]}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Tensors of a few thousand bytes are then of several windows, blocks and files."""
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(execute, "PART_BYTES", 8192)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def largest(one, other) -> float:
    return float((one - other).abs().max())


PRESERVING = {
    "copies": (4, 1, []),
    "copies, select then softmax": (4, 1, ["moe.gate_order=select_then_softmax"]),
    "copies, sigmoid with groups": (8, 1, [*SIGMOID, "moe.num_expert_groups=4", "moe.num_selected_groups=2"]),
    "copies, gates times 2.5": (4, 1, ["moe.routed_scaling_factor=2.5"]),
    "copies, all chosen, no normalisation": (3, 1, ["moe.normalize_gates=false", "moe.top_k=3"]),
    "pyramid in listed layers": ((4, 2, 8), 1, ["moe.layer_pattern=[0,1,3]"]),
    "two parts": (6, 2, ["moe.top_k=2"]),
    "four parts, two groups chosen": (12, 4, ["moe.top_k=8"]),
    "three parts, select then softmax": (6, 3, ["moe.top_k=3", "moe.gate_order=select_then_softmax"]),
    "two parts, sigmoid, gates times 3": (8, 2, [*SIGMOID, "moe.top_k=4", "moe.routed_scaling_factor=3"]),
    "two parts within routing groups": (16, 2, ["moe.top_k=4", "moe.num_expert_groups=4", "moe.num_selected_groups=2"]),
    "two parts, all chosen, no normalisation": (6, 2, ["moe.top_k=6", "moe.normalize_gates=false"]),
}  # fmt: skip


IN_BOTH = ("copies", "two parts", "four parts, two groups chosen")


@pytest.mark.parametrize(("case", "family"), [
    *((case, ("paper", "modern")[number % 2]) for number, case in enumerate(PRESERVING) if case not in IN_BOTH),
    *((case, family) for case in IN_BOTH for family in ("paper", "modern")),
])  # fmt: skip
def test_an_upcycled_model_computes_what_the_dense_one_did(case, family, tmp_path):
    experts, granularity, settings = PRESERVING[case]
    dense = make(tmp_path / "dense", small_config(family))
    plan, new = operate(
        [dense], lambda s: plan_upcycle(s, experts, granularity=granularity, settings=settings), tmp_path / "new"
    )
    assert plan.preserves == "the dense model's function, where no token is dropped"
    difference = largest(logits(new), logits(dense))
    assert difference < TOLERANCE, difference
    shuffled = weights_of(new)["layers.1.experts.fc2.weight"][::-1].copy() * 1.5
    assert largest(logits(new, **{"layers.1.experts.fc2.weight": shuffled}), logits(dense)) > 100 * TOLERANCE


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("experts", "granularity", "top_k"), [(4, 1, 1), (4, 1, 2), (8, 2, 4)])
def test_without_normalisation_the_function_is_that_of_an_even_router(score, experts, granularity, top_k, tmp_path):
    dense = make(tmp_path / "dense", small_config("modern"))
    settings = [f"moe.top_k={top_k}", "moe.normalize_gates=false", f"moe.score_function={score}"]
    plan, new = operate(
        [dense], lambda s: plan_upcycle(s, experts, granularity=granularity, settings=settings), tmp_path / "new"
    )
    assert plan.preserves.startswith("near the dense model")
    zeros = {name: np.zeros_like(w) for name, w in weights_of(new).items() if name.endswith("router.weight")}
    assert largest(logits(new, **zeros), logits(dense)) < TOLERANCE
    assert largest(logits(new), logits(dense)) > TOLERANCE


@pytest.mark.parametrize("family", ["paper", "modern"])
def test_upcycled_tensors_are_those_parts_of_the_dense_ones(family, tmp_path):
    """Expert n * G + g holds units g f/G to (g + 1) f/G; all that is not an FFN with experts moves bit for bit."""
    dense = make(tmp_path / "dense", small_config(family), dtype="BF16", masters=True)
    plan, new = operate(
        [dense], lambda s: plan_upcycle(s, 6, granularity=3, settings=["moe.top_k=3"]), tmp_path / "new"
    )
    old, made = weights_of(dense), weights_of(new)
    for layer in (1, 3):
        fc1, fc2 = old[f"layers.{layer}.ffn.fc1.weight"], old[f"layers.{layer}.ffn.fc2.weight"]
        name = f"layers.{layer}.experts"
        for e in range(6):
            units = slice(e % 3 * 8, e % 3 * 8 + 8)
            assert (made[f"{name}.fc1.weight"][e] == fc1[..., units, :]).all()
            assert (made[f"{name}.fc2.weight"][e] == fc2[:, units] * 3).all()
            if family == "paper":
                assert (made[f"{name}.fc1.bias"][e] == old[f"layers.{layer}.ffn.fc1.bias"][units]).all()
                assert (made[f"{name}.fc2.bias"][e] == old[f"layers.{layer}.ffn.fc2.bias"]).all()
        router = made[f"layers.{layer}.router.weight"]
        assert (router[:3] == router[0]).all() and (router[3:] == router[3]).all() and (router[0] != router[3]).all()
        assert np.abs(router).max() <= 16**-0.5  # the rule's bound, and drawn wide
        assert np.abs(router).max() > 0.8 * 16**-0.5
    assert (made["layers.1.router.weight"] != made["layers.3.router.weight"]).all()
    kept = {name for name in made if ".experts." not in name and "router" not in name}
    assert all((made[name] == old[name]).all() for name in kept)
    checkpoint = Checkpoint.open(new)
    config, state = config_of(checkpoint), checkpoint.manifest.state
    assert set(made) == {parameter.name for parameter in param_table(config.model, config.moe)}
    assert config == plan.config.model_copy(
        update={"run": plan.config.run.model_copy(update={"dir": str(tmp_path / "new")})}
    )
    assert {entry.kind for entry in checkpoint.manifest.tensors.values()} == {"weight"}
    assert (config.moe.num_experts, config.moe.expert_ffn_hidden_size, state["step"]) == (6, 8, 0)
    assert len(checkpoint.manifest.files) > 5, "one part only: nothing to resume"


def test_router_rows_follow_the_model_s_rule_and_the_seed(tmp_path):
    normal = ["model.init=normal", "model.init_std=0.5", "model.hidden_size=64"]
    dense = make(tmp_path / "dense", small_config("paper", *normal))
    routers = {}
    for seed in (1, 2):
        _, new = operate([dense], lambda s, seed=seed: plan_upcycle(s, 64, seed=seed), tmp_path / str(seed))
        routers[seed] = weights_of(new)["layers.1.router.weight"]
    assert abs(routers[1].std() - 0.5) < 0.02 and abs(routers[1].mean()) < 0.02
    assert (routers[1] != routers[2]).mean() > 0.99
    digest = hashlib.blake2b(b"1:layers.1.router.weight/7").digest()
    key = np.array([int.from_bytes(digest[:8], "little") >> 1, 0], np.uint64)
    literal = np.random.Generator(np.random.Philox(key=key)).standard_normal(1 << 16)[:64] * 0.5
    assert (routers[1][7] == literal.astype(np.float32)).all()


def prune_reference(old, keep):
    return {
        name: array[keep[int(name.split(".")[1])]] if ".experts." in name or "router" in name else array
        for name, array in old.items()
    }


def test_pruned_experts_are_the_busiest_with_their_rows_and_biases(tmp_path):
    source = make(tmp_path / "old", small_config("modern", *MOE, *SIGMOID), dtype="BF16")
    plan, new = operate([source], lambda s: plan_prune(s, (3, 2), LOADS), tmp_path / "new")
    keep = {1: [1, 2, 3], 3: [0, 3]}
    truth = {
        key: (dtype, prune_reference({key[1]: array}, keep)[key[1]])
        for key, (dtype, array) in load(source).items() if key[0] in ("weight", "balance_bias")
    }  # fmt: skip
    assert same(load(new), truth)
    moe = config_of(Checkpoint.open(new)).moe
    assert (moe.num_experts, moe.num_experts_by_layer) == (3, (3, 2))
    assert "5.0% of the tokens" in plan.notes[0]


def test_pruning_within_routing_groups_keeps_each_as_large(tmp_path):
    groups = ["moe.num_expert_groups=2", "moe.num_selected_groups=2"]
    source = make(tmp_path / "old", small_config("paper", *MOE, *groups))
    _, new = operate([source], lambda s: plan_prune(s, 2, LOADS), tmp_path / "new")
    old, made = weights_of(source), weights_of(new)
    for layer, keep in ((1, [1, 3]), (3, [0, 3])):  # the busiest of 0, 1 and of 2, 3
        name = f"layers.{layer}.experts.fc1.weight"
        assert (made[name] == old[name][keep]).all()
    assert config_of(Checkpoint.open(new)).moe.num_experts_by_layer is None


def test_a_token_whose_experts_stay_is_not_touched(tmp_path):
    """First nobody chooses expert 2: its balance bias is far below. Then somebody does."""
    config = small_config("modern", *MOE, *SIGMOID)
    tensors, functions = model_tensors(config), []
    for low in (-100, 0):
        for layer in (1, 3):
            tensors["balance_bias", f"layers.{layer}.router"] = ("F32", np.array([0, 0, low, 0], np.float32))
        source = save(tmp_path / str(low) / "checkpoints", 1, tensors, config=config.model_dump(mode="json"))
        plan, new = operate(
            [source], lambda s: plan_prune(s, 3, {1: [9, 9, 0, 9], 3: [9, 9, 0, 9]}), tmp_path / f"n{low}"
        )
        assert plan.preserves.startswith("a layer's output for tokens whose experts there all stay")
        functions.append(largest(logits(new), logits(source)))
    assert functions[0] < TOLERANCE and functions[1] > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("by_load", [False, True])
def test_merged_experts_are_the_weighted_average(dtype, by_load, tmp_path):
    source = make(tmp_path / "old", small_config("paper", *MOE, *SIGMOID), dtype=dtype)
    groups = {1: [[2, 0], [1, 3]], 3: [[3], [1, 2], [0]]}
    loads = LOADS if by_load else None
    _, new = operate([source], lambda s: plan_merge(s, groups, loads=loads), tmp_path / "new")
    made = load(new)
    for (kind, name), (stored, array) in load(source).items():
        if kind not in ("weight", "balance_bias"):
            continue
        truth = array
        if ".experts." in name or "router" in name:
            layer = int(name.split(".")[1])
            rows = []
            for group in groups[layer]:
                load_of = [LOADS[layer][e] if by_load and sum(LOADS[layer][i] for i in group) else 1.0 for e in group]
                shares = np.array(load_of) / sum(load_of)
                rows.append(sum(share * decode(array[e], stored) for share, e in zip(shares, group, strict=True)))
            exact = np.stack(rows)
            truth = exact.astype(np.float32) if stored == "F32" else encode(exact, "BF16", name)
        assert (made[kind, name][1] == truth).all(), name


@pytest.mark.parametrize("by", ["router", "weights"])
def test_twins_are_found_and_merged_back(by, tmp_path):
    source = make(tmp_path / "old", small_config("modern", *MOE, *SIGMOID))
    _, twice = operate([source], lambda s: plan_resize(s, (8, 6)), tmp_path / "twice")

    def plan(sources):
        groups = alike_groups(sources, 4, by)
        assert groups == {1: [[0, 1], [2, 3], [4, 5], [6, 7]], 3: [[0, 1], [2, 3], [4], [5]]}
        return plan_merge(sources, groups)

    _, back = operate([twice], plan, tmp_path / "back")
    truth = {key: tensor for key, tensor in load(source).items() if key[0] != "exp_avg"}
    assert same(load(back), truth)


def test_alike_experts_are_grouped_by_average_linkage(tmp_path):
    """Rows at known angles: 0 and 3 are nearest, then 1 and 2, whichever way they are scaled."""
    config = small_config("paper", *MOE)
    tensors = model_tensors(config)
    degrees = np.radians([0, 50, 90, 10])
    row = np.zeros((4, 16), np.float32)
    row[:, 0], row[:, 1] = np.cos(degrees) * [1, 5, 2, 9], np.sin(degrees) * [1, 5, 2, 9]
    for layer in (1, 3):
        tensors["weight", f"layers.{layer}.router.weight"] = ("F32", row)
    source = save(tmp_path / "known" / "checkpoints", 1, tensors, config=config.model_dump(mode="json"))
    with Sources([source]) as sources:
        assert alike_groups(sources, 3)[1] == [[0, 3], [1], [2]]
        assert alike_groups(sources, 2)[1] == [[0, 3], [1, 2]]
        assert alike_groups(sources, 1)[1] == [[0, 1, 2, 3]]


GROWN = {
    "normalised softmax": [],
    "softmax alone": ["moe.normalize_gates=false"],
    "select then softmax": ["moe.gate_order=select_then_softmax"],
    "sigmoid with balance biases": SIGMOID,
    "softmax with groups": ["moe.num_expert_groups=2", "moe.num_selected_groups=1"],
}


@pytest.mark.parametrize("rule", GROWN)
def test_twice_the_experts_at_twice_the_choices_are_the_same_function(rule, tmp_path):
    source = make(tmp_path / "old", small_config("modern", *MOE, *GROWN[rule]))
    plan, new = operate([source], lambda s: plan_resize(s, 12, settings=["moe.top_k=6"]), tmp_path / "new")
    assert plan.preserves.startswith("the function, where no token is dropped")
    assert largest(logits(new), logits(source)) < TOLERANCE
    plan, other = operate([source], lambda s: plan_resize(s, 8), tmp_path / "other")
    assert plan.preserves.startswith("the experts, not the choice")
    assert largest(logits(other), logits(source)) > 100 * TOLERANCE


def test_where_copies_do_not_share_a_gate_nothing_is_promised(tmp_path):
    source = make(tmp_path / "old", small_config("modern", *MOE, *SIGMOID, "moe.normalize_gates=false"))
    plan, new = operate([source], lambda s: plan_resize(s, 8, settings=["moe.top_k=4"]), tmp_path / "new")
    assert not plan.preserves.startswith("the function")
    assert largest(logits(new), logits(source)) > 100 * TOLERANCE


def test_changed_rules_are_told_and_take_the_promise_back(tmp_path):
    source = make(tmp_path / "old", small_config("modern", *MOE))
    for number, plan_of in enumerate((
        lambda s, more: plan_resize(s, 4, settings=more),
        lambda s, more: plan_prune(s, 3, LOADS, settings=more),
        lambda s, more: plan_resize(s, 8, settings=["moe.top_k=4", *more]),
    )):  # fmt: skip
        with Sources([source]) as sources:
            kept = plan_of(sources, [])
            plan = plan_of(sources, ["moe.routed_scaling_factor=2"])
        assert plan.preserves == "the experts that stay, under other rules" != kept.preserves, number
        assert "moe.routed_scaling_factor is 2.0, in the source 1.0" in plan.notes
    with Sources([source]) as sources:
        assert plan_resize(sources, 4, settings=["moe.top_k=3"]).preserves != "all of it"


def test_grown_experts_stand_by_their_originals_the_busiest_once_more(tmp_path):
    source = make(tmp_path / "old", small_config("paper", *MOE, *SIGMOID))
    _, new = operate([source], lambda s: plan_resize(s, (6, 3), loads=LOADS, noise=0.1), tmp_path / "new")
    old, made = load(source), load(new)
    origin = {1: [0, 1, 1, 2, 3, 3], 3: [0, 1, 3]}
    for (kind, name), (_, array) in made.items():
        if ".experts." not in name and "router" not in name:
            continue
        layer = int(name.split(".")[1])
        for number, expert in enumerate(origin[layer]):
            is_copy = number > 0 and origin[layer][number - 1] == expert
            difference = np.abs(array[number] - old[kind, name][1][expert])
            assert (difference > 0).mean() > 0.99 if is_copy and kind == "weight" else difference.max() == 0, name


def test_shrinking_by_resize_is_pruning_or_merging(tmp_path):
    source = make(tmp_path / "old", small_config("modern", *MOE))
    pairs = (
        (lambda s: plan_resize(s, 2, loads=LOADS), lambda s: plan_prune(s, 2, LOADS)),
        (lambda s: plan_resize(s, 2, shrink="merge"), lambda s: plan_merge(s, alike_groups(s, 2))),
    )
    for number, (one, other) in enumerate(pairs):
        made = [load(operate([source], plan, tmp_path / f"{number}{i}")[1]) for i, plan in enumerate((one, other))]
        assert same(*made)


@pytest.mark.parametrize(("dtype", "masters"), [("F32", False), ("BF16", True), ("F16", False)])
def test_an_average_is_the_whole_tensor_sum_in_fp64(dtype, masters, tmp_path):
    config = small_config("paper", *MOE, *SIGMOID)
    other = small_config("paper", *MOE, *SIGMOID, "moe.capacity_factor=3", "optimizer.lr=0.1")
    configs = (config, other, config)
    folders = [make(tmp_path / str(i), c, i, dtype=dtype, masters=masters) for i, c in enumerate(configs)]
    _, new = operate(folders, lambda s: plan_average(s, [1, 2, 5]), tmp_path / "new")
    best = "master" if masters else "weight"
    sources, made = [load(folder) for folder in folders], load(new)
    assert set(made) == {key for key in sources[0] if key[0] in ("weight", "balance_bias")}
    for (kind, name), (stored, array) in made.items():
        key = (best if kind == "weight" else kind, name)
        terms = [decode(source[key][1], source[key][0]) for source in sources]
        exact = terms[0] * (1 / 8) + terms[1] * (2 / 8) + terms[2] * (5 / 8)
        assert stored == "F32" and (array == exact.astype(np.float32)).all(), name
    _, even = operate(folders[:1] * 2, plan_average, tmp_path / "even")
    assert all((array == decode(sources[0][best, name][1], sources[0][best, name][0])).all()
               for name, array in weights_of(even).items())  # fmt: skip


WIDE = ["model.num_layers=2", "model.hidden_size=128", "model.ffn_hidden_size=1024", "moe.layer_pattern=1"]


def test_noise_is_gaussian_relative_and_the_same_whatever_the_windows(tmp_path, monkeypatch):
    dense = make(tmp_path / "dense", small_config("paper", *WIDE))
    runs = []
    for number, (block, part) in enumerate([(16 << 20, 1 << 30), (40_000, 100_000), (72_008, 1 << 30)]):
        monkeypatch.setattr(manifest, "BLOCK_BYTES", block)
        monkeypatch.setattr(execute, "PART_BYTES", part)
        plan, new = operate([dense], lambda s: plan_upcycle(s, 2, noise=0.05, seed=7), tmp_path / str(number))
        runs.append(load(new))
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    assert plan.preserves.endswith("but for the noise")
    old, made = weights_of(dense), {name: array for (_, name), (_, array) in runs[0].items()}
    draws = []
    for ending in ("fc1.weight", "fc2.weight"):
        base = old[f"layers.0.ffn.{ending}"].astype(np.float64)
        for e in range(2):
            noise = (made[f"layers.0.experts.{ending}"][e] - base).reshape(-1) / np.sqrt(np.square(base).mean())
            assert abs(noise.std() / 0.05 - 1) < 0.01 and abs(noise.mean()) < 0.001
            assert abs((np.abs(noise) > 0.1).mean() - 0.0455) < 0.003  # beyond two standard deviations
            draws.append(noise)
    correlations = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlations).max() < 0.02
    assert abs(np.corrcoef(draws[0][: numbers.CHUNK], draws[0][numbers.CHUNK :])[0, 1]) < 0.02


def test_rounding_is_to_the_nearest_with_ties_to_even():
    """Against exact fractions: no candidate is nearer, and of two as near the even one is taken."""
    generator = np.random.default_rng(0)
    near = generator.standard_normal(400) * 10.0 ** generator.integers(-40, 30, 400)
    ones = decode(np.arange(0x3F80, 0x3FC0, dtype=np.uint16), "BF16")  # from 1 on
    middles = np.concatenate([ones + 2.0**-8, ones + 2.0**-11])  # halfway to the next in BF16 and in F16
    ties = np.concatenate([middles, np.nextafter(middles, 9), np.nextafter(middles, 0), [0.0, -0.0, 1e-45, 2.0**-134]])
    for dtype, values in (
        ("BF16", np.concatenate([near, ties])),
        ("F16", np.concatenate([near[np.abs(near) < 6e4], ties])),
    ):
        bits = encode(values, dtype, "t")
        for value, stored in zip(values, bits, strict=True):
            around = [b for b in (int(stored) - 1, int(stored), int(stored) + 1) if 0 <= b < 65536]
            options = decode(np.array(around, np.uint16), dtype)
            gaps = {b: abs(Fraction(float(o)) - Fraction(float(value)))
                    for b, o in zip(around, options, strict=True) if np.isfinite(o)}  # fmt: skip
            best = min(gaps.values())
            assert gaps[int(stored)] == best, (dtype, value)
            if sum(gap == best for gap in gaps.values()) > 1 and value:
                assert stored % 2 == 0, (dtype, value)
