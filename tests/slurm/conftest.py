"""One SLURM for all tests of this folder, and what their jobs have in common: data, settings, a python with a pace."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megamoe.cli import main
from megamoe.data.indexed import IndexedWriter
from megamoe.data.tokenizers import ByteTokenizer
from megamoe.runs.metrics import METRICS_FILE, read_metrics
from tests.slurm.lab import LabMissing, SlurmLab, install
from tests.slurm.paced import heard_file

ROOT = Path(__file__).parents[2]
FEATURES = ("steady", "steady", "shaky", "shaky", "shaky")  # of the nodes; shaky ones are killed
NUM_STEPS = 10
SETTINGS = {  # experts over both nodes
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 260, "seq_length": 16},
    "moe": {"num_experts": 4, "layer_pattern": 2},
    "optimizer": {"lr": 0.01, "schedule": "constant"},
    # Runs that tests hold at a step stand still for minutes, which would be a hang.
    "parallel": {"expert_parallel_size": 2, "zero_stage": 1, "timeout_seconds": 800},
    "run": {"num_steps": NUM_STEPS, "global_batch_size": 4, "num_eval_batches": 0},
    "monitor": {"log_interval_steps": 1},
}
WAIT_SECONDS = 400.0  # on a machine that does much else; a start takes 10 s on two idle cores


@dataclass
class Site:
    """Where jobs of tests are submitted from. Every run has a file for its pace."""

    lab: SlurmLab
    folder: Path
    config: Path
    settings: Path

    def submit(self, name: str, *arguments: str, ranks_per_node: int = 1) -> str:
        """`megamoe submit` for the run of this name on 2 nodes; its job's id."""
        return self.submitted(
            str(self.config), *self.paced(name), f"run.dir={name}", "--nodes", "2", "--ranks-per-node",
            str(ranks_per_node), f"parallel.tensor_parallel_size={ranks_per_node}", *arguments,
        )  # fmt: skip

    def submitted(self, *arguments: str) -> str:
        before = self.job_ids()
        command = ["submit", *arguments, "--cluster-settings", str(self.settings)]
        assert main(command) == 0
        (job_id,) = self.job_ids() - before
        return job_id

    @property
    def usual_python(self) -> str:
        return json.loads(self.settings.read_text())["python"]

    def python(self, name: str, *commands_and_bodies: str) -> str:
        """A python that runs lines of a shell in place of commands of megamoe: command, lines, command, lines ..."""
        path = self.folder / f"python-{name}"
        commands, bodies = commands_and_bodies[::2], commands_and_bodies[1::2]
        cases = "".join(f"{command}) {body} ;;\n" for command, body in zip(commands, bodies, strict=True))
        path.write_text(f'#!/bin/sh\ncase "$3" in\n{cases}*) exec "{self.usual_python}" "$@" ;;\nesac\n')
        path.chmod(0o755)
        return str(path)

    def job_ids(self) -> set[str]:
        return set(self.lab.command("squeue", "--noheader", "--array", "--states=all", "--format=%F").split())

    def paced(self, name: str) -> list[str]:
        return ["--env", f"MEGAMOE_TEST_PACE={self.pace_file(name)}"]

    def pace_file(self, name: str) -> Path:
        return self.folder / f"{name}.pace"

    def hold(self, name: str, step: int) -> None:
        """Let the run wait after a step."""
        heard_file(self.pace_file(name)).unlink(missing_ok=True)
        self.pace_file(name).write_text(str(step))

    def release(self, name: str) -> None:
        self.pace_file(name).write_text("1000000")

    def wait_for_step(self, name: str, step: int) -> None:
        self.lab.wait_for(lambda: self.steps(name)[-1:] >= [step], f"{name}: step {step}", WAIT_SECONDS)

    def wait_for_signal(self, name: str, seconds: float = WAIT_SECONDS) -> None:
        """Until a rank of the run, which is held, knows that it is to stop: it does so one step after its release."""
        self.lab.wait_for(heard_file(self.pace_file(name)).exists, f"{name}: the signal", seconds)

    def steps(self, name: str) -> list[int]:
        path = self.folder / name / METRICS_FILE
        return [line["step"] for line in read_metrics(path) if "loss" in line] if path.exists() else []

    def output(self, name: str) -> str:
        files = sorted((self.folder / name / "slurm").glob("job-*.out"))
        return "\n".join(file.read_text(errors="replace") for file in files)

    def end(self, name: str, job_id: str) -> str:
        """The state in which the job ended; its output is shown where a test fails."""
        state = self.lab.wait_for_end(job_id)
        print(f"--- {name}\n{self.output(name)}")
        return state


@pytest.fixture(scope="package")  # what it does to the environment ends with this folder's tests
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    try:
        install()
    except LabMissing as reason:
        pytest.skip(f"no SLURM for this test: {reason}")
    with SlurmLab(tmp_path_factory.mktemp("slurm"), FEATURES) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


@pytest.fixture(scope="package")
def site(lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    write_corpus(folder / "text")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "tests" / "slurm" / "paced.py"}" "$@"\n')
    python.chmod(0o755)
    config = folder / "run.yaml"
    config.write_text(json.dumps(SETTINGS | {"data": {"train": [{"path": "text"}]}}))  # JSON is YAML
    settings = folder / "site.yaml"
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHON_EXEC": str(python)}
    settings.write_text(
        json.dumps({"python": str(python), "environment": environment, "preflight": False, "constraint": "steady"})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
        yield Site(lab, folder, config, settings)


def write_corpus(prefix: Path) -> None:
    tokenizer = ByteTokenizer()
    texts = ["once upon a time " * (2 + number % 5) for number in range(60)]
    documents = [[*tokenizer.encode(text), tokenizer.end_of_document_id] for text in texts]
    with IndexedWriter(prefix, tokenizer.vocab_size) as writer:
        lengths = np.array([len(document) for document in documents])
        writer.add_documents(np.concatenate(documents).astype(writer.dtype), lengths)
