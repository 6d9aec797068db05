"""Stdout may be full, or read by nobody."""

import os
import sys

import pytest

from megamoe.errors import OutputError
from megamoe.printing import printing


@pytest.fixture
def stdout(monkeypatch):
    """Replaces stdout by an open descriptor."""
    opened = []

    def replace(descriptor: int):
        opened.append(os.fdopen(descriptor, "w"))
        monkeypatch.setattr(sys, "stdout", opened[-1])

    yield replace
    for each in opened:
        each.close()  # raises nothing: what was not taken went nowhere


def unread() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def test_a_lone_process_ends_quietly_when_nobody_reads(stdout):
    stdout(unread())
    with pytest.raises(BrokenPipeError), printing():
        print("text", flush=True)
    print("more", flush=True)


def test_one_of_several_ranks_says_that_nobody_reads(stdout):
    stdout(unread())
    told = r"^nobody reads stdout any more: what was left is not computed$"
    with pytest.raises(OutputError, match=told), printing(is_alone=False):
        print("text", flush=True)


def test_a_full_disk_behind_stdout_is_said(stdout):
    stdout(os.open("/dev/full", os.O_WRONLY))
    told = r"^stdout takes no more \(No space left on device\): free space or print elsewhere$"
    with pytest.raises(OutputError, match=told), printing():
        print("text", flush=True)
