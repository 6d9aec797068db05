"""Rank 0's voice: terminal, log file, metrics, Weights & Biases, and a run that outlives its tracking service."""

import pytest
import wandb

from megamoe.config import load_config
from megamoe.training import monitor as module
from megamoe.training.metrics import read_metrics
from megamoe.training.monitor import Monitor


def settings(run_dir, *overrides: str):
    return load_config("laptop-moe", [f"run.dir={run_dir}", "run.num_steps=20", *overrides])


@pytest.fixture
def quick_wandb(monkeypatch, tmp_path):
    """Weights & Biases without its look around the machine, and with nothing outside the test's folder."""
    for name in ("DISABLE_GIT", "DISABLE_CODE", "SILENT", "X_DISABLE_STATS", "X_DISABLE_META"):
        monkeypatch.setenv(f"WANDB_{name}", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))


class FakeRun:
    """Keeps what is logged; fails where it is told to."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails, self.logged, self.finished = fails, [], False

    def log(self, metrics, step):
        if self.fails == "log":
            raise ConnectionError("the line is cut")
        self.logged.append((step, metrics))

    def finish(self):
        if self.fails == "finish":
            raise ConnectionError("the line is cut")
        self.finished = True


def test_lines_are_printed_logged_and_recorded(tmp_path, capsys):
    monitor = Monitor(settings(tmp_path), is_first=True, resume_step=0)
    monitor.say("hello")
    monitor.record({"step": 5, "loss": 2.5})
    lines = ["hello", "step  5/20 | loss  2.5000"]
    assert (tmp_path / "log.txt").read_text().splitlines() == lines, "while the run goes on"
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 2.5}]
    monitor.show_step(6)
    monitor.close()
    assert capsys.readouterr().out.splitlines() == lines
    assert not (tmp_path / "wandb").exists()


def test_a_resumed_run_goes_on_in_the_same_files(tmp_path):
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        monitor = Monitor(settings(tmp_path), is_first=True, resume_step=resume_step)
        for step in steps:
            monitor.record({"step": step, "round": resume_step})
        monitor.close()
    recorded = [(line["step"], line["round"]) for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert recorded == [(1, 0), (2, 0), (3, 2), (4, 2)]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 5, "the log keeps what was said"


def test_other_ranks_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb was started"))
    run_dir = tmp_path / "run"
    monitor = Monitor(settings(run_dir, "monitor.wandb_mode=offline"), is_first=False, resume_step=0)
    monitor.say("hello")
    monitor.record({"step": 5})
    monitor.show_step(5)
    monitor.close()
    assert not run_dir.exists() and capsys.readouterr() == ("", "")


def test_wandb_is_told_the_config_and_every_step(tmp_path, monkeypatch):
    calls, run = [], FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or run)
    overrides = ("monitor.wandb_mode=online", "monitor.wandb_project=p", "monitor.wandb_name=n")
    config = settings(tmp_path, *overrides)
    monitor = Monitor(config, is_first=True, resume_step=0)
    for step in (1, 2):
        monitor.record({"step": step, "loss": 1.0 / step})
    monitor.close()
    resolved = config.model_dump(mode="json")
    assert calls == [{"project": "p", "name": "n", "mode": "online", "dir": str(tmp_path), "config": resolved}]
    assert run.logged == [(1, {"step": 1, "loss": 1.0}), (2, {"step": 2, "loss": 0.5})]
    assert run.finished


def test_a_resumed_run_goes_on_in_the_same_curves(tmp_path, monkeypatch):
    calls, run = [], FakeRun()
    run.id = "abc"
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options.get("id")) or run)
    config = settings(tmp_path, "monitor.wandb_mode=online")
    first = Monitor(config, is_first=True, resume_step=0)
    Monitor(config, is_first=True, resume_step=5, run_id=first.run_id)
    assert calls == [None, "abc"]


def test_wandb_offline_leaves_a_run_in_the_runs_folder(tmp_path, quick_wandb):
    monitor = Monitor(settings(tmp_path, "monitor.wandb_mode=offline"), is_first=True, resume_step=0)
    monitor.record({"step": 1, "loss": 0.625})
    monitor.close()
    assert "Weights & Biases" not in (tmp_path / "log.txt").read_text()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = folder.glob("run-*.wandb")
    content = record.read_bytes()
    assert b"loss" in content and b"0.625" in content
    assert b"num_experts" in content, "and the configuration"


@pytest.mark.parametrize(
    ("fails", "state", "num_logged"),
    [("init", "not used", 0), ("log", "no longer used", 0), ("finish", "not complete", 2)],
)
def test_a_run_goes_on_when_wandb_fails_and_says_so_once(tmp_path, monkeypatch, capsys, fails, state, num_logged):
    run = FakeRun(fails)

    def init(**_):
        if fails == "init":
            raise wandb.errors.CommError("the line is cut")
        return run

    monkeypatch.setattr(wandb, "init", init)
    monitor = Monitor(settings(tmp_path, "monitor.wandb_mode=online"), is_first=True, resume_step=0)
    for step in (1, 2):
        monitor.record({"step": step})
    monitor.close()
    assert len(run.logged) == num_logged
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    sentence = f"Weights & Biases is {state}: the line is cut. Metrics go to metrics.jsonl"
    assert capsys.readouterr().out.splitlines().count(sentence) == 1
    assert (tmp_path / "log.txt").read_text().splitlines().count(sentence) == 1


def test_an_interrupt_is_not_taken_for_a_failure_of_wandb(tmp_path, monkeypatch):
    def interrupt(config, run_id):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "WandbSink", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Monitor(settings(tmp_path, "monitor.wandb_mode=online"), is_first=True, resume_step=0)
