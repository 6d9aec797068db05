"""Threads that take whole experts: every item once, the same bits as one thread, and torch's own threads untouched."""

import os
import threading

import pytest
import torch

from megamoe.moe import ffn
from megamoe.moe.activations import ACTIVATIONS
from megamoe.moe.workers import share_out


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_item_is_done_once_by_threads_that_compute_alone(two_threads):
    done, seen, both = [], set(), threading.Barrier(2)

    def work(items):
        both.wait(timeout=30)  # neither may have done all before the other came
        for item in items:
            done.append(item)
            seen.add((torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name))

    share_out(range(1000), work, num_threads=2)
    assert sorted(done) == list(range(1000))
    assert {(threads, grad) for threads, grad, _ in seen} == {(1, False)}
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()
    fresh = []
    other = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert fresh == [2], "a thread that asks later gets the process's number"


def test_a_failure_in_a_thread_is_raised_here(two_threads):
    def work(items):
        for item in items:
            if item == 3:
                raise ZeroDivisionError("item 3")

    with pytest.raises(ZeroDivisionError, match="item 3"):
        share_out(range(10), work, num_threads=2)
    done = []
    share_out(range(4), done.extend, num_threads=2)  # and the threads still work
    assert sorted(done) == [0, 1, 2, 3]


def test_a_fork_starts_threads_of_its_own(two_threads):
    share_out(range(4), list, num_threads=2)
    child = os.fork()
    if child == 0:
        done = []
        share_out(range(4), done.extend, num_threads=2)
        os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("counts", "large", "expected"),
    [
        ([2] * 16, 1 << 20, 2),
        ([20, *[1] * 8], 1 << 20, 1),  # one block would keep the other thread waiting
        ([2] * 16, 16, 1),  # the blocks are large
    ],
)
def test_which_loads_are_shared_out(monkeypatch, two_threads, counts, large, expected):
    monkeypatch.setattr(ffn, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(ffn, "_LARGE_BLOCK_ELEMENTS", large)
    assert ffn._num_threads(ffn._blocks(counts, 8), 8) == expected


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_threads_change_no_bit(monkeypatch, name):
    monkeypatch.setattr(ffn, "_BLOCK_ELEMENTS", 1)
    activation, generator = ACTIVATIONS[name], torch.Generator().manual_seed(0)
    wide = 16 if activation.is_gated else 8
    shapes = ((40, 4), (20, wide, 4), (20, wide), (20, 4, 8), (20, 4))
    counts = [2, 0, *[2] * 18]
    counts[5] += 2
    results = []
    for num_threads in (1, 2):
        generator.manual_seed(0)
        leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        monkeypatch.setattr(ffn, "_num_threads", lambda blocks, width, n=num_threads: n)
        y = ffn.expert_by_expert_ffn(*leaves, counts, activation)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
