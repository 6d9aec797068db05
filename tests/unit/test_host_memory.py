"""A process that keeps the large blocks it frees takes no new pages for the next ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS = """
import os, resource, sys
from megamoe.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == sys.argv[2]
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))
"""


def faults_of_repeated_tensors(mode: str, pages: str, **variables: str) -> int:
    """Page faults of a tensor of 64 MiB: the fewest of eight, each freed before the next."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    run = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, mode, pages],
        env=environment | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def has_huge_pages_unasked() -> bool:
    """Whether Linux gives huge pages to whoever allocates, so that small ones are not what is counted."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted as Linux does, mallopt is glibc's")
def test_memory_of_a_freed_tensor_is_kept_unless_the_user_says_otherwise():
    plain = faults_of_repeated_tensors("default", "")
    kept = faults_of_repeated_tensors("keep", "1")
    told = faults_of_repeated_tensors(
        "keep", "0", THP_MEM_ALLOC_ENABLE="0", MALLOC_MMAP_MAX_="65536", MALLOC_TRIM_THRESHOLD_="131072"
    )
    assert kept < 100
    if not has_huge_pages_unasked():
        assert min(plain, told) > 16_000  # of 16,384 small pages in 64 MiB
