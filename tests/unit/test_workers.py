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
    ("counts", "num_threads", "large", "together"),
    [
        ([2] * 16, 2, 1 << 20, []),
        ([2] * 16, 1, 1 << 20, [2] * 16),
        ([20, *[1] * 8], 2, 1 << 20, [20]),  # it would keep the other thread waiting
        ([1, 9, 2, 9, *[2] * 12], 2, 72, [9, 9]),  # both are large, the rest is not
        ([3, 2], 2, 1 << 20, [3, 2]),  # too few to be shared out
        ([0, 0], 2, 1 << 20, [0]),  # nothing to do: one block
    ],
)
def test_which_blocks_all_threads_work_on(monkeypatch, counts, num_threads, large, together):
    monkeypatch.setattr(ffn, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(ffn, "_LARGE_BLOCK_ELEMENTS", large)
    blocks = ffn._blocks(counts, 8)
    first, rest = ffn._divided(blocks, 8, num_threads)
    assert [block.num_rows for block in first] == together and first + rest == blocks


@pytest.mark.parametrize(
    ("small", "few", "num_together"),
    [
        (50, 1000, 8),  # 8 experts of 80 activations: large on average, and few in all
        (80, 641, 8),  # just so
        (81, 1000, 0),  # small experts are handed out
        (50, 640, 0),  # and so are many
    ],
)
def test_few_large_experts_are_not_handed_out(monkeypatch, small, few, num_together):
    monkeypatch.setattr(ffn, "_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(ffn, "_SMALL_EXPERT_ELEMENTS", small)
    monkeypatch.setattr(ffn, "_FEW_ELEMENTS", few)
    blocks = ffn._blocks([10] * 8, 8)
    first, rest = ffn._divided(blocks, 8, 2)
    assert len(first) == num_together and first + rest == blocks


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_threads_change_no_bit(monkeypatch, two_threads, name):
    """Blocks that two threads take whole, against the same blocks one after another on one thread."""
    monkeypatch.setattr(ffn, "_BLOCK_ELEMENTS", 1)
    activation, generator = ACTIVATIONS[name], torch.Generator()
    wide = 16 if activation.is_gated else 8
    shapes = ((40, 4), (20, wide, 4), (20, wide), (20, 4, 8), (20, 4))
    counts = [2, 0, *[2] * 18]
    counts[5] += 2
    results, shared = [], []
    share_out_truly = ffn.share_out

    def noted(blocks, work, *, num_threads):
        shared.append(num_threads)
        share_out_truly(blocks, work, num_threads=num_threads)

    monkeypatch.setattr(ffn, "share_out", noted)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        generator.manual_seed(0)
        leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        y = ffn.expert_by_expert_ffn(
            leaves[0], ffn.ExpertWeights(*leaves[1:]), counts, activation, recompute_activation=True
        )
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert shared == [1, 1, 1, 2, 1, 2]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
