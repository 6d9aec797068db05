"""Which nodes measure the bandwidth between them, and what follows from it. Arithmetic only.

Nodes form a ring, and each link of it is measured. A link may be slow because of either end: a node that has one fast
link is sound, and a node that has none is measured once more, against a sound one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megamoe.preflight.findings import Finding

Pair = tuple[int, int]  # numbers of two nodes, the lower one first


@dataclass(frozen=True)
class Link:
    """What was measured between two nodes: the slowest of the pairs of their ranks. Not connected: 0 bytes/s."""

    bytes_per_second: float
    latency_seconds: float
    error: str = ""


def ring(num_nodes: int) -> list[Pair]:
    """Links between neighbours: none for one node, one for two."""
    if num_nodes < 2:
        return []
    return sorted({tuple(sorted((node, (node + 1) % num_nodes))) for node in range(num_nodes)})


def rounds(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """The pairs in rounds; in one round no node is in two of them."""
    planned: list[list[Pair]] = []
    for pair in pairs:
        free = (each for each in planned if not any(set(pair) & set(other) for other in each))
        found = next(free, None)
        if found is None:
            planned.append([pair])
        else:
            found.append(pair)
    return planned


def retests(links: Mapping[Pair, Link], least_share: float) -> list[Pair]:
    """Nodes without a fast link, each with a sound one that is not busy with too many others."""
    limit = link_limit(links, least_share)
    sound = sorted({node for pair, link in links.items() if link.bytes_per_second >= limit > 0 for node in pair})
    suspects = sorted({node for pair in links for node in pair} - set(sound))
    if not sound:
        return []
    return [tuple(sorted((node, sound[place % len(sound)]))) for place, node in enumerate(suspects)]


def link_limit(links: Mapping[Pair, Link], least_share: float) -> float:
    """Bytes/s that a link must reach: a share of the upper quartile of those that work.

    The median would be slow itself where one node of three, or two of five, are bad.
    """
    rates = sorted(link.bytes_per_second for link in links.values() if link.bytes_per_second > 0)
    return least_share * rates[math.floor(0.75 * (len(rates) - 1) + 0.5)] if rates else 0.0


def judge_links(
    names: Sequence[str], links: Mapping[Pair, Link], again: Mapping[Pair, Link], least_share: float
) -> list[Finding]:
    """links: of the ring. again: what `retests` asked for."""
    if not links:
        return []
    limit, findings = link_limit(links, least_share), []
    if not any(link.bytes_per_second > 0 for link in links.values()):
        message = f"no two nodes could exchange data: {next(iter(links.values())).error}"
        return [Finding("link", None, "bad", 0.0, limit, "bytes/s", message)]
    bad = {
        node for node in range(len(names))
        if all(link.bytes_per_second < limit for pair, link in (*links.items(), *again.items()) if node in pair)
    }  # fmt: skip
    for node, name in enumerate(names):
        own = {pair: link for pair, link in (*links.items(), *again.items()) if node in pair}
        best = max(own.values(), key=lambda link: link.bytes_per_second)
        message = f"{name} exchanges {best.bytes_per_second / 1e6:.1f} MB/s at best with {len(own)} other nodes, less "
        message += f"than {limit / 1e6:.1f}" + (f": {best.error}" if best.error else "")
        verdict = "bad" if node in bad else "good"
        findings.append(
            Finding("link", name, verdict, best.bytes_per_second, limit, "bytes/s", message if node in bad else "")
        )
    for (one, other), link in links.items():
        if link.bytes_per_second < limit and not {one, other} & bad:
            message = f"between {names[one]} and {names[other]}: {link.bytes_per_second / 1e6:.1f} MB/s, less than "
            message += f"{limit / 1e6:.1f}; both exchange data fast with others"
            findings.append(Finding("link", None, "note", link.bytes_per_second, limit, "bytes/s", message))
    return findings
