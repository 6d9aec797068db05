"""The `megamoe` command as a user meets it: output, exit codes, one-line errors, and no torch where speed counts."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from megamoe import __version__, cli
from megamoe.checkpoint.commit import begin, commit
from megamoe.checkpoint.slices import Slice
from megamoe.checkpoint.writer import write_rank
from megamoe.config import load_config
from megamoe.config.presets import PRESETS
from megamoe.config.schema import Config
from megamoe.errors import TrainingInterrupted, TrainingStopped
from megamoe.launch import local
from megamoe.topology.parameters import param_table

ROOT = Path(__file__).parents[2]
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MEGAMOE_INIT_METHOD")


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch, tmp_path):
    """As started by hand, whatever runs these tests, and where no run has left a folder."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name in RANK_VARIABLES or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megamoe", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, **options
    )


def failure(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command that must fail without printing anything else."""
    exit_code = cli.main(arguments)
    output = capsys.readouterr()
    assert output.out == ""
    return exit_code, output.err


def test_presets_lists_all_with_sizes(capsys):
    assert cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", *PRESETS]
    row = next(line for line in lines if line.startswith("moe-1.1t"))
    assert row.split()[:7] == ["moe-1.1t", "paper", "32", "4,096", "512", "1,104,219,021,312", "8,835,244,032"]


def test_presets_as_json(capsys):
    assert cli.main(["presets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(PRESETS)
    assert rows["mixtral-8x7b"]["num_parameters"] == 46_702_792_704
    assert rows["moe-15b"]["num_active_parameters"] == 155_071_488


@pytest.mark.parametrize("name", PRESETS)
def test_what_show_prints_loads_to_the_same_config(capsys, tmp_path, name):
    overrides = ["run.num_steps=5000", "data.train=[{path: 'a #b', weight: 2}]"]
    assert cli.main(["show", name, *overrides]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(str(path)) == load_config(name, overrides)
    assert text.splitlines()[0].startswith(f"# megamoe show {name} run.num_steps=5000 ")
    assert re.fullmatch(r"# parameters: [0-9,]+", text.splitlines()[1])


def test_show_says_what_null_sizes_come_to(capsys):
    assert cli.main(["show", "quickstart"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "# parameters: 3,163,648" in lines
    assert "# active per token: 1,583,104" in lines
    assert "  ffn_hidden_size: null  # 512" in lines
    assert "  head_dim: null  # 32" in lines
    assert "  eval_capacity_factor: null" in lines


def test_show_as_json_takes_overrides_around_options(capsys):
    assert cli.main(["show", "quickstart", "run.seed=4", "--json", "run.seed=5", "model.num_layers=8"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["run"]["seed"] == 5
    assert shown["config"]["model"]["num_layers"] == 8
    assert shown["num_parameters"] > 3_163_648


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["show", "moe-15b", "moe.num_experts=60", "parallel.expert_parallel_size=8"],
            "expert_parallel_size 8 does not divide num_experts 60: use 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60",
        ),
        (
            ["show", "moe-15b", "optimizer.learning_rate=1"],
            'unknown key "optimizer.learning_rate" in the command line: did you mean "optimizer.lr"?',
        ),
        (["show", "moe-15"], 'no preset or file "moe-15": did you mean "moe-15b"?'),
        (
            ["train", "laptop-dense"],
            "data.train is empty: name an indexed dataset, as in data.train=[{path: data/my_text}]",
        ),
        (
            ["train", "quickstart", "--local-ranks", "6", "data.train=[{path: x}]"],
            "6 ranks are not a multiple of tensor_parallel_size 2 x pipeline_parallel_size 2 = 4: "
            "use 4, 8, 12, … ranks",
        ),
        (
            ["train", "quickstart", "data.train=[{path: x}]"],
            "1 rank is not a multiple of tensor_parallel_size 2 x pipeline_parallel_size 2 = 4: use 4, 8, 12, … ranks",
        ),
    ],
)
def test_what_the_user_must_mend_is_one_line(capsys, arguments, message):
    assert failure(capsys, *arguments) == (2, f"megamoe: error: {message}\n")


def test_of_many_ranks_only_the_first_tells_of_a_wrong_config(capsys, monkeypatch):
    variables = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "6", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for rank, num_lines in (("0", 1), ("5", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        exit_code, text = failure(capsys, "train", "quickstart", "data.train=[{path: x}]")
        assert (exit_code, len(text.splitlines())) == (2, num_lines)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["show"], ["train", "x", "--ranks", "3"], ["presets", "a=1"]])
def test_wrong_usage_exits_2_with_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: megamoe" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_local_ranks_is_a_count(capsys, count):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "quickstart", f"--local-ranks={count}"])
    assert caught.value.code == 2
    assert f'"{count}" is not a whole number of at least 1' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["presets", "show", "train"])
def test_every_command_has_help_with_an_example(capsys, name):
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: megamoe {name}" in text
    assert f"  megamoe {name}" in text.partition("example")[2]


def test_the_examples_in_help_can_be_read():
    """Each example's preset and overrides exist; files of the user do not, of course."""
    config = load_config("moe-15b", ["run.num_steps=1000", "parallel.expert_parallel_size=8"])
    assert config.parallel.expert_parallel_size == 8
    load_config("laptop-moe", ["data.train=[{path: data/my_text}]", "run.dir=runs/first"])


# ---------------------------------------------------------------- train


def fake_training(monkeypatch, run_rank) -> None:
    """The training stack, which takes seconds to import, is not what is tested here."""
    module = types.ModuleType("megamoe.training.main")
    module.run_rank = run_rank
    monkeypatch.setitem(sys.modules, "megamoe.training.main", module)


TRAIN = ["train", "laptop-dense", "data.train=[{path: x}]", "run.num_steps=60"]


def test_train_hands_the_whole_config_to_the_rank(monkeypatch):
    payloads = []
    fake_training(monkeypatch, payloads.append)
    assert cli.main(TRAIN) == 0
    assert json.loads(json.dumps(payloads)) == [{"config": load_config(TRAIN[1], TRAIN[2:]).model_dump(mode="json")}]


def test_train_reports_why_training_stopped(capsys, monkeypatch):
    def stop(payload):
        raise TrainingStopped("21 steps in a row were skipped")

    fake_training(monkeypatch, stop)
    assert failure(capsys, *TRAIN) == (3, "megamoe: error: 21 steps in a row were skipped\n")


def test_an_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupt(payload):
        raise KeyboardInterrupt

    fake_training(monkeypatch, interrupt)
    assert failure(capsys, *TRAIN) == (130, "")


def test_an_obeyed_signal_is_no_error_and_has_a_code_of_its_own(capsys, monkeypatch):
    def stop(payload):
        raise TrainingInterrupted("stopped by a signal after step 3")

    fake_training(monkeypatch, stop)
    assert failure(capsys, *TRAIN) == (75, "megamoe: stopped by a signal after step 3\n")


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def fail(payload):
        raise ZeroDivisionError

    fake_training(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(TRAIN)


def test_train_starts_local_ranks(monkeypatch):
    calls = []

    def run_local(entry, payload, **options):
        calls.append((entry, payload["config"]["run"]["num_steps"], options))
        return local.LocalResult(exit_code=7, failure=None, preload_seconds=0.0)

    monkeypatch.setattr(local, "run_local", run_local)
    assert cli.main([*TRAIN[:2], "--local-ranks", "2", *TRAIN[2:]]) == 7
    options = {"num_ranks": 2, "preload": ("megamoe.training.main",), "timeout_seconds": None, "grace_seconds": 6.0}
    options["stop_seconds"] = Config().parallel.timeout_seconds + Config().checkpoint.save_timeout_seconds
    assert calls == [("megamoe.training.main:run_rank", 60, options)]


def checkpoint_of(run_dir: Path, step: int) -> None:
    """A whole checkpoint of the preset, its weights all zero."""
    root, config = run_dir / "checkpoints", load_config("laptop-dense")
    partial, slices = begin(root, step, "test-1"), []
    for parameter in param_table(config.model, config.moe):
        box = tuple((0, size) for size in parameter.shape)
        piece = Slice("weight", parameter.name, "F32", parameter.shape, box, 0, parameter.num_elements)
        slices.append((piece, np.zeros(parameter.num_elements, dtype=np.float32)))
    write_rank(partial, rank=0, save_id="test-1", step=step, slices=slices)
    commit(
        root, partial, num_ranks=1, step=step, save_id="test-1", state={"step": step}, layout={}, keep_last=2,
        config=config.model_dump(mode="json"), keep_every_steps=None, timeout_seconds=10.0,
    )  # fmt: skip


@pytest.mark.parametrize("step", [60, 70])
def test_a_complete_run_ends_at_once_and_says_so(capsys, monkeypatch, tmp_path, step):
    fake_training(monkeypatch, lambda payload: pytest.fail("a rank was started"))
    checkpoint_of(tmp_path / "run", step)
    assert cli.main([*TRAIN, "run.dir=run"]) == 0
    assert capsys.readouterr() == (f"run is complete: step {step} of 60. Nothing to do.\n", "")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGAMOE_INIT_METHOD", f"file://{tmp_path}/meeting")
    assert cli.main([*TRAIN, "run.dir=run"]) == 0
    assert capsys.readouterr() == ("", ""), "one rank says it"


@pytest.mark.parametrize(
    ("step", "override"), [(59, "run.seed=1"), (60, "checkpoint.resume=false"), (60, "run.num_steps=61")]
)
def test_a_run_with_steps_to_go_is_trained(capsys, monkeypatch, tmp_path, step, override):
    payloads = []
    fake_training(monkeypatch, payloads.append)
    checkpoint_of(tmp_path / "run", step)
    assert cli.main([*TRAIN, "run.dir=run", override]) == 0
    assert len(payloads) == 1
    assert capsys.readouterr().out == ""


def test_the_checkpoint_of_another_model_is_no_complete_run(capsys, monkeypatch, tmp_path):
    fake_training(monkeypatch, lambda payload: pytest.fail("a rank was started"))
    checkpoint_of(tmp_path / "run", 60)
    checkpoint_of(tmp_path / "run", 60)  # saved again: the older one steps aside
    assert cli.main([*TRAIN, "run.dir=run", "model.num_attention_heads=8"]) == 2
    assert capsys.readouterr().err == (
        "megamoe: error: run/checkpoints/step_00000060 holds another model "
        "(model.num_attention_heads 4 there, 8 here): resume with that model, "
        "choose another run.dir, or set checkpoint.resume false\n"
    )


def test_a_run_whose_checkpoint_is_damaged_is_left_to_the_ranks(monkeypatch, tmp_path):
    payloads = []
    fake_training(monkeypatch, payloads.append)
    checkpoint_of(tmp_path / "run", 60)
    (tmp_path / "run" / "checkpoints" / "step_00000060" / "manifest.json").write_text("{")
    assert cli.main([*TRAIN, "run.dir=run"]) == 0 and len(payloads) == 1


def test_a_latest_that_names_no_checkpoint_is_told_once(capsys, monkeypatch, tmp_path):
    fake_training(monkeypatch, lambda payload: pytest.fail("a rank was started"))
    checkpoint_of(tmp_path / "run", 10)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000020")
    message = (
        'run/checkpoints/latest names "step_00000020", which is no checkpoint beside it: write the name of one of '
        "['step_00000010'] into it, or remove it to start anew"
    )
    assert failure(capsys, *TRAIN, "run.dir=run") == (2, f"megamoe: error: {message}\n")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGAMOE_INIT_METHOD", f"file://{tmp_path}/meeting")
    assert failure(capsys, *TRAIN, "run.dir=run") == (2, "")


# ---------------------------------------------------------------- as a process


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["presets"], ["show", "moe-1.1t"], ["train", "--help"], ["show", "nix"], ["preflight", "--help"],
     ["after-attempt", "--help"]],
)
def test_fast_commands_import_nothing_heavy(arguments):
    """Under a second on any machine means: no torch, nor numpy, nor the engines."""
    program = (
        "import sys\nfrom megamoe.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'megatron', 'transformers', 'wandb'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_help_does_not_even_load_the_schema():
    program = "import sys\nimport megamoe.cli\nsys.exit('pydantic' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_python_dash_m_megamoe():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"megamoe {__version__}\n")
    done = command("show", "moe-15b", "run.precision=fp64")
    assert (done.returncode, done.stdout) == (2, "")
    sentence = 'run.precision is "fp64" in the command line: it must be one of fp32, bf16, fp16'
    assert done.stderr == f"megamoe: error: {sentence}\n"


def test_a_reader_that_stops_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m megamoe show quickstart | head -1", shell=True, cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("# megamoe show quickstart\n", "")
