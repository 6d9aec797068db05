"""Preflight on forked ranks that play nodes: the bad node is named, no good one is, and every wait has its end."""

import json
import os
import resource
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megamoe.config.schema import Config
from megamoe.errors import DataError, PreflightFailed
from megamoe.launch.environment import rank_environment
from megamoe.preflight import local_checks, measure, run
from megamoe.preflight.links import Link
from megamoe.runs import restarts
from megamoe.runs.events import read_events
from tests.harness import run_ranks

CHECK_SECONDS = 6.0
BUSY_SECONDS = 10.0  # beyond a wait's bound, on a machine with more to do
# The cores of this machine are shared, so limits are wider than for nodes of their own.
SETTINGS = {"max_clock_difference_seconds": 20.0, "min_relative_compute": 0.05, "min_relative_bandwidth": 0.03}
JOB = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[1-3]"}


class Waits(NamedTuple):
    """Seconds for ranks to come, and for a link."""

    meeting: float
    link: float


WAITS = Waits(10.0, 5.0)
SHORT_WAITS = Waits(6.0, 3.0)  # where all of it is waited for


class Outcome(NamedTuple):
    """Of one rank: the error's message, and how long it took."""

    message: str
    seconds: float


# ---------------------------------------------------------------- faults, each as it is on a rank of a bad node


def small_files(_: dict) -> None:
    """As a full disk: a write of more fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def full_disk(_: dict) -> None:
    usage = local_checks.shutil.disk_usage
    local_checks.shutil.disk_usage = lambda path: usage(path)._replace(free=1000)


def little_memory(_: dict) -> None:
    local_checks.available_memory = lambda: 1000


def unreadable_data(_: dict) -> None:
    def fail(path):
        raise DataError(f"cannot open {path}.idx: Input/output error")

    local_checks.IndexedDataset = fail


def other_version(_: dict) -> None:
    versions = local_checks.versions
    local_checks.versions = lambda config: versions(config) | {"version of torch": "0.4.1"}


def other_config(payload: dict) -> None:
    payload["config"]["run"]["seed"] = 77


def no_gpus(payload: dict) -> None:
    payload["device_problem"] = "run.device cuda needs a GPU for each of the 2 ranks of this machine, and 1 is visible"


def clock_ahead(_: dict) -> None:
    run.now = lambda: time.time() + 300.0


def clock_behind(_: dict) -> None:
    run.now = lambda: time.time() - 200.0


def slow_compute(_: dict) -> None:
    multiply = measure.multiply
    measure.multiply = lambda a, b: [multiply(a, b) for _ in range(100)]


def slow_network(_: dict) -> None:
    round_trip = measure.round_trip

    def slowly(group, tensor, peer, leads):
        time.sleep(0.5 if tensor.numel() > 1000 else 0.0)
        return 0.5 + round_trip(group, tensor, peer, leads)

    measure.round_trip = slowly


def no_network(_: dict) -> None:
    measure.measure_link = lambda store, **_: Link(0.0, 0.0, "no route to host")


def silent_in_checks(_: dict) -> None:
    local_checks.versions = lambda config: time.sleep(CHECK_SECONDS + BUSY_SECONDS) or {}


def silent_in_links(_: dict) -> None:
    measure.measure_link = lambda store, **_: time.sleep(8 * SHORT_WAITS.link + BUSY_SECONDS) or Link(0.0, 0.0)


def absent(_: dict) -> None:
    raise SystemExit(0)  # the rank never comes


# ---------------------------------------------------------------- ranks


def rank_side(
    folder: str, nodes: Sequence[str], faults: Mapping[str, Callable[[dict], None]], port: int | None, data: str | None,
    waits: Waits,
) -> Outcome:  # fmt: skip
    """One rank of a preflight on `nodes`, the node of each rank, with the fault of its node."""
    environment = rank_environment()
    os.environ["MEGAMOE_NODE_NAME"] = name = nodes[environment.rank]
    counts = [nodes.count(each) for each in dict.fromkeys(nodes)]
    os.environ |= {
        "SLURM_STEP_NODELIST": ",".join(dict.fromkeys(nodes)),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counts)), "MEGAMOE_ATTEMPT": "3",
    }  # fmt: skip
    measure.MEASURE_SECONDS, run.LINK_SECONDS, run.CHECK_SECONDS = 0.2, waits.link, CHECK_SECONDS
    config = {"preflight": SETTINGS | {"meeting_timeout_seconds": waits.meeting}}
    config |= {"data": {"train": [{"path": data}]}} if data else {}
    payload = {"config": config, "run_dir": folder, "attempt": 3, "device_problem": None}
    payload["config"] = Config.model_validate(config).model_dump(mode="json")
    place = environment.rank - nodes.index(name)
    environment = replace(environment, local_rank=place, local_world_size=nodes.count(name))
    if port is not None:
        environment = replace(environment, init_method=f"tcp://127.0.0.1:{port}", source="torchrun")
    began = time.monotonic()
    try:
        if name in faults:
            faults[name](payload)
        run.Preflight(payload, environment).run()
    except PreflightFailed as error:
        return Outcome(str(error), time.monotonic() - began)
    except SystemExit:
        return Outcome("absent", 0.0)
    return Outcome("", time.monotonic() - began)


def preflight(
    folder: Path, faults: Mapping[str, Callable[[dict], None]], *, num_nodes: int = 4, ranks_per_node: int = 2,
    port: int | None = None, data: str | None = None, waits: Waits = WAITS,
) -> list[Outcome]:  # fmt: skip
    nodes = [f"node{1 + number}" for number in range(num_nodes) for _ in range(ranks_per_node)]
    payload = (str(folder), nodes, faults, port, data, waits)
    return run_ranks(rank_side, len(nodes), *payload, init=False, timeout_seconds=100.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def event_of(folder: Path) -> dict[str, Any]:
    (event,) = [event for event in read_events(folder) if event["kind"] == "preflight"]
    return event


def node_file(folder: Path, node: str) -> dict[str, Any]:
    return json.loads((folder / "preflight" / "attempt_0003" / f"{node}.json").read_text())


# ---------------------------------------------------------------- nodes that are good, or bad


def test_good_nodes_are_good(tmp_path, capsys):
    outcomes = preflight(tmp_path, {})
    assert [each.message for each in outcomes] == [""] * 8
    event = event_of(tmp_path)
    assert (event["attempt"], event["bad_hosts"], event["problems"]) == (3, [], [])
    assert event["hosts"] == ["node1", "node2", "node3", "node4"]
    for number in range(1, 5):
        found = node_file(tmp_path, f"node{number}")
        assert (found["verdict"], found["ranks"]) == ("good", [2 * number - 2, 2 * number - 1])
        checks = {each["check"]: each for each in found["findings"]}
        assert checks.keys() >= {"run.dir", "free disk", "free memory", "clock", "compute", "link"}
        assert checks["same configuration"]["verdict"] == checks["same version of torch"]["verdict"] == "good"
        assert checks["link"]["measured"] > checks["link"]["limit"] > 1e6  # a loopback moves more than 1 MB/s
        assert checks["compute"]["measured"] > checks["compute"]["limit"] > 1e8
        assert abs(checks["clock"]["measured"]) < 1.0
        assert checks["free disk"]["measured"] > checks["free disk"]["limit"] > 1e6
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [[f"node{n}", f"{2 * n - 2}-{2 * n - 1}"] for n in range(1, 5)]
    assert lines[5].startswith("preflight of 4 nodes: all good, ")
    assert not list(tmp_path.glob(".preflight*"))


@pytest.mark.parametrize(
    ("fault", "node", "words"),
    [
        (small_files, "node3", "cannot be written on node3 (File too large)"),
        (full_disk, "node2", "has 0.0 GiB free on node2, and a checkpoint takes "),
        (little_memory, "node2", "node2 has 0.0 GiB of memory free, and a save in the background takes "),
        (other_version, "node4", "node4 has version of torch 0.4.1, the others have "),
        (other_version, "node1", "node1 has version of torch 0.4.1, the others have "),
        (other_config, "node2", "node2 has configuration "),
        (no_gpus, "node2", "on node2: run.device cuda needs a GPU for each of the 2 ranks"),
        (clock_ahead, "node4", "the clock of node4 is 300.0 s ahead"),
        (clock_behind, "node1", "the clock of node1 is 200.0 s behind"),  # rank 0's own is the one off
        (slow_compute, "node3", "node3 computes "),
        (slow_network, "node2", "node2 exchanges "),
        (slow_network, "node1", "node1 exchanges "),
        (no_network, "node3", "node3 exchanges 0.0 MB/s at best with "),
    ],
)
def test_a_bad_node_is_named_and_no_other(tmp_path, fault, node, words):
    outcomes = preflight(tmp_path, {node: fault})
    sentence = f"preflight found {node} bad: start again without"
    assert [each.message for each in outcomes] == [sentence] * 8  # all ranks come to the same
    event = event_of(tmp_path)
    assert (event["bad_hosts"], event["problems"]) == ([node], [])
    found = {name: node_file(tmp_path, name) for name in event["hosts"]}
    assert {name for name, each in found.items() if each["verdict"] == "bad"} == {node}
    messages = [each["message"] for each in found[node]["findings"] if each["verdict"] == "bad"]
    assert any(message.startswith(words) or words in message for message in messages), messages
    assert max(each.seconds for each in outcomes) < 8 * WAITS.link + CHECK_SECONDS + BUSY_SECONDS


def test_several_bad_nodes_are_all_named(tmp_path):
    outcomes = preflight(tmp_path, {"node2": clock_ahead, "node5": full_disk}, num_nodes=5, ranks_per_node=1)
    assert {each.message for each in outcomes} == {"preflight found node5, node2 bad: start again without"}
    assert event_of(tmp_path)["bad_hosts"] == ["node5", "node2"]


def test_a_node_between_two_slow_ones_is_not_blamed(tmp_path):
    """Both its links are slow, but it is fast with a third."""
    preflight(tmp_path, {"node1": slow_network, "node3": slow_network}, num_nodes=6, ranks_per_node=1)
    assert event_of(tmp_path)["bad_hosts"] == ["node1", "node3"]


# ---------------------------------------------------------------- what is no single node's


@pytest.mark.parametrize(
    ("faults", "num_nodes", "problem"),
    [
        (dict.fromkeys(("node1", "node2", "node3"), small_files), 3, "cannot be written on node1 (File too large), as"),
        ({"node1": full_disk}, 1, "has 0.0 GiB free on node1, and a checkpoint takes "),
        ({"node2": clock_ahead}, 2, "the clocks of node1, node2 are up to 300.0 s apart, with no majority for one"),
        ({"node1": other_version}, 2, "the nodes do not have the same version of torch: 0.4.1 on node1, "),
        ({"node2": no_network}, 2, "no two nodes could exchange data: "),
    ],
)
def test_what_leaving_a_node_out_does_not_mend_blames_nobody(tmp_path, faults, num_nodes, problem):
    outcomes = preflight(tmp_path, faults, num_nodes=num_nodes, ranks_per_node=1)
    found = event_of(tmp_path) if (tmp_path / "events.jsonl").exists() else None
    for each in outcomes:
        assert each.message.startswith("preflight found what leaving out a node does not mend: ")
        assert problem in each.message
    assert found is None or (found["bad_hosts"], len(found["problems"])) == ([], 1)


# ---------------------------------------------------------------- ranks that do not answer


@pytest.mark.parametrize("over", ["file", "tcp"])
def test_a_node_that_never_comes_is_named_by_the_others(tmp_path, over):
    port = free_port() if over == "tcp" else None
    outcomes = preflight(tmp_path, {"node3": absent}, port=port, waits=SHORT_WAITS)
    others = [each for rank, each in enumerate(outcomes) if rank not in (4, 5)]
    assert {each.message for each in others} == {"preflight found node3 bad: start again without"}
    assert SHORT_WAITS.meeting <= max(each.seconds for each in others) < SHORT_WAITS.meeting + BUSY_SECONDS
    event = event_of(tmp_path)
    assert (event["bad_hosts"], event["hosts"]) == (["node3"], ["node1", "node2", "node4"])
    (finding,) = node_file(tmp_path, "node3")["findings"]
    assert finding["message"] == "ranks 4, 5 on node3 did not answer within 6 s when all were asked for: presence"


@pytest.mark.parametrize("over", ["file", "tcp"])
def test_a_first_node_that_never_comes_is_named_by_each_other(tmp_path, over):
    port = free_port() if over == "tcp" else None
    restarts.start_attempt(str(tmp_path), JOB)
    outcomes = preflight(tmp_path, {"node1": absent}, num_nodes=3, ranks_per_node=1, port=port, waits=SHORT_WAITS)
    for number, each in ((2, outcomes[1]), (3, outcomes[2])):
        assert each.message.startswith(f"node{number} cannot reach rank 0 on node1 at ")
        assert each.seconds < 2 * SHORT_WAITS.meeting + BUSY_SECONDS
    decided = restarts.finish_attempt(str(tmp_path), 5, JOB)
    events = [event for event in read_events(tmp_path) if event["kind"] == "preflight"]
    told = sorted((event["kind"], *event["hosts"], event["unreachable_host"]) for event in events)
    assert told == [("preflight", "node2", "node1"), ("preflight", "node3", "node1")]
    assert decided.line == "requeue exclude=node1"  # as both others say so


@pytest.mark.parametrize(
    ("fault", "most_seconds"), [(silent_in_checks, CHECK_SECONDS), (silent_in_links, 8 * SHORT_WAITS.link)]
)
def test_a_node_that_falls_silent_is_named(tmp_path, fault, most_seconds):
    outcomes = preflight(tmp_path, {"node2": fault}, num_nodes=3, ranks_per_node=1, waits=SHORT_WAITS)
    assert outcomes[0].message == outcomes[2].message == "preflight found node2 bad: start again without"
    assert max(outcomes[0].seconds, outcomes[2].seconds) < most_seconds + BUSY_SECONDS
    assert event_of(tmp_path)["bad_hosts"] == ["node2"]
