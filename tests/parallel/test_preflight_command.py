"""`megamoe preflight` as a process: started by itself and by others, its exit code, and who says what."""

import os
import subprocess
import sys
from pathlib import Path

from megamoe.runs.events import read_events
from tests.parallel.test_preflight import free_port

ROOT = Path(__file__).parents[2]
NODE = os.uname().nodename


def environment(**more: str) -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def preflight(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megamoe", "preflight", *arguments]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=120, check=False
    )


def test_local_ranks_of_a_good_machine(tmp_path):
    done = preflight("laptop-moe", "--local-ranks", "2", f"run.dir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    head, row, last = done.stdout.splitlines()
    assert head.split()[:2] == ["node", "ranks"] and row.split()[:2] == [NODE, "0-1"]
    assert last.startswith("preflight of 1 nodes: all good, ")
    (event,) = read_events(tmp_path)
    assert (event["kind"], event["attempt"], event["hosts"], event["bad_hosts"]) == ("preflight", 1, [NODE], [])
    assert (tmp_path / "preflight" / "attempt_0001" / f"{NODE}.json").exists()


def test_without_a_configuration_the_machine_alone_is_looked_at_and_nothing_written(tmp_path):
    done = preflight()
    assert (done.returncode, done.stderr) == (0, "")
    assert "run.dir" not in done.stdout and "compute" in done.stdout


def test_what_is_bad_is_one_sentence_and_its_own_exit_code(tmp_path):
    (tmp_path / "file").touch()
    where = tmp_path / "file" / "run"
    done = preflight("--local-ranks", "2", "--run-dir", str(where))
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1] == (
        f"megamoe: error: preflight found what leaving out a node does not mend: {where} cannot be written on {NODE} "
        "(Not a directory)"
    )
    assert "Traceback" not in done.stderr and f"bad: {where} cannot be written" in done.stdout


def test_a_wrong_configuration_is_told_once_a_node():
    message = "megamoe: error: run.num_steps is 0 in the command line: it must be a whole number of at least 1\n"
    for local_rank, text in (("0", message), ("1", "")):
        place = {"RANK": local_rank, "WORLD_SIZE": "2", "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": "2"}
        done = preflight("laptop-moe", "run.num_steps=0", **place, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", text)


def test_too_few_gpus_are_the_nodes_fault(tmp_path):
    done = preflight("laptop-moe", "run.device=cuda", f"run.dir={tmp_path}", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 5
    assert f"bad: on {NODE}: run.device cuda needs a GPU for each of the 1 ranks of this machine" in done.stdout


def test_of_ranks_that_others_started_the_first_speaks_for_all(tmp_path):
    """As torchrun starts them; files of the second node have a limit."""
    ranks, port = [], free_port()
    for rank in (0, 1):
        variables = environment(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port), MEGAMOE_NODE_NAME=f"n{rank}",
        )  # fmt: skip
        limit = "ulimit -f 64; " if rank else ""
        command = f"{limit}exec {sys.executable} -m megamoe preflight --run-dir {tmp_path}"
        ranks.append(
            subprocess.Popen(
                ["bash", "-c", command], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    first, second = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [5, 5]
    assert first[1] == "megamoe: error: preflight found n1 bad: start again without\n"
    assert second == ("", "")
    assert read_events(tmp_path)[-1]["bad_hosts"] == ["n1"]
