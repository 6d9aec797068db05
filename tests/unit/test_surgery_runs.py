"""Surgery as it is run: the commands, what they refuse and in which words, deaths, memory, what training needs."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megamoe.checkpoint import faults, manifest
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.config.validation import validate
from megamoe.runs.run_folder import checkpoint_at, resumable_manifest
from megamoe.surgery import execute
from megamoe.surgery.sources import Sources
from megamoe.surgery.upcycle import plan_upcycle
from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table
from megamoe.training.checkpoint_state import check_same_model
from tests.unit.checkpoint_cases import load, same, save
from tests.unit.surgery_cases import make, model_tensors, small_config
from tests.unit.test_checkpoint_crashes import die_at

NUM_KILLS = 60 if "MEGAMOE_KILL_POINTS" in os.environ else 10
MOE = ["moe.num_experts=4", "moe.layer_pattern=2"]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(execute, "PART_BYTES", 8192)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here
    yield
    faults.set_callback(None)


@pytest.fixture
def dense(tmp_path) -> Path:
    make(tmp_path / "dense", small_config("paper"))
    return tmp_path / "dense"


@pytest.fixture
def mixture(tmp_path) -> Path:
    make(tmp_path / "mixture", small_config("modern", *MOE, "parallel.expert_parallel_size=2"))
    return tmp_path / "mixture"


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def written(path: Path, tree: object) -> str:
    path.write_text(json.dumps(tree))
    return str(path)


def test_a_command_makes_a_run_that_training_starts_from(dense, tmp_path, capsys):
    before, out = fingerprint(dense), tmp_path / "new"
    words = ["experts", "upcycle", str(dense), str(out), "--experts", "4,8", "moe.layer_pattern=[0,2]", "--json"]
    assert main([*words, "parallel.expert_parallel_size=2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert fingerprint(dense) == before
    assert sorted(os.listdir(out)) == ["checkpoints", "config.yaml", "surgery.json"]
    assert sorted(os.listdir(out / "checkpoints")) == ["latest", "step_00000000"]
    folder = checkpoint_at(out)
    Checkpoint.open(folder).verify()
    config = load_config(str(out / "config.yaml"))
    validate(config, 2)
    assert config == config_of(Checkpoint.open(folder)) and config.run.dir == str(out)
    assert resumable_manifest(out)[1].state["step"] == 0
    check_same_model(Checkpoint.open(folder).manifest.config, config, folder, with_optimizer=False)
    assert json.loads((out / "surgery.json").read_text()) == told
    for ending, of in (("_before", small_config("paper")), ("", config)):
        table = param_table(of.model, of.moe)
        assert told[f"num_parameters{ending}"] == num_parameters(table)
        assert told[f"num_active_parameters{ending}"] == num_active_parameters(table, of.moe)
    assert told["num_parameters"] > told["num_active_parameters"] > told["num_parameters_before"]


def test_every_command_says_what_it_did(mixture, tmp_path, capsys):
    load_file = written(tmp_path / "load.json", {"1": [1, 2, 3, 4], "3": [4, 0, 0, 1]})
    groups = written(tmp_path / "groups.json", {"1": [[0, 1], [2, 3]], "3": [[3, 0], [1, 2]]})
    for number, words in enumerate((
        ["prune", "--experts", "2", "--load", load_file],
        ["merge", "--experts", "2", "--by", "weights", "--load", load_file],
        ["merge", "--groups", groups],
        ["resize", "--experts", "8", "--noise", "0.01", "--seed", "3", "moe.top_k=4"],
        ["resize", "--experts", "4,2", "--shrink", "merge"],
    )):  # fmt: skip
        out = tmp_path / str(number)
        assert main(["experts", words[0], str(mixture), str(out), *words[1:]]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{words[0]}: {mixture}/checkpoints/step_00000100 -> {out}") and "preserved" in text
        Checkpoint.open(checkpoint_at(out)).verify()
    assert main(["average", "--weights", "1,3", str(mixture), str(mixture), str(tmp_path / "mean")]) == 0
    assert "factors 0.25, 0.75" in capsys.readouterr().out


REFUSED = [
    (["upcycle", "MIX", "OUT", "--experts", "4"], "has experts already"),
    (["upcycle", "DENSE", "OUT", "--experts", "8", "--granularity", "5", "moe.top_k=5"], "does not divide the FFN"),
    (["upcycle", "DENSE", "OUT", "--experts", "8", "--granularity", "4"], "top_k 2 is no multiple of granularity 4"),
    (["upcycle", "DENSE", "OUT", "--experts", "6", "--granularity", "4", "moe.top_k=4"], "the 6 experts of layer 1"),
    (["upcycle", "DENSE", "OUT", "--experts", "4,4,4"], "has 3 entries"),
    (["upcycle", "DENSE", "OUT", "--experts", "0"], "use 1 or more"),
    (["upcycle", "DENSE", "OUT", "--experts", "4", "--noise", "-1"], "use 0 or more"),
    (["upcycle", "DENSE", "OUT", "--experts", "4", "moe.num_experts=8"], "follows from the operation's own"),
    (["upcycle", "DENSE", "OUT", "--experts", "4", "model.num_layers=8"], "cannot be set here"),
    (["upcycle", "DENSE", "OUT", "--experts", "4", "moe.shared_expert_ffn_hidden_size=8"], "routed experts only"),
    (["upcycle", "DENSE", "OUT", "--experts", "4", "moe.top_k=1"], "the router never learns"),
    (["upcycle", "DENSE", "DENSE", "--experts", "4"], "exists already"),
    (["upcycle", "DENSE", "INSIDE", "--experts", "4"], "lies within"),
    (["prune", "DENSE", "OUT", "--experts", "2", "--load", "LOAD"], "is a dense model"),
    (["prune", "MIX", "OUT", "--experts", "6", "--load", "LOAD"], "fewer than the 6 to keep"),
    (["prune", "MIX", "OUT", "--experts", "3", "--load", "LOAD"], "expert_parallel_size 2 does not divide"),
    (["prune", "MIX", "OUT", "--experts", "2,2,2", "--load", "LOAD"], "3 numbers of experts are given, but 2 layers"),
    (["prune", "MIX", "OUT", "--experts", "2", "--load", "SHORT"], "layer 3 has 3 counts, but 4 experts"),
    (["prune", "MIX", "OUT", "--experts", "2", "--load", "LAYERS"], "is about layers 0, 3"),
    (["prune", "MIX", "OUT", "--experts", "2", "--load", "NEGATIVE"], "has the count -2"),
    (["prune", "MIX", "OUT", "--experts", "2", "--load", "EMPTY"], "has no token at all"),
    (["prune", "MIX", "OUT", "--experts", "2", "--load", "NOWHERE"], "cannot read"),
    (["prune", "MIX", "OUT", "--experts", "2", "--load", "LOAD", "moe.expert_ffn_hidden_size=8"],
     "only routed experts and their number can change here"),
    (["prune", "MIX", "OUT", "--experts", "2", "--load", "LOAD", "moe.layer_pattern=1"], "layers.0.router.weight"),
    (["merge", "MIX", "OUT", "--experts", "8"], "cannot be merged to 8"),
    (["merge", "MIX", "OUT", "--groups", "TWICE"], "hold expert 1 2 times"),
    (["merge", "MIX", "OUT", "--groups", "BEYOND"], "hold expert 4, which does not exist"),
    (["resize", "MIX", "OUT", "--experts", "2"], "give the loads, or merge"),
    (["resize", "MIX", "OUT", "--experts", "1", "--shrink", "merge"], "top_k 2 is more than num_experts 1"),
]  # fmt: skip


def test_what_is_impossible_is_refused_in_a_sentence_and_leaves_nothing(dense, mixture, tmp_path, capsys):
    files = {
        "LOAD": {"1": [1, 2, 3, 4], "3": [4, 0, 0, 1]}, "SHORT": {"1": [1, 2, 3, 4], "3": [4, 0, 0]},
        "LAYERS": {"0": [1, 2, 3, 4], "3": [4, 0, 0, 1]}, "NEGATIVE": {"1": [1, -2, 3, 4], "3": [4, 0, 0, 1]},
        "EMPTY": {"1": [0, 0, 0, 0], "3": [4, 0, 0, 1]}, "TWICE": {"1": [[0, 1], [1, 2, 3]], "3": [[0, 1], [2, 3]]},
        "BEYOND": {"1": [[0, 1], [2, 3]], "3": [[0, 1], [2, 4]]},
    }  # fmt: skip
    names = {name: written(tmp_path / f"{name}.json", tree) for name, tree in files.items()}
    names |= {"MIX": str(mixture), "DENSE": str(dense), "OUT": str(tmp_path / "out"), "NOWHERE": str(tmp_path / "no")}
    names["INSIDE"] = str(dense / "checkpoints" / "step_00000100" / "x")
    there = set(os.listdir(tmp_path))
    for words, message in REFUSED:
        assert main(["experts", *(names.get(word, word) for word in words)]) == 2, words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, (words, said)
    for words, message in (
        ([names["DENSE"], names["MIX"]], "are different models"),
        ([names["MIX"]], "one checkpoint has no average"),
        (["--weights", "1", names["MIX"], names["MIX"]], "1 weights are given for 2 checkpoints"),
        (["--weights", "1,0", names["MIX"], names["MIX"]], "must all be above 0"),
    ):
        assert main(["average", *words, names["OUT"]]) == 2
        assert message in capsys.readouterr().err
    assert set(os.listdir(tmp_path)) == there


def test_groups_that_routing_groups_do_not_allow(tmp_path, capsys):
    mixture = make(tmp_path / "m", small_config("modern", *MOE, "moe.num_expert_groups=2", "moe.num_selected_groups=2"))
    groups = written(tmp_path / "g", {"1": [[0, 2], [1, 3]], "3": [[0, 1], [2, 3]]})
    assert main(["experts", "merge", str(mixture), str(tmp_path / "out"), "--groups", groups]) == 2
    assert "[0, 2] would be in routing group 0, but its experts come from [0, 1]" in capsys.readouterr().err
    assert main(["experts", "resize", str(mixture), str(tmp_path / "out"), "--experts", "5"]) == 2
    assert "num_expert_groups 2 does not divide" in capsys.readouterr().err


def test_values_that_16_bits_cannot_hold_and_damage_are_named(tmp_path, capsys):
    config = small_config("modern")
    tensors = model_tensors(config, dtype="F16")
    tensors["weight", "layers.1.ffn.fc2.weight"][1][3, 5] = np.array(40_000, np.float16).view(np.uint16)
    folder = save(tmp_path / "old" / "checkpoints", 1, tensors, config=config.model_dump(mode="json"))
    words = ["experts", "upcycle", str(folder), str(tmp_path / "out"), "--experts", "4", "--granularity", "2"]
    assert main(words) == 2
    assert (
        "weight layers.1.experts.fc2.weight would be 8e+04 somewhere, which F16 cannot hold" in capsys.readouterr().err
    )
    assert set(os.listdir(tmp_path)) == {"old"}
    file = next(path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors")
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    words[-1] = "1"
    file.write_bytes(data)
    assert main(words) == 2
    assert "is damaged: its checksum is wrong" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_killed_anywhere_it_leaves_its_input_and_finishes_when_asked_again(dense, tmp_path):
    words = ["experts", "upcycle", str(dense), "--experts", "4", "--noise", "0.1"]
    out, before = tmp_path / "out" / "new", fingerprint(dense)

    def operate(*more: str) -> None:
        assert main([*words[:3], str(out), *words[3:], *more]) == 0

    seen: list[str] = []
    faults.set_callback(seen.append)
    operate()
    faults.set_callback(None)
    truth = load(checkpoint_at(out))
    shutil.rmtree(out.parent)
    late = [seen.index(point) for point in ("manifest-renamed", "parts-removed", "latest-synced", "output-renamed")]
    numbers = sorted({*late, *random.Random(5).sample(range(len(seen)), NUM_KILLS)})
    print(f"seed 5, killed at {numbers} of {len(seen)} points")
    for number in numbers:
        child = os.fork()
        if child == 0:
            try:
                faults.set_callback(die_at(number))
                operate()
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert fingerprint(dense) == before
        if seen[number] == "output-renamed":  # it had its name already
            assert same(load(checkpoint_at(out)), truth)
            shutil.rmtree(out.parent)
            continue
        assert not out.exists()
        if number % 4 == 0:  # other arguments in between: what was left is of no use to them
            operate("--seed", "2")
            assert not same(load(checkpoint_at(out)), truth)
            shutil.rmtree(out)
        again: list[str] = []
        faults.set_callback(again.append)
        operate()
        faults.set_callback(None)
        assert same(load(checkpoint_at(out)), truth)
        if "part-renamed" in seen[:number] and number % 4:
            assert again.count("file-opened") < seen.count("file-opened"), "parts that were done were written again"
        assert set(os.listdir(out.parent)) == {out.name}
        shutil.rmtree(out.parent)


def test_the_loss_is_asked_for_before_and_after(dense, tmp_path):
    asked = []

    def loss_of(folder: Path) -> float:
        Checkpoint.open(folder).verify()
        asked.append(folder)
        return 2.0 + len(asked)

    with Sources([checkpoint_at(dense)]) as sources:
        result = execute.apply(sources, plan_upcycle(sources, 4), tmp_path / "new", check_loss=loss_of)
    assert (result.losses_before, result.loss) == ((3.0,), 4.0)
    assert asked[0] == checkpoint_at(dense) and asked[1].name == "step_00000000"
    assert json.loads((tmp_path / "new" / "surgery.json").read_text())["loss"] == 4.0


MEASURE = """
import sys
from pathlib import Path
from megamoe.checkpoint import manifest
from megamoe.cli import main
import megamoe.surgery.execute, megamoe.surgery.upcycle, megamoe.surgery.resize, megamoe.surgery.average, numpy

manifest.BLOCK_BYTES = 1 << 20

def peak_kib():  # not ru_maxrss: that counts what the process was forked from
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

base = peak_kib()
code = main(sys.argv[1:])
print((peak_kib() - base) // 1024, file=sys.stderr)
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path, monkeypatch):
    """Matrices of 1 and of 16 MB, with noise, merged and averaged: the same few windows of a block of 1 MiB."""
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 1 << 20)
    peaks = []
    for ffn in (2048, 32_768):
        config = small_config(
            "paper",
            "model.num_layers=1",
            "model.hidden_size=128",
            f"model.ffn_hidden_size={ffn}",
            "moe.layer_pattern=1",
        )
        folder = str(tmp_path / str(ffn))
        make(Path(folder), config)
        for words in (
            ["experts", "upcycle", folder, f"{folder}u", "--experts", "4", "--granularity", "2", "--noise", "0.1"],
            ["experts", "merge", f"{folder}u", f"{folder}m", "--experts", "2", "--by", "weights"],
            ["average", folder, folder, f"{folder}a"],
        ):
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True, timeout=300
            )
            peaks.append(int(done.stderr.split()[-1]))
    print(f"peak MB above the imports, upcycle, merge, average, of small and of large matrices: {peaks}")
    assert max(peaks) < 60
    assert max(large - small for small, large in zip(peaks[:3], peaks[3:], strict=True)) < 24
