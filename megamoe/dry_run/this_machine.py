"""The cluster `cpu`: this machine, measured on the spot in about two seconds.

Ranks are processes of one thread that share its cores. What is measured is the rate itself, so efficiencies are 1 but
for what belongs to shapes: small products, attention, and the start of operations.
"""

import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.plan.cluster import Cluster

_LARGE, _SMALL = 768, 32  # sizes of the products that are timed
_COPY_BYTES, _MESSAGE_BYTES, _FILE_BYTES = 1 << 26, 1 << 24, 1 << 25
_LAYER_OPERATIONS = 60  # that one layer's forward pass starts: products, norms, activations, views that copy
_SOURCE = "measured on this machine by megamoe.dry_run.this_machine"


def measure_cpu(num_ranks: int, folder: str | Path | None = None) -> Cluster:
    """This machine as a cluster of one node of `num_ranks` ranks; `folder`: where checkpoints would be written.

    Raises OSError where nothing can be written there.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Ranks beyond the cores share them.
        share = min(1.0, (os.cpu_count() or 1) / num_ranks)
        # A processor without bf16 products is so slow in them that a smaller one must do.
        rates = {
            "fp32": _product_rate(torch.float32, _LARGE) * share,
            "bf16": _product_rate(torch.bfloat16, _LARGE // 4) * share,
        }
        small = _product_rate(torch.float32, _SMALL) * share
        attention = _attention_rate() * share
        copying = _copy_rate() * share
        start = _start_seconds() / share
    finally:
        torch.set_num_threads(threads)
    link_rate, latency = _loopback()
    link = {"bytes_per_second": link_rate * share, "latency_seconds": latency / share}
    # Solved for d: a small product takes 1 + d (1/m + 1/n + 1/k) times what the rate of a large one promises.
    half_size = max(0.0, (rates["fp32"] / small - 1) * _SMALL / 3)
    tree = {
        "name": "cpu",
        "accelerator": "CPU",
        "ranks_per_node": num_ranks,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_ranks,
        "overhead_bytes": 600_000_000,  # Python, torch and both engines in one process
        "peak_flops_per_second": {"fp32": rates["fp32"], "bf16": rates["bf16"], "fp16": None},
        "memory_bytes_per_second": copying,
        "intra_node": link,
        "inter_node": link,
        "storage_bytes_per_second_per_node": _write_rate(folder),
        "failures_per_node_day": 0.0,
        "efficiency": {
            "product": 1.0,
            "attention": min(1.0, attention / rates["fp32"]),
            "product_half_size": half_size,
            "memory": 1.0,
            "layer_overhead_seconds": _LAYER_OPERATIONS * start,
            "intra_node": 1.0,
            "inter_node": 1.0,
            "overlap": 0.0,
        },
    }
    cluster = Cluster.model_validate({**tree, "sources": {}})
    return cluster.model_copy(update={"sources": dict.fromkeys(_keys(tree), _SOURCE)})


def _keys(tree: dict[str, object]) -> list[str]:
    """Dotted keys of the figures."""
    keys = []
    for key, value in tree.items():
        keys += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return [key for key in keys if key not in ("name", "accelerator")]


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median time of one call, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _product_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of square products."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    repeats = 20 if size <= _SMALL else 1

    def work() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return 2 * size**3 * repeats / _seconds(work)


def _attention_rate(length: int = 512, heads: int = 8, head_dim: int = 64) -> float:
    """FLOP/s of causal attention, half of length x length counted."""
    q: Tensor = torch.randn(1, heads, length, head_dim)
    flops = 4 * heads * length * length * head_dim / 2
    return flops / _seconds(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))


def _copy_rate() -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source))


def _start_seconds(repeats: int = 200) -> float:
    """Of starting one small operation."""
    x = torch.zeros(8)

    def work() -> None:
        for _ in range(repeats):
            x.add_(1.0)

    return _seconds(work) / repeats


def _loopback(rounds: int = 50) -> tuple[float, float]:
    """Bytes a second and seconds of a message between two ends on this machine, over TCP as gloo sends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        echo = threading.Thread(target=_echo, args=(server, rounds))
        echo.start()
        with socket.create_connection(server.getsockname()) as near:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            start = time.perf_counter()
            for _ in range(rounds):
                near.sendall(b"x")
                near.recv(1)
            latency = (time.perf_counter() - start) / rounds / 2
            start = time.perf_counter()
            near.sendall(bytes(_MESSAGE_BYTES))
            near.recv(1)
            seconds = time.perf_counter() - start
        echo.join()
    return _MESSAGE_BYTES / seconds, latency


def _echo(server: socket.socket, rounds: int) -> None:
    far, _ = server.accept()
    with far:
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            far.sendall(far.recv(1))
        left = _MESSAGE_BYTES
        while left:
            left -= len(far.recv(1 << 20))
        far.sendall(b"x")


def _write_rate(folder: str | Path | None) -> float:
    """Bytes a second of a file that is written and on the disk."""
    block = os.urandom(_FILE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _FILE_BYTES / (time.perf_counter() - start)
