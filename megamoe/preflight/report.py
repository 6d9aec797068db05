"""A preflight's result for people, and in the run's folder: `preflight/attempt_0001/NODE.json`, and an event."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.preflight.findings import Finding, Report
from megamoe.runs.events import append_event

ALL_NODES = "all_nodes.json"  # a host's name holds no underscore
# Columns of the table: a title, and the checks whose figure stands there.
_COLUMNS = (
    ("run.dir", ("run.dir",)), ("free disk", ("free disk",)), ("free memory", ("free memory",)), ("data", ("data",)),
    ("GPU free", ("free GPU memory",)), ("clock", ("clock",)), ("compute", ("compute",)), ("best link", ("link",)),
)  # fmt: skip


def failure_sentence(report: Report) -> str:
    """What the user reads last: which nodes, and why."""
    parts = []
    if report.bad_hosts:
        parts.append(f"preflight found {', '.join(report.bad_hosts)} bad: start again without")
    if report.problems:
        parts.append(f"preflight found what leaving out a node does not mend: {'; '.join(report.problems)}")
    return "; ".join(parts)


def table(report: Report, seconds: float) -> str:
    """A line for each node, with a figure for each check; then what is wrong, in words."""
    columns = [(title, checks) for title, checks in _COLUMNS if any(each.check in checks for each in report.findings)]
    rows = [["node", "ranks", *(title for title, _ in columns), "verdict"]]
    for node, ranks in report.nodes.items():
        own = [each for each in report.findings if each.node == node]
        cells = [_cell([each for each in own if each.check in checks]) for _, checks in columns]
        verdict = "bad" if node in report.bad_hosts else "good"
        rows.append([node, _span(ranks), *cells, verdict])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for verdict in ("bad", "note"):
        lines += [f"{verdict}: {each.message}" for each in report.findings if each.verdict == verdict]
    lines.append(f"preflight of {len(report.nodes)} nodes: {_outcome(report)}, {seconds:.1f} s")
    return "\n".join(lines)


def write_report(run_dir: Path, attempt: int, report: Report, seconds: float) -> None:
    """OSErrors pass. The event comes first: it is what decides which nodes are left out."""
    append_event(
        run_dir, "preflight", f"preflight: {_outcome(report)}", attempt=attempt, hosts=list(report.nodes),
        bad_hosts=list(report.bad_hosts), problems=list(report.problems), seconds=seconds,
    )  # fmt: skip
    folder = run_dir / "preflight" / f"attempt_{attempt:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys([*report.nodes, *(each.node for each in report.findings if each.node is not None)])
    for node in names:
        findings = [each for each in report.findings if each.node == node]
        verdict = "bad" if node in report.bad_hosts else "good"
        tree = {"node": node, "ranks": list(report.nodes.get(node, ())), "verdict": verdict}
        _write(folder / f"{file_name(node)}.json", tree, findings)
    tree = {"attempt": attempt, "nodes": list(report.nodes), "bad_hosts": list(report.bad_hosts)}
    tree |= {"problems": list(report.problems), "seconds": seconds}
    _write(folder / ALL_NODES, tree, [each for each in report.findings if each.node is None])


def record_unreachable(run_dir: Path, attempt: int, node: str, first_node: str | None) -> None:
    """What one node can say when rank 0, which would gather and write, does not answer. OSErrors pass."""
    run_dir.mkdir(parents=True, exist_ok=True)
    where = f" on {first_node}" if first_node else ""
    append_event(
        run_dir, "preflight", f"{node} cannot reach rank 0{where}", attempt=attempt, hosts=[node], bad_hosts=[],
        unreachable_host=first_node,
    )  # fmt: skip


def file_name(node: str) -> str:
    """A node's name as a file's: nothing in it leads out of the folder."""
    return re.sub(r"[^A-Za-z0-9.-]", "-", node).lstrip(".") or "-"


def _write(path: Path, tree: Mapping[str, Any], findings: Sequence[Finding]) -> None:
    whole = {**tree, "findings": [asdict(each) for each in findings]}
    replace_file(path, (json.dumps(whole, indent=2) + "\n").encode())


def _outcome(report: Report) -> str:
    if report.is_good:
        return "all good"
    parts = [f"bad: {', '.join(report.bad_hosts)}"] if report.bad_hosts else []
    return "; ".join([*parts, *report.problems])


def _cell(findings: Sequence[Finding]) -> str:
    """The worst figure of a check on a node; "!" after one beyond its limit."""
    if not findings:
        return "-"
    worst = min(findings, key=lambda each: (each.verdict != "bad", each.measured or 0.0))
    return _figure(worst) + ("!" if worst.verdict == "bad" else "")


def _figure(finding: Finding) -> str:
    value = finding.measured
    if value is None:
        return "bad" if finding.verdict == "bad" else "good"
    if finding.unit == "bytes":
        return f"{value / 2**30:.1f} GiB"
    if finding.unit == "seconds":
        return f"{value:.3f} s" if abs(value) < 10 else f"{value:.0f} s"
    return f"{value / 1e9:.2f} G{finding.unit}" if finding.unit == "FLOP/s" else f"{value / 1e6:.0f} MB/s"


def _span(ranks: Sequence[int]) -> str:
    """0-3 where they follow each other."""
    whole = list(ranks) == list(range(ranks[0], ranks[0] + len(ranks)))
    return f"{ranks[0]}-{ranks[-1]}" if whole and len(ranks) > 1 else ",".join(map(str, ranks))
