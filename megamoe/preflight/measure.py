"""What takes a device or a network: the rate of products, memory of a GPU, data between two ranks, all together."""

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megamoe.preflight.links import Link

CPU_SIZE, GPU_SIZE = 256, 4096  # of the square products that are timed
MEASURE_SECONDS = 0.5
CPU_MESSAGE_BYTES, GPU_MESSAGE_BYTES = 1 << 22, 1 << 26
NUM_TRANSFERS = 8  # there and back; the best counts: the others may have met somebody else's
TRANSFER_SECONDS = 2.0  # no further one is begun after that


def choose_torch_device(local_rank: int) -> torch.device:
    """This rank's, made current: as training chooses it."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
    torch.cuda.set_device(device)
    return device


def gpu_memory(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of a GPU; None on the CPU."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


def product_rate(device: torch.device) -> float:
    """FLOP/s of square products, the best of half a second: in bf16 on a GPU, in fp32 on one core of a CPU.

    One core, as ranks may share the others: products of a few milliseconds find it free now and then.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _best_product_rate(device)
    finally:
        torch.set_num_threads(threads)


def _best_product_rate(device: torch.device) -> float:
    size, dtype = (GPU_SIZE, torch.bfloat16) if device.type == "cuda" else (CPU_SIZE, torch.float32)
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    best, end, num_done = float("inf"), time.perf_counter() + MEASURE_SECONDS, 0
    while time.perf_counter() < end or num_done < 3:
        started = time.perf_counter()
        multiply(a, b)
        if num_done:  # the first one pays for what is set up once
            best = min(best, time.perf_counter() - started)
        num_done += 1
    return 2 * size**3 / best


def multiply(a: torch.Tensor, b: torch.Tensor) -> None:
    """One product, waited for."""
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)


def measure_link(
    store: dist.Store, *, rank: int, peer: int, device: torch.device, timeout_seconds: float
) -> Link:
    """Bytes/s between this rank and `peer`, one way at a time. Both call it with a store of their own.

    Every wait is at most `timeout_seconds`. A link that fails has 0 bytes/s, and the reason.
    """
    try:
        return _exchange(_connect(store, int(rank > peer), 2, device, timeout_seconds), rank < peer, device)
    except (RuntimeError, OSError) as error:
        return Link(0.0, 0.0, str(error).splitlines()[0][:200])


def all_reduce_all(
    store: dist.Store, *, rank: int, world_size: int, device: torch.device, timeout_seconds: float
) -> str:
    """One sum over all ranks, as training begins with; returns what went wrong, or nothing."""
    try:
        total = torch.ones(1, device=device)
        _connect(store, rank, world_size, device, timeout_seconds).allreduce([total]).wait()
        count = int(total.item())
    except (RuntimeError, OSError) as error:
        return str(error).splitlines()[0][:200]
    return "" if count == world_size else f"a sum of ones over {world_size} ranks is {count}"


def _connect(store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_seconds: float) -> Any:
    """Ranks that reach each other, by what training uses.

    Not by init_process_group: it numbers the groups of a process, and ranks of which one failed to make a group would
    never meet again.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a wait that is over raises, and does not abort the process
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, world_size, options)


def _exchange(group: Any, leads: bool, device: torch.device) -> Link:
    """The lower rank leads: it says whether another transfer follows, and its clock counts."""
    peer = 1 if leads else 0
    num_bytes = GPU_MESSAGE_BYTES if device.type == "cuda" else CPU_MESSAGE_BYTES
    payload = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    flag = torch.zeros(1, dtype=torch.int64, device=device)
    round_trip(group, flag, peer, leads)
    latency = min(round_trip(group, flag, peer, leads) for _ in range(NUM_TRANSFERS)) / 2
    best, started, num_done = float("inf"), time.perf_counter(), 0
    while True:
        late = time.perf_counter() - started > TRANSFER_SECONDS and num_done > 0
        flag.fill_(int(num_done < NUM_TRANSFERS and not late))
        round_trip(group, flag, peer, leads)
        if not int(flag):
            break
        best = min(best, round_trip(group, payload, peer, leads))
        num_done += 1
    return Link(2 * payload.numel() / best, latency)


def round_trip(group: Any, tensor: torch.Tensor, peer: int, leads: bool) -> float:
    """To the peer and back; seconds of it."""
    started = time.perf_counter()
    for sends in (leads, not leads):
        (group.send if sends else group.recv)([tensor], peer, 0).wait()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter() - started
