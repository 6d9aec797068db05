"""The scripts of launch_scripts/: what they say when something is missing, and ranks under torchrun."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.runs.metrics import read_metrics
from tests.journeys.clone import ROOT

SCRIPTS = ROOT / "launch_scripts"
SMALL = [
    "laptop-moe", "model.num_layers=2", "model.hidden_size=32", "model.vocab_size=512", "model.seq_length=32",
    "data.tokenizer.kind=byte", "run.num_steps=2", "run.global_batch_size=4", "run.micro_batch_size=1",
    "run.num_eval_batches=0", "monitor.log_interval_steps=1", "checkpoint.save_at_end=false",
    "parallel.expert_parallel_size=2", "optimizer.warmup_steps=0",
]  # fmt: skip


def script(name: str, *arguments: str, **variables: str) -> subprocess.Popen:
    environment = dict(os.environ) | {"VIRTUAL_ENV": sys.prefix} | variables
    return subprocess.Popen(
        ["bash", SCRIPTS / name, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def answer(process: subprocess.Popen, timeout_seconds: float = 60.0) -> tuple[int, str]:
    text, _ = process.communicate(timeout=timeout_seconds)
    return process.returncode, text


def fake_python(folder: Path, body: str) -> dict[str, str]:
    """Variables of a shell whose only python3 is a script with this body."""
    path = folder / "bin"
    path.mkdir()
    for name in ("bash", "dirname"):
        found = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True, check=True)
        (path / name).symlink_to(found.stdout.strip())
    (path / "python3").write_text(f"#!{path}/bash\n{body}\n")
    (path / "python3").chmod(0o755)
    return {"PATH": str(path), "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}


def copied_scripts(folder: Path) -> Path:
    """A repository without .venv, as far as these scripts go."""
    subprocess.run(["cp", "-r", SCRIPTS, folder / "launch_scripts"], check=True)
    return folder / "launch_scripts"


def test_unsupported_python(tmp_path):
    body = 'case "$1" in --version) echo Python 3.9.18;; *) exit 1;; esac'
    code, text = answer(script(str(copied_scripts(tmp_path) / "quickstart.sh"), **fake_python(tmp_path, body)))
    assert code == 2
    assert "error: megamoe needs Python 3.10, 3.11 or 3.12; python3 is Python 3.9.18. Install one" in text


def test_missing_ensurepip(tmp_path):
    body = f'case "$*" in *ensurepip*) exit 1;; esac\nexec "{sys.executable}" "$@"'
    code, text = answer(script(str(copied_scripts(tmp_path) / "quickstart.sh"), **fake_python(tmp_path, body)))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert code == 2
    assert f"sudo apt-get install python{version}-venv" in text


def test_multinode_wants_its_variables():
    code, text = answer(script("torchrun_multinode.sh", "laptop-moe", NUM_NODES="2", NODE_RANK="0"))
    assert code == 2 and text.startswith("error: MASTER_ADDR is not set;")
    code, text = answer(
        script("torchrun_multinode.sh", "laptop-moe", NUM_NODES="2", NODE_RANK="2", MASTER_ADDR="localhost")
    )
    assert code == 2 and text == "error: NODE_RANK=2 must be below NUM_NODES=2: nodes count from 0.\n"


@pytest.fixture
def dataset(tmp_path) -> str:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n\n" * 200)
    subprocess.run(
        [sys.executable, ROOT / "tools" / "preprocess_data.py", text, "--output", tmp_path / "text",
         "--tokenizer", "byte", "--workers", "1"], check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    return f"data.train=[{{path: {tmp_path / 'text'}}}]"


@pytest.mark.slow
def test_two_nodes_under_torchrun_equal_two_local_ranks(tmp_path, dataset):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        script(
            "torchrun_multinode.sh", *SMALL, dataset, f"run.dir={tmp_path / 'nodes'}", NUM_NODES="2",
            NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANKS_PER_NODE="1",
            GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(2)
    ]  # fmt: skip
    for node in nodes:
        code, text = answer(node, 200)
        assert code == 0, text[-5000:]
    code, text = answer(script("local_cpu.sh", "2", *SMALL, dataset, f"run.dir={tmp_path / 'local'}"), 200)
    assert code == 0, text[-5000:]
    runs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("nodes", "local")]
    assert [line["step"] for line in runs[0]] == [1, 2]
    assert [line["loss"] for line in runs[0]] == pytest.approx([line["loss"] for line in runs[1]], rel=1e-6)
