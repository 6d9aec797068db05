"""A rank that is killed, raises, leaves without a word, or hears SIGTERM, in every phase: it is named, and the run goes
on afterwards."""

import pytest

from tests.parallel.faults import DEATHS, PHASES, chains, run_chains, write_corpus


@pytest.mark.timeout(600)
def test_a_rank_that_ends_is_named_and_ends_the_run_which_then_goes_on(tmp_path):
    corpus, kinds = write_corpus(tmp_path / "text"), (*DEATHS, "term")
    assert run_chains(tmp_path, corpus, chains(kinds)) == len(kinds) * len(PHASES)
