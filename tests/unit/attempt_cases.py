"""What the tests of attempts share: a run that is played, and the two commands as a batch script calls them."""

from pathlib import Path

import numpy as np
import pytest

from megamoe import cli
from megamoe.checkpoint.commit import begin, commit
from megamoe.checkpoint.slices import Slice
from megamoe.checkpoint.writer import write_rank
from megamoe.config.loading import dump_yaml
from megamoe.config.schema import Config
from megamoe.runs.events import read_events
from megamoe.topology.parameters import param_table

TINY = Config.model_validate(
    {"model": {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "vocab_size": 8, "vocab_size_multiple": 8}}
)


def save_checkpoint(run_dir: Path, step: int) -> None:
    """A whole checkpoint of a tiny model, its weights all zero, as a run would leave it."""
    root = run_dir / "checkpoints"
    partial, slices = begin(root, step, "test-1"), []
    for parameter in param_table(TINY.model, TINY.moe):
        box = tuple((0, size) for size in parameter.shape)
        piece = Slice("weight", parameter.name, "F32", parameter.shape, box, 0, parameter.num_elements)
        slices.append((piece, np.zeros(parameter.num_elements, dtype=np.float32)))
    write_rank(partial, rank=0, save_id="test-1", step=step, slices=slices)
    commit(
        root, partial, num_ranks=1, step=step, save_id="test-1", state={"step": step}, layout={}, keep_last=99,
        config=TINY.model_dump(mode="json"), keep_every_steps=None, timeout_seconds=10.0,
    )  # fmt: skip


class BatchScript:
    """One job of nodes node1 to node4, started again and again in one folder."""

    def __init__(self, run_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir, self.capsys, self.monkeypatch = run_dir, capsys, monkeypatch
        self.set_job("71", "node[1-4]")

    def set_job(self, job_id: str, node_list: str) -> None:
        self.monkeypatch.setenv("SLURM_JOB_ID", job_id)
        self.monkeypatch.setenv("SLURM_JOB_NODELIST", node_list)

    def configure(self, **restart: int) -> None:
        """What training writes into the folder."""
        config = Config.model_validate(TINY.model_dump(mode="json") | {"restart": restart})
        self.run_dir.mkdir(exist_ok=True)
        (self.run_dir / "config.yaml").write_text(dump_yaml(config))

    def before(self, exit_code: int = 0) -> str:
        """What `before-attempt` printed; as the script does, its number is handed on."""
        assert cli.main(["before-attempt", str(self.run_dir)]) == exit_code
        output = self.capsys.readouterr()
        if exit_code:
            assert output.out == ""
            return output.err
        self.monkeypatch.setenv("MEGAMOE_ATTEMPT", output.out.strip())
        return output.out

    def after(self, exit_code: int) -> str:
        """The line that `after-attempt` printed."""
        assert cli.main(["after-attempt", str(self.run_dir), "--exit-code", str(exit_code)]) == 0
        output = self.capsys.readouterr()
        assert output.err == "" and output.out.count("\n") == 1
        return output.out.rstrip("\n")

    def attempt(self, exit_code: int, *, saves: int | None = None) -> str:
        self.before()
        if saves is not None:
            save_checkpoint(self.run_dir, saves)
        return self.after(exit_code)

    def kinds(self) -> list[str]:
        return [event["kind"] for event in read_events(self.run_dir)]


@pytest.fixture
def script(tmp_path, capsys, monkeypatch) -> BatchScript:
    for name in ("MEGAMOE_ATTEMPT", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return BatchScript(tmp_path / "run", capsys, monkeypatch)
