"""What preflight makes of its figures: limits, majorities, and who is to blame. No process is started."""

import itertools

import pytest

from megamoe.launch.environment import RankEnvironment, node_name
from megamoe.preflight.findings import Finding, Report, judge_clocks, judge_rates, judge_same, missing_ranks
from megamoe.preflight.links import Link, judge_links, link_limit, retests, ring, rounds
from megamoe.preflight.nodes import by_node, expected_nodes, nodes_of_missing
from megamoe.preflight.report import failure_sentence, file_name, table


def report(findings, num_nodes=4) -> Report:
    return Report({f"n{number}": [number] for number in range(num_nodes)}, tuple(findings))


def bad_nodes(findings, num_nodes=4):
    return report(findings, num_nodes).bad_hosts


# ---------------------------------------------------------------- clocks, versions, rates


@pytest.mark.parametrize(
    ("offsets", "bad"),
    [
        ((0.0, 0.1, -0.3, 0.2), ()),
        ((0.0, 100.0, 0.3, -0.2), ("n1",)),
        ((0.0, -99.0, -100.0, -99.5), ("n0",)),  # the clock that others were compared with
        ((0.0, 0.0, 60.0, -60.0, 0.1), ("n2", "n3")),
        ((0.0, 3.0, 0.0), ()),  # 3 s, known to 1.5 s only
    ],
)
def test_clocks_are_held_to_the_median(offsets, bad):
    findings = judge_clocks({f"n{number}": (offset, 1.5) for number, offset in enumerate(offsets)}, 2.0)
    assert bad_nodes(findings, len(offsets)) == bad
    assert len(findings) == len(offsets)


def test_clocks_without_a_majority_blame_nobody():
    for offsets in ((0.0, 50.0), (0.0, 0.0, 50.0, 50.0)):
        found = report(judge_clocks({f"n{n}": (each, 0.0) for n, each in enumerate(offsets)}, 2.0), len(offsets))
        assert not found.is_good and found.bad_hosts == () and len(found.problems) == 1
    assert report(judge_clocks({"n0": (0.0, 0.0)}, 2.0), 1).is_good


def test_versions_are_held_to_the_majority():
    values = {"n0": {"v": "1", "w": "a"}, "n1": {"v": "2", "w": "a"}, "n2": {"v": "1", "w": "a"}}
    findings = judge_same(values)
    assert bad_nodes(findings, 3) == ("n1",)
    assert [each.message for each in findings if each.verdict == "bad"] == ["n1 has v 2, the others have 1"]
    two = report(judge_same({"n0": {"v": "1"}, "n1": {}}), 2)
    assert two.bad_hosts == () and two.problems == ("the nodes do not have the same v: 1 on n0, none on n1",)


def test_rates_are_held_to_the_median_rank():
    rates = {"n0": [100.0, 99.0], "n1": [101.0, 60.0], "n2": [80.0, 100.0]}
    findings = judge_rates(rates, 0.75)
    assert bad_nodes(findings, 3) == ("n1",)
    assert [each.measured for each in findings] == [99.0, 60.0, 80.0]
    assert bad_nodes(judge_rates({"n0": [100.0], "n1": [50.0]}, 0.75), 2) == ("n1",)  # of two the slower one


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("num_nodes", [0, 1, 2, 3, 4, 5, 8, 33])
def test_the_ring_gives_every_node_two_neighbours_and_its_rounds_no_node_two_at_once(num_nodes):
    pairs = ring(num_nodes)
    degrees = [sum(node in pair for pair in pairs) for node in range(num_nodes)]
    assert degrees == [min(2, num_nodes - 1)] * num_nodes
    planned = rounds(pairs)
    assert sorted(itertools.chain(*planned)) == pairs and len(planned) <= 3
    for each in planned:
        nodes = list(itertools.chain(*each))
        assert len(nodes) == len(set(nodes))


def links_of(num_nodes, bad, pairs=None):
    """A link is slow where one of its ends is bad."""
    return {
        pair: Link(1e8 if set(pair) & set(bad) else 1e9, 1e-5) for pair in (ring(num_nodes) if pairs is None else pairs)
    }


@pytest.mark.parametrize(
    ("num_nodes", "bad"),
    [
        *((size, (node,)) for size in (3, 4, 5, 6) for node in range(size)),
        (6, (1, 3)), (6, (2, 3)), (8, (0, 4)), (8, (0, 7)), (9, (1, 3, 5)), (16, (2, 7, 12)),
    ],
)  # fmt: skip
def test_exactly_the_bad_nodes_are_found(num_nodes, bad):
    links = links_of(num_nodes, bad)
    again = links_of(num_nodes, bad, retests(links, 0.5))
    names = [f"n{number}" for number in range(num_nodes)]
    findings = judge_links(names, links, again, 0.5)
    assert bad_nodes(findings, num_nodes) == tuple(f"n{node}" for node in bad)


def test_without_a_second_test_a_node_between_two_bad_ones_would_be_blamed():
    links = links_of(6, (1, 3))
    assert {2} <= {node for pair in retests(links, 0.5) for node in pair}
    assert bad_nodes(judge_links([f"n{n}" for n in range(6)], links, {}, 0.5), 6) == ("n1", "n2", "n3")


def test_one_slow_cable_is_a_note():
    links = links_of(4, ()) | {(1, 2): Link(1e8, 1e-5)}
    findings = judge_links(["a", "b", "c", "d"], links, {}, 0.5)
    assert [each.message for each in findings if each.verdict == "note"] == [
        "between b and c: 100.0 MB/s, less than 500.0; both exchange data fast with others"
    ]
    assert report(findings).is_good and retests(links, 0.5) == []


def test_dead_links_do_not_lower_the_limit():
    """Of four nodes two have no network: three of four links are dead."""
    dead = Link(0.0, 0.0, "refused")
    links = {(0, 1): Link(1e9, 1e-5), (0, 3): dead, (1, 2): dead, (2, 3): dead}
    assert link_limit(links, 0.5) == 5e8
    assert retests(links, 0.5) == [(0, 2), (1, 3)]
    findings = judge_links(["n0", "n1", "n2", "n3"], links, dict.fromkeys(retests(links, 0.5), dead), 0.5)
    assert bad_nodes(findings) == ("n2", "n3")
    message = "n2 exchanges 0.0 MB/s at best with 3 other nodes, less than 500.0: refused"
    assert message in [each.message for each in findings]


def test_two_nodes_are_not_compared_but_must_connect():
    good = judge_links(["n0", "n1"], {(0, 1): Link(1e3, 1.0)}, {}, 0.5)
    assert report(good, 2).is_good
    dead = report(judge_links(["n0", "n1"], {(0, 1): Link(0.0, 0.0, "refused")}, {}, 0.5), 2)
    assert dead.bad_hosts == () and dead.problems == ("no two nodes could exchange data: refused",)
    assert judge_links(["n0"], {}, {}, 0.5) == []


# ---------------------------------------------------------------- blame


def test_what_all_nodes_fail_is_nobodys():
    findings = [Finding("disk", f"n{n}", "bad", message=f"no room on n{n}") for n in range(4)]
    found = report([*findings, Finding("clock", "n2", "bad", message="late")])
    assert found.bad_hosts == ("n2",) and found.problems == ("no room on n0, as on all nodes",)
    assert failure_sentence(found) == (
        "preflight found n2 bad: start again without; preflight found what leaving out a node does not mend: "
        "no room on n0, as on all nodes"
    )
    assert report(findings[:3]).bad_hosts == ("n0", "n1", "n2") and report(findings[:3]).problems == ()


def test_missing_ranks_are_told_by_node():
    findings = missing_ranks({3: "n1", 4: "n2", 5: "n2", 6: None}, (3, 4, 5, 6), "in time")
    assert [each.message for each in findings] == [
        "rank 3 on n1 did not answer in time", "ranks 4, 5 on n2 did not answer in time",
        "rank 6 of a node whose name is not known did not answer in time",
    ]  # fmt: skip
    assert bad_nodes(findings) == ("n1", "n2")


def test_the_table_has_a_line_for_each_node_and_marks_what_is_beyond_its_limit():
    findings = [
        Finding("clock", "n0", "good", 0.01, 2.0, "seconds"),
        Finding("clock", "n1", "bad", 90.0, 2.0, "seconds", "late"),
        Finding("link", "n0", "good", 2e9, 1e9, "bytes/s"),
    ]
    assert table(Report({"n0": [0, 1], "n1": [2, 4]}, tuple(findings)), 1.25).splitlines() == [
        "node  ranks  clock    best link  verdict",
        "n0    0-1    0.010 s  2000 MB/s  good",
        "n1    2,4    90 s!    -          bad",
        "bad: late",
        "preflight of 2 nodes: bad: n1, 1.2 s",
    ]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/abs", ".hidden", "", "a/b", "..", "all_nodes"])
def test_no_name_of_a_node_leads_out_of_the_folder(name):
    assert "/" not in file_name(name) and not file_name(name).startswith(".") and file_name(name)
    assert file_name(name) != "all_nodes"


# ---------------------------------------------------------------- names


def environment(rank=0, world=8, local=2, source="srun") -> RankEnvironment:
    return RankEnvironment(rank, world, rank % local, local, "tcp://n1:1", source)


def test_slurm_says_where_a_rank_should_be():
    env = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert expected_nodes(env) == {0: "n1", 1: "n1", 2: "n2", 3: "n2", 4: "n3"}
    assert expected_nodes(env | {"SLURM_DISTRIBUTION": "block:cyclic"}) == expected_nodes(env)
    for strange in ({"SLURM_DISTRIBUTION": "cyclic"}, {"SLURM_STEP_NODELIST": "n[1-"}, {"SLURM_STEP_NODELIST": "n1"}):
        assert expected_nodes(env | strange) == {}
    assert expected_nodes({}) == {}


def test_a_missing_rank_is_where_slurm_put_it_or_where_its_neighbours_are():
    present = {0: "n1", 1: "n1", 2: "n2", 4: "n3", 5: "n3"}
    env = {"SLURM_STEP_NODELIST": "a,b,c,d", "SLURM_STEP_TASKS_PER_NODE": "2(x4)"}
    assert nodes_of_missing(present, environment(), env) == {3: "b", 6: "d", 7: "d"}
    assert nodes_of_missing(present, environment(source="torchrun"), {}) == {3: "n2", 6: None, 7: None}
    assert by_node({1: "b", 0: "a", 2: "b"}) == {"a": [0], "b": [1, 2]}


def test_the_name_of_a_node():
    assert node_name({"SLURMD_NODENAME": "n1"}) == "n1"
    assert node_name({"SLURMD_NODENAME": "n1", "MEGAMOE_NODE_NAME": "played"}) == "played"
    assert node_name({})
