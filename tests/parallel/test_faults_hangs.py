"""A rank that sleeps, is stopped, or holds Python's lock, in every phase: it is named, all end, and the run goes on."""

import pytest

from tests.parallel.faults import HANGS, PHASES, chains, run_chains, write_corpus


@pytest.mark.timeout(600)
def test_a_rank_that_hangs_is_named_and_ends_the_run_which_then_goes_on(tmp_path):
    corpus = write_corpus(tmp_path / "text")
    assert run_chains(tmp_path, corpus, chains(HANGS)) == len(HANGS) * len(PHASES)
