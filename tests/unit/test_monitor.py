"""Rank 0's voice: terminal, log file, metrics, Weights & Biases, and a run that outlives its tracking service."""


import pytest
import wandb

from megamoe.config import load_config
from megamoe.runs.events import append_event, read_events
from megamoe.runs.metrics import read_metrics
from megamoe.sinks import wandb_sink
from megamoe.sinks.specs import tracker_specs, wandb_mode, wandb_run_id
from megamoe.training import monitor as module
from megamoe.training.monitor import Monitor
from tests.unit.wandb_cases import quiet, stored_runs


def settings(run_dir, *overrides: str):
    return load_config("laptop-moe", [f"run.dir={run_dir}", "run.num_steps=20", *overrides])


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
    monkeypatch.setattr(module, "Tracker", lambda *_: pytest.fail("a service was started"))
    run_dir = tmp_path / "run"
    config = settings(run_dir, "monitor.wandb_mode=offline", "monitor.tensorboard=true")
    monitor = Monitor(config, is_first=False, resume_step=0)
    monitor.say("hello")
    monitor.record({"step": 5})
    monitor.show_step(5)
    monitor.close()
    assert not run_dir.exists() and capsys.readouterr() == ("", "")


@pytest.fixture
def quick_wandb(monkeypatch, tmp_path):
    quiet(monkeypatch, tmp_path)


def run(config, first_step, last_step, *, run_id=None, fields=lambda step: {}):
    """A run's attempt from behind `first_step`: what its monitor writes."""
    monitor = Monitor(config, is_first=True, resume_step=first_step, run_id=run_id, details={"num_ranks": 8})
    for step in range(first_step + 1, last_step + 1):
        monitor.record_loads(step, {1: [3.0, 1.0, 0.0, step], 3: [2.0, 2.0, 2.0, 2.0]})
        monitor.record({"step": step, "loss": 2.0 / step, "tokens_per_second": 100.0, **fields(step)})
    monitor.close()
    return monitor


def test_wandb_offline_holds_everything_under_one_id_and_every_step_once(tmp_path, quick_wandb):
    """An attempt that gets to step 7 and one that goes on from step 5."""
    settings_of = (
        "monitor.wandb_mode=offline", "monitor.wandb_project=p", "monitor.wandb_group=g", "monitor.wandb_job_type=j",
        "monitor.wandb_tags=[a,b]", "monitor.wandb_name=n", "monitor.wandb_notes=why", "monitor.wandb_entity=e",
        "monitor.wandb_artifacts=true",
    )  # fmt: skip
    config = settings(tmp_path, *settings_of)
    folder = tmp_path / "checkpoints" / "step_00000005"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (tmp_path / "plan.json").write_text('{"fits": true}')
    run(config, 0, 7, fields=lambda step: {"grad_norm": float("inf")} if step == 3 else {"valid_loss/books": 1.5})
    append_event(tmp_path, "hang", "rank 3 stands still")
    monitor = Monitor(config, is_first=True, resume_step=5)
    monitor.note("save", "saved", step=5)
    monitor.alert("Look", "at this", "ERROR")
    for step in range(6, 10):
        monitor.record({"step": step, "loss": 9.0})
    monitor.close()
    assert "Weights & Biases" not in (tmp_path / "log.txt").read_text()

    first, second = stored_runs(tmp_path)
    assert first.run.run_id == second.run.run_id == (tmp_path / "wandb_run_id").read_text().strip()
    assert first.steps + second.steps == list(range(1, 10)), "without gaps and without doubles"
    for each in (first, second):
        found = each.run
        assert (found.project, found.run_group, found.job_type, found.display_name) == ("p", "g", "j", "n")
        assert (found.entity, list(found.tags), found.notes) == ("e", ["a", "b"], "why")
        assert {key: each.config[key] for key in ("model", "moe", "monitor")} == {
            key: config.model_dump(mode="json")[key] for key in ("model", "moe", "monitor")
        }
    assert first.config["num_ranks"] == 8 and first.config["plan"] == {"fits": True}
    assert len(first.config["code"]["commit"]) == 40
    row = first.history[1]
    assert (row["train/loss"], row["throughput/tokens_per_second"], row["valid/loss/books"]) == (1.0, 100, 1.5)
    assert row["moe_load/layer_001/values"] == [3, 1, 0, 2] and row["moe_load/layer_001/bins"] == [0, 1, 2, 3, 4]
    assert row["moe_layers/load_max_over_mean_001"] == 2.0
    assert "train/grad_norm" not in first.history[2] and first.history[2]["train/num_nonfinite_values"] == 1
    loss = first.metrics["train/loss"]
    assert loss.step_metric == "step" and loss.summary.min and first.metrics["step"].options.hidden
    assert second.alerts == [("A rank hangs", "rank 3 stands still", "ERROR"), ("Look", "at this", "ERROR")]
    (artifact,) = second.artifacts  # the manifest itself, and of every file where it lies
    assert artifact.type == "checkpoint" and {entry.path for entry in artifact.manifest.contents} == {
        "manifest.json", "checkpoint/manifest.json",
    }  # fmt: skip
    assert [(event["kind"], event.get("title")) for event in read_events(tmp_path)][1:] == [
        ("save", None), ("alert", "Look"),
    ]  # fmt: skip


def test_a_run_that_is_killed_before_its_first_checkpoint_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    config = settings(tmp_path)
    first = wandb_run_id(config, None)
    assert wandb_run_id(config, None) == first, "at once in the run's folder"
    assert wandb_run_id(config, "saved1") == "saved1", "a checkpoint knows it best"
    assert wandb_run_id(config, "../../etc") == "saved1", "what a file says is no path"
    assert wandb_run_id(settings(tmp_path, "checkpoint.resume=false"), None) not in (first, "saved1")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert wandb_run_id(config, "saved1") == "mine"


@pytest.mark.parametrize(
    ("configured", "variable", "mode"),
    [("disabled", "online", "disabled"), ("offline", None, "offline"), ("online", "offline", "offline"),
     ("offline", "online", "online"), ("online", "disabled", "disabled"), ("online", "dryrun", "offline"),
     ("online", "nonsense", "online")],
)  # fmt: skip
def test_the_mode_is_the_users(tmp_path, monkeypatch, configured, variable, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    config = settings(tmp_path, f"monitor.wandb_mode={configured}")
    assert wandb_mode(config) == mode
    specs = tracker_specs(config, resume_step=0, run_id="abc", details={})
    assert [spec["mode"] for spec in specs] == ([] if mode == "disabled" else [mode])


def test_what_the_user_has_set_by_variables_is_left_alone(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options) or FakeRun())
    for name, value in {"PROJECT": "theirs", "TAGS": "x,y", "DIR": str(tmp_path / "elsewhere")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("ENTITY", "RUN_GROUP", "JOB_TYPE", "NAME", "NOTES", "RESUME", "MODE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    config = settings(tmp_path, "monitor.wandb_mode=online", "monitor.wandb_group=g", "monitor.wandb_tags=[a]")
    (spec,) = tracker_specs(config, resume_step=3, run_id="abc", details={"plan": {"seconds": 1.0}})
    sink = wandb_sink.WandbSink({**spec, "process": 1})
    (options,) = calls
    assert {"project", "tags", "dir", "name", "notes", "entity"}.isdisjoint(options), options.keys()
    assert {key: options[key] for key in ("group", "job_type", "id", "mode", "resume")} == {
        "group": "g", "job_type": "train", "id": "abc", "mode": "online", "resume": "allow",
    }  # fmt: skip
    assert options["config"]["plan"] == {"seconds": 1.0} and options["config"]["run"]["num_steps"] == 20
    assert sink.held_step == 41, "online the service says what it holds"


class FakeRun:
    starting_step = 42

    def define_metric(self, *_, **__):
        pass


def test_tensorboard_shows_each_step_once_over_attempts(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = settings(tmp_path, "monitor.tensorboard=true")
    run(config, 0, 7)
    run(config, 5, 9, fields=lambda step: {"valid_loss": 0.5})
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {accumulator.HISTOGRAMS: 0})
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in found.Scalars("valid/loss")] == [6, 7, 8, 9]
    assert found.Histograms("moe_load/layer_001")[1].histogram_value.bucket == [3, 1, 0, 2]
    assert not (tmp_path / "wandb").exists()


def test_tensorboard_without_its_package_is_refused_in_a_sentence(tmp_path, monkeypatch):
    from megamoe.config import validation
    from megamoe.errors import ConfigError

    wanted = ("monitor.tensorboard=true", "data.train=[{path: x}]", "optimizer.warmup_steps=0")
    monkeypatch.setattr(validation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        validation.validate_for_training(settings(tmp_path, *wanted))
    assert str(refused.value) == (
        "monitor.tensorboard needs the package tensorboard, which is not installed: pip install tensorboard, or set "
        "monitor.tensorboard false"
    )
