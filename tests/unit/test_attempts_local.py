"""`megamoe train --local-ranks N --restarts K`: the rules of a batch script, in the launcher."""

import os

import pytest

from megamoe import cli
from megamoe.launch import local
from megamoe.runs.attempts import read_attempts

TRAIN = ["train", "laptop-dense", "data.train=[{path: x}]", "run.dir=run"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGAMOE_ATTEMPT", "99")  # put back at the end
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.mark.parametrize(
    ("exit_codes", "num_calls", "verdicts"),
    [
        ([1, 137, 0], 3, ["requeue", "requeue", "stop"]),
        ([1, 4, 1], 3, ["requeue", "requeue", "stop"]),  # no checkpoint three times
        ([2], 1, ["stop"]),
        ([75], 1, ["requeue"]),  # somebody wanted it to end
        ([143], 1, ["requeue"]),
        ([130], 1, ["stop"]),
    ],
)
def test_ranks_are_started_again_as_a_script_would(capsys, monkeypatch, tmp_path, exit_codes, num_calls, verdicts):
    numbers = []

    def run_local(entry, payload, **options):
        numbers.append(os.environ["MEGAMOE_ATTEMPT"])
        return local.LocalResult(exit_codes[len(numbers) - 1], None, 0.0)

    monkeypatch.setattr(local, "run_local", run_local)
    assert cli.main([*TRAIN, "--local-ranks", "2", "--restarts", "5"]) == exit_codes[-1]
    assert numbers == [str(1 + number) for number in range(num_calls)]
    assert [each.verdict for each in read_attempts(tmp_path / "run")] == verdicts
    assert capsys.readouterr().err.count("starting again") == num_calls - 1


def test_restarts_are_bounded_and_of_local_ranks(capsys, monkeypatch):
    monkeypatch.setattr(local, "run_local", lambda *_, **__: local.LocalResult(1, None, 0.0))
    assert cli.main([*TRAIN, "--local-ranks", "2", "--restarts", "1"]) == 1
    assert capsys.readouterr().err == (
        "megamoe: ended by a defect (exit code 1): starting again, 1 more at most\n"
    )
    with pytest.raises(SystemExit):
        cli.main([*TRAIN, "--restarts", "1"])
    assert "--restarts is for --local-ranks" in capsys.readouterr().err


