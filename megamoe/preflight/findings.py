"""What was measured on each node, held to its limit, and who is to blame. Arithmetic only.

A node is blamed where it fails what others pass. What all nodes fail, or what two sides disagree about without a
majority, is nobody's: leaving a node out would not help.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["", "bytes", "seconds", "bytes/s", "FLOP/s"]


@dataclass(frozen=True)
class Finding:
    """One figure. `node` None: of the job as a whole. "note": worth a line, and no reason to stop."""

    check: str
    node: str | None
    verdict: Literal["good", "bad", "note"]
    measured: float | None = None
    limit: float | None = None
    unit: Unit = ""
    message: str = ""


@dataclass(frozen=True)
class Report:
    """The result of a preflight. `nodes`: ranks by node, in the order of their first ranks."""

    nodes: Mapping[str, Sequence[int]]
    findings: tuple[Finding, ...]

    @property
    def bad_hosts(self) -> tuple[str, ...]:
        """Nodes to leave out, each once, in the order of the findings."""
        shared = self._shared_checks()
        return tuple(dict.fromkeys(each.node for each in self._bad() if each.node and each.check not in shared))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong and no single node's, a sentence for each check."""
        shared, problems = self._shared_checks(), {}
        for each in self._bad():
            if each.node is None:
                problems[each.message] = None
            elif each.check in shared:
                everywhere = "" if len(self.nodes) == 1 else ", as on all nodes"
                problems.setdefault(f"{shared[each.check]}{everywhere}")
        return tuple(problems)

    @property
    def is_good(self) -> bool:
        return not self._bad()

    def _bad(self) -> list[Finding]:
        return [each for each in self.findings if each.verdict == "bad"]

    def _shared_checks(self) -> dict[str, str]:
        """Checks that every node fails, with the message of the first."""
        failing: dict[str, dict[str, str]] = {}
        for each in self._bad():
            if each.node is not None:
                failing.setdefault(each.check, {}).setdefault(each.node, each.message)
        all_nodes = {*self.nodes, *(each.node for each in self.findings if each.node is not None)}
        return {check: next(iter(nodes.values())) for check, nodes in failing.items() if nodes.keys() >= all_nodes}


def judge_clocks(offsets: Mapping[str, tuple[float, float]], limit_seconds: float) -> list[Finding]:
    """offsets: by node, seconds ahead of one of them, and how far that may be off. Judged against the median."""
    median = statistics.median_low([offset for offset, _ in offsets.values()])
    apart = {node: max(0.0, abs(offset - median) - error) for node, (offset, error) in offsets.items()}
    bad = [node for node, seconds in apart.items() if seconds > limit_seconds]
    if 2 * len(bad) >= len(offsets):  # no majority for either side
        span = max(offset for offset, _ in offsets.values()) - min(offset for offset, _ in offsets.values())
        message = f"the clocks of {', '.join(offsets)} are up to {span:.1f} s apart, with no majority for one time"
        return [Finding("clock", None, "bad", span, limit_seconds, "seconds", message)]
    return [
        Finding(
            "clock", node, "bad" if node in bad else "good", offset - median, limit_seconds, "seconds",
            f"the clock of {node} is {abs(offset - median):.1f} s {'ahead' if offset > median else 'behind'}"
            if node in bad else "",
        )
        for node, (offset, _) in offsets.items()
    ]  # fmt: skip


def judge_same(what: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """what: by node, names and values that must be equal everywhere, such as versions."""
    findings = []
    for name in dict.fromkeys(name for values in what.values() for name in values):
        values = {node: each.get(name, "none") for node, each in what.items()}
        (most, count), *others = Counter(values.values()).most_common()
        check = f"same {name}"
        if others and 2 * count <= len(values):
            text = ", ".join(f"{value} on {node}" for node, value in values.items())
            findings.append(Finding(check, None, "bad", message=f"the nodes do not have the same {name}: {text}"))
            continue
        for node, value in values.items():
            message = "" if value == most else f"{node} has {name} {value}, the others have {most}"
            findings.append(Finding(check, node, "good" if value == most else "bad", message=message))
    return findings


def judge_rates(rates: Mapping[str, Sequence[float]], least_share: float) -> list[Finding]:
    """rates: by node, FLOP/s of each of its ranks. The slowest is held to a share of the median over all ranks."""
    limit = least_share * statistics.median_high([rate for each in rates.values() for rate in each])
    findings = []
    for node, each in rates.items():
        slowest = min(each)
        message = f"{node} computes {slowest / 1e9:.1f} GFLOP/s, less than {limit / 1e9:.1f}" if slowest < limit else ""
        verdict = "bad" if slowest < limit else "good"
        findings.append(Finding("compute", node, verdict, slowest, limit, "FLOP/s", message))
    return findings


def missing_ranks(nodes: Mapping[int, str | None], missing: Iterable[int], when: str) -> list[Finding]:
    """Ranks that did not answer, by the node where they are or should be; None: not known."""
    by_node: dict[str | None, list[int]] = {}
    for rank in missing:
        by_node.setdefault(nodes.get(rank), []).append(rank)
    findings = []
    for node, ranks in by_node.items():
        plural = f"ranks {', '.join(map(str, ranks))}" if len(ranks) > 1 else f"rank {ranks[0]}"
        where = "of a node whose name is not known" if node is None else f"on {node}"
        findings.append(Finding("answer", node, "bad", message=f"{plural} {where} did not answer {when}"))
    return findings
