"""One rank's way through a preflight. All ranks gather the same figures and so come to the same report."""

import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megamoe.config.schema import Config
from megamoe.errors import PreflightFailed
from megamoe.launch.environment import RankEnvironment, node_name, rank_environment
from megamoe.preflight import local_checks, measure
from megamoe.preflight.findings import Finding, Report, judge_clocks, judge_rates, judge_same, missing_ranks
from megamoe.preflight.links import Link, Pair, judge_links, retests, ring, rounds
from megamoe.preflight.meeting import Meeting, Unreachable
from megamoe.preflight.nodes import by_node, expected_nodes, nodes_of_missing
from megamoe.preflight.report import failure_sentence, record_unreachable, table, write_report

CHECK_SECONDS = 120.0  # for the checks of a node: a disk that takes longer is none to train with
LINK_SECONDS = 20.0  # for each wait on a link
MIN_FREE_GPU_MEMORY = 0.9  # of the whole: nobody else is on it


def run_rank(payload: Mapping[str, Any]) -> None:
    """`payload`: "config" (resolved, or None), "run_dir" (or None), "attempt" (a number), "device_problem" (why there
    are not the GPUs that were asked for, or None).

    Raises PreflightFailed, on every rank, where a node is bad or the nodes do not go together.
    """
    Preflight(payload, rank_environment()).run()


class FirstRankUnreachable(PreflightFailed):
    """One node's own finding: the others have theirs."""


class Stopped(Exception):
    """Ranks did not answer: what is known by now is the report."""


class Preflight:
    """The checks in their order; `findings` grows alike on all ranks."""

    def __init__(self, payload: Mapping[str, Any], environment: RankEnvironment) -> None:
        self.config = None if payload["config"] is None else Config.model_validate(payload["config"])
        self.settings = (self.config or Config()).preflight
        self.run_dir = None if payload["run_dir"] is None else Path(payload["run_dir"])
        self.attempt, self.environment = payload["attempt"], environment
        self.device_problem: str | None = payload["device_problem"]
        self.findings: list[Finding] = []
        self.names: dict[int, str] = {}  # node by rank, of those that have come
        self.present: list[int] = []  # ranks that answered when they were asked last
        self.nodes: dict[str, list[int]] = {}
        self.began = time.monotonic()

    def run(self) -> None:
        """Raises PreflightFailed."""
        rank = self.environment.rank
        try:
            meeting = Meeting(self.environment, self.settings.meeting_timeout_seconds)
            with contextlib.suppress(Stopped):
                self._check(meeting)
            report = Report(self.nodes, tuple(self.findings))
            if rank == 0:
                self._tell(report)
            meeting.leave((other for other in self.present if other != 0), CHECK_SECONDS)
        except Unreachable as error:
            self._blame_first_rank(str(error))
        if not report.is_good:
            raise PreflightFailed(failure_sentence(report))

    def _check(self, meeting: Meeting) -> None:
        node, rank = node_name(), self.environment.rank
        self._gather(meeting, "presence", node, self.settings.meeting_timeout_seconds)
        device = measure.choose_torch_device(self.environment.local_rank)
        own = self._own_figures(node, device)
        figures = self._gather(meeting, "checks", own, CHECK_SECONDS)
        self._judge_figures(figures)
        if len({each["device"] for each in figures.values()}) > 1:  # found bad; the network is looked at all the same
            device = torch.device("cpu")
        leaders = [ranks[0] for ranks in self.nodes.values()]
        offset = meeting.clock_offset(leaders, CHECK_SECONDS, now)
        offsets = self._gather(meeting, "clocks", offset, CHECK_SECONDS)
        self._judge_clocks({self.names[leader]: offsets[leader] for leader in leaders})
        self._check_links(meeting, device)
        if Report(self.nodes, tuple(self.findings)).is_good:
            error = measure.all_reduce_all(
                dist.PrefixStore("world", meeting.store), rank=rank, world_size=self.environment.world_size,
                device=device, timeout_seconds=LINK_SECONDS,
            )  # fmt: skip
            errors = self._gather(meeting, "a sum over all ranks", error, 3 * LINK_SECONDS)
            text = next((each for each in errors.values() if each), "")
            message = f"a sum over all ranks failed: {text}" if text else ""
            self.findings.append(Finding("all-reduce", None, "bad" if text else "good", message=message))

    def _gather(self, meeting: Meeting, what: str, value: Any, timeout_seconds: float) -> dict[int, Any]:
        """What all say. Raises Stopped where not all do."""
        gathered = meeting.gather(what, value, timeout_seconds)
        if what == "presence":
            self.names = gathered.values
            self.nodes = by_node(self.names)
        self.present = list(gathered.values)
        if gathered.missing:
            names = self.names | nodes_of_missing(self.names, self.environment)
            when = f"within {timeout_seconds:g} s when all were asked for: {what}"
            self.findings += missing_ranks(names, gathered.missing, when)
            raise Stopped
        return gathered.values

    def _own_figures(self, node: str, device: Any) -> dict[str, Any]:
        """The first rank of a node looks at the node, every rank at its device."""
        ranks = self.nodes[node]
        findings: list[Finding] = []
        if ranks[0] == self.environment.rank:
            share = len(ranks) / self.environment.world_size
            findings = local_checks.check_node(node, self.config, self.run_dir, share_of_ranks=share)
        memory = measure.gpu_memory(device)
        if memory is not None:
            free, total = memory
            limit = MIN_FREE_GPU_MEMORY * total
            is_bad, gpu = free < limit, f"the GPU of rank {self.environment.rank} on {node}"
            message = f"{gpu} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: something else is on it"
            verdict = "bad" if is_bad else "good"
            findings.append(
                Finding("free GPU memory", node, verdict, free, limit, "bytes", message if is_bad else "")
            )
        if self.device_problem is not None:
            findings.append(Finding("GPUs", node, "bad", message=f"on {node}: {self.device_problem}"))
        return {
            "findings": [asdict(each) for each in findings],
            "same": local_checks.versions(self.config),
            "device": device.type,
            "rate": measure.product_rate(device),
        }

    def _judge_figures(self, figures: Mapping[int, Any]) -> None:
        self.findings += [Finding(**each) for rank in sorted(figures) for each in figures[rank]["findings"]]
        same = {node: dict(figures[ranks[0]]["same"]) for node, ranks in self.nodes.items()}
        for node, ranks in self.nodes.items():
            same[node]["kind of device"] = "/".join(sorted({figures[rank]["device"] for rank in ranks}))
        self.findings += judge_same(same)
        rates = {node: [figures[rank]["rate"] for rank in ranks] for node, ranks in self.nodes.items()}
        self.findings += judge_rates(rates, self.settings.min_relative_compute)

    def _judge_clocks(self, offsets: Mapping[str, Any]) -> None:
        known = {node: tuple(offset) for node, offset in offsets.items() if offset is not None}
        self.findings += judge_clocks(known, self.settings.max_clock_difference_seconds)
        for node in offsets.keys() - known.keys():
            self.findings.append(Finding("clock", node, "note", message=f"the clock of {node} could not be asked for"))

    def _check_links(self, meeting: Meeting, device: Any) -> None:
        least = self.settings.min_relative_bandwidth
        links = self._measure_links(meeting, device, "links", ring(len(self.nodes)))
        again = self._measure_links(meeting, device, "links again", retests(links, least))
        self.findings += judge_links(list(self.nodes), links, again, least)

    def _measure_links(self, meeting: Meeting, device: Any, what: str, pairs: list[Pair]) -> dict[Pair, Link]:
        """In rounds, so that no node is measured with two others at once; rank by rank of both nodes at a time."""
        measured: dict[Pair, Link] = {}
        nodes, own = list(self.nodes.values()), list(self.nodes).index(self.names[self.environment.rank])
        for number, each_round in enumerate(rounds(pairs)):
            pair = next((pair for pair in each_round if own in pair), None)
            link = None if pair is None else self._measure_pair(meeting, device, nodes, own, pair, f"{what} {number}")
            waits = 8 * LINK_SECONDS  # two in a row that are over, and their clean-up, are far below
            said = self._gather(meeting, f"{what}, round {number + 1}", link, waits)
            for one, other in each_round:
                found = [Link(**said[rank]) for node in (one, other) for rank in nodes[node] if said[rank] is not None]
                measured[one, other] = min(found, key=lambda link: link.bytes_per_second)
        return measured

    def _measure_pair(
        self, meeting: Meeting, device: Any, nodes: list[list[int]], own: int, pair: Pair, name: str
    ) -> dict[str, Any] | None:
        rank = self.environment.rank
        place, others = nodes[own].index(rank), nodes[pair[0] if own == pair[1] else pair[1]]
        if place >= len(others):
            return None
        peer = others[place]
        store = dist.PrefixStore(f"{name}/{min(rank, peer)}-{max(rank, peer)}", meeting.store)
        return asdict(measure.measure_link(store, rank=rank, peer=peer, device=device, timeout_seconds=LINK_SECONDS))

    def _tell(self, report: Report) -> None:
        seconds = time.monotonic() - self.began
        print(table(report, seconds), flush=True)
        if self.run_dir is None:
            return
        try:
            write_report(self.run_dir, self.attempt, report, seconds)
        except OSError as error:
            print(f"the report cannot be written ({error})", file=sys.stderr)

    def _blame_first_rank(self, when: str) -> NoReturn:
        """Every node says so by itself, as nobody is there to ask."""
        node, place = node_name(), self.environment.init_method
        if self.environment.rank == 0:
            raise PreflightFailed(f"{node} cannot hold the meeting of all ranks at {place} {when}")
        name = self.names.get(0) or expected_nodes().get(0)
        if self.run_dir is not None and self.environment.local_rank == 0:
            try:
                record_unreachable(self.run_dir, self.attempt, node, name)
            except OSError as error:
                print(f"the event cannot be written ({error})", file=sys.stderr)
        where = f" on {name}" if name else ""
        raise FirstRankUnreachable(f"{node} cannot reach rank 0{where} at {place} {when}")


def now() -> float:
    """Seconds since 1970 by this node's clock."""
    return time.time()
