"""`megamoe checkpoint`: what it shows is there, what it compares differs so, what it rewrites is the same state."""

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

from megamoe.checkpoint import faults, layouts, manifest
from megamoe.checkpoint.compare import config_differences
from megamoe.checkpoint.files import OpenFiles
from megamoe.checkpoint.folders import checkpoint_name
from megamoe.checkpoint.layouts import holders, slices_by_rank
from megamoe.checkpoint.manifest import MANIFEST
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.checkpoint.slices import STORAGE
from megamoe.checkpoint_commands import _short
from megamoe.cli import main
from megamoe.config.loading import load_config
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import local_slices, param_table
from megamoe.topology.stages import stage_of_layer
from tests.unit.checkpoint_cases import Tensors, load, same, save
from tests.unit.test_checkpoint_crashes import die_at

NUM_KILLS = 100 if "MEGAMOE_KILL_POINTS" in os.environ else 6
SMALL = [
    "model.num_layers=4", "model.hidden_size=16", "model.vocab_size=64", "model.vocab_size_multiple=8",
    "model.num_attention_heads=4", "moe.num_experts=4",
]  # fmt: skip
LAYOUTS = {
    "tp2 ep2 on 4": (4, ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2"]),
    "pp2 vp2 on 2": (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=2"]),
    "tp2 etp2 pp2 ep2 on 8": (8, [
        "parallel.tensor_parallel_size=2", "parallel.expert_tensor_parallel_size=2",
        "parallel.pipeline_parallel_size=2", "parallel.expert_parallel_size=2",
    ]),
    "dp3 on 3": (3, ["parallel.zero_stage=0"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_shares(monkeypatch):
    """Small tensors are then shared out, and have several blocks, as large ones do."""
    monkeypatch.setattr(layouts, "_SMALLEST_SHARE", 7)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 256)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power fails here
    yield
    faults.set_callback(None)


def model_tensors(step: int = 0) -> tuple[Tensors, dict]:
    """A 16-bit run of a small model, every kind of tensor, and its configuration."""
    config = load_config("laptop-moe", SMALL)
    generator = np.random.default_rng(step)
    tensors: Tensors = {}
    for parameter in param_table(config.model, config.moe):
        values = generator.standard_normal(parameter.shape).astype(np.float32)
        tensors["weight", parameter.name] = ("BF16", (values.view(np.uint32) >> 16).astype(np.uint16))
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            tensors[kind, parameter.name] = ("F32", generator.standard_normal(parameter.shape).astype(np.float32))
    tensors["balance_bias", "layers.1.router"] = ("F32", generator.standard_normal(4).astype(np.float32))
    for rank in range(2):
        tensors["random", f"rank_{rank:05d}/cpu"] = ("U8", generator.integers(0, 256, 24, np.uint8))
    return tensors, config.model_dump(mode="json")


@pytest.fixture
def folder(tmp_path) -> Path:
    tensors, config = model_tensors()
    return save(tmp_path / "run" / "checkpoints", 100, tensors, config=config)


def fingerprint(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def without_random(tensors: Tensors) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key[0] != "random"}


def reshard(folder: Path, out: Path, name: str, *options: str) -> None:
    num_ranks, overrides = LAYOUTS[name]
    keys = ("tensor", "pipeline", "virtual_pipeline", "expert", "expert_tensor")
    options = (*options, *(f"parallel.{key}_parallel_size=1" for key in keys), "parallel.zero_stage=1")
    assert main(["checkpoint", "reshard", str(folder), str(out), "--ranks", str(num_ranks), *options, *overrides]) == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_resharded_is_the_same_state_in_the_places_of_the_new_layout(name, folder, tmp_path, capsys):
    before, truth = fingerprint(folder), without_random(load(folder))
    reshard(folder, tmp_path / "new", name)
    assert fingerprint(folder) == before
    assert same(load(tmp_path / "new"), truth)
    num_ranks, overrides = LAYOUTS[name]
    checkpoint = Checkpoint.open(tmp_path / "new")
    checkpoint.verify()
    config = config_of(checkpoint)
    assert config == load_config("laptop-moe", [*SMALL, *overrides])
    assert checkpoint.manifest.layout["num_ranks"] == num_ranks and checkpoint.manifest.step == 100
    assert checkpoint.manifest.state == Checkpoint.open(folder).manifest.state
    # Each slice lies within what its rank holds, worked out here from the grid alone.
    grid = Grid.from_config(config.parallel, num_ranks)
    table = {parameter.name: parameter for parameter in param_table(config.model, config.moe)}
    files_used = set()
    for (kind, tensor), entry in checkpoint.manifest.tensors.items():
        for stored in entry.slices:
            file = checkpoint.manifest.files[stored.file].name
            files_used.add(file)
            if kind == "balance_bias":
                continue
            at, parameter = grid.coordinates(int(file[-17:-12])), table[tensor]
            assert tuple((c.start, c.stop) for c in local_slices(parameter, grid, at)) == stored.box
            if parameter.layer is not None:
                virtual = config.parallel.virtual_pipeline_parallel_size
                stage, _ = stage_of_layer(parameter.layer, config.model.num_layers, grid.pipeline, virtual)
                assert at.pipeline == stage, (tensor, file)
    assert {int(file[-17:-12]) for file in files_used} == set(range(num_ranks)), "some ranks write nothing"
    assert len(files_used) == len(checkpoint.manifest.files)


def test_a_chain_of_layouts_comes_back_to_the_same_files(folder, tmp_path):
    """The same layout again gives the same cuts: tensor files equal up to the save's id, and values to the bit."""
    rng, here, truth = random.Random(3), folder, without_random(load(folder))
    names = [rng.choice(list(LAYOUTS)) for _ in range(5)]
    for number, name in enumerate(["dp3 on 3", *names, "dp3 on 3"]):
        reshard(here, tmp_path / str(number), name)
        here = tmp_path / str(number)
        assert same(load(here), truth), (number, name)

    def cuts(folder: Path) -> dict:
        entries = Checkpoint.open(folder).manifest.tensors
        return {
            key: sorted((slot.box, slot.first, slot.last, slot.checksums) for slot in entry.slices)
            for key, entry in entries.items()
        }

    assert cuts(here) == cuts(tmp_path / "0")


def test_random_states_go_along_only_where_they_mean_the_same(folder, tmp_path):
    reshard(folder, tmp_path / "a", "dp3 on 3")
    assert not [key for key in load(tmp_path / "a") if key[0] == "random"]
    tensors, config = model_tensors()
    layout = Checkpoint.open(tmp_path / "a").manifest.layout
    with_random = save(tmp_path / "b", 100, tensors, config=config, layout=layout)
    arguments = ["checkpoint", "reshard", str(with_random), str(tmp_path / "c"), "parallel.zero_stage=2"]
    assert main(arguments) == 0
    assert same(load(tmp_path / "c"), tensors)


def test_weights_only_touches_nothing_else(folder, tmp_path, monkeypatch):
    opened = []
    original = OpenFiles.descriptor

    def spy(self, path):
        opened.append(path.name.partition("_rank_")[0])
        return original(self, path)

    monkeypatch.setattr(OpenFiles, "descriptor", spy)
    reshard(folder, tmp_path / "new", "tp2 ep2 on 4", "--weights-only")
    assert set(opened) == {"weight", "balance_bias"}
    kept = {key: tensor for key, tensor in load(folder).items() if key[0] in ("weight", "balance_bias")}
    assert same(load(tmp_path / "new"), kept)


def test_a_reshard_killed_anywhere_leaves_its_input_and_finishes_when_asked_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 8192)
    monkeypatch.setattr(layouts, "_SMALLEST_SHARE", 512)
    before, truth = fingerprint(folder), without_random(load(folder))
    seen: list[str] = []
    faults.set_callback(seen.append)
    reshard(folder, tmp_path / "dry", "tp2 ep2 on 4")
    faults.set_callback(None)
    rng = random.Random(5)
    numbers = sorted(rng.sample(range(len(seen)), NUM_KILLS))
    print(f"seed 5, killed at {numbers} of {len(seen)} points")
    for number in numbers:
        out = tmp_path / "out" / checkpoint_name(100)
        child = os.fork()
        if child == 0:
            try:
                faults.set_callback(die_at(number))
                reshard(folder, out, "tp2 ep2 on 4")
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert fingerprint(folder) == before
        assert not out.exists()
        if number % 3 == 0:  # other arguments in between: what was left is of no use to them
            reshard(folder, out, "dp3 on 3")
            shutil.rmtree(out)
        again: list[str] = []
        faults.set_callback(again.append)
        reshard(folder, out, "tp2 ep2 on 4")
        faults.set_callback(None)
        assert same(load(out), truth)
        if "part-renamed" in seen[:number] and number % 3 and "parts-removed" not in seen[: number + 1]:
            assert again.count("file-opened") < seen.count("file-opened"), "ranks that were done were written again"
        assert set(os.listdir(out.parent)) == {out.name}
        shutil.rmtree(out)


def test_wrong_uses_are_said_in_a_sentence(folder, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for arguments, words in (
        (["reshard", str(folder), str(tmp_path / "there")], "exists already"),
        (["reshard", str(folder), str(folder / "inside")], "lies within"),
        (["reshard", str(folder), str(tmp_path / "x"), "model.num_layers=2"], "only parallel.*"),
        (["reshard", str(folder), str(tmp_path / "x"), "parallel.tensor_size=2"], "tensor_parallel_size"),
        (["reshard", str(folder), str(tmp_path / "x"), "--ranks", "0"], "1 or more"),
        (["reshard", str(folder), str(tmp_path / "x"), "--ranks", "3", "parallel.tensor_parallel_size=2"], "3 ranks"),
        (["verify", str(tmp_path / "there")], "is no checkpoint"),
        (["inspect", str(tmp_path / "nowhere")], "is no checkpoint"),
    ):
        assert main(["checkpoint", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    with pytest.raises(SystemExit) as usage:
        main(["checkpoint", "verify"])
    assert usage.value.code == 2
    assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_inspect_counts_what_is_there(folder, capsys):
    tensors, _ = model_tensors()
    assert main(["checkpoint", "inspect", str(folder.parents[1]), "--json", "--tensors"]) == 0  # by the run's folder
    shown = json.loads(capsys.readouterr().out)
    assert shown["step"] == 100 and shown["state"]["samples"] == 1000 and shown["layout"] == {"num_ranks": 2}
    for kind in ("weight", "master", "exp_avg", "random"):
        own = [tensor for key, tensor in tensors.items() if key[0] == kind]
        assert shown["kinds"][kind]["num_tensors"] == len(own)
        assert shown["kinds"][kind]["num_bytes"] == sum(array.nbytes for _, array in own)
        assert shown["kinds"][kind]["num_elements"] == sum(array.size for _, array in own)
        assert shown["kinds"][kind]["dtypes"] == sorted({dtype for dtype, _ in own})
    assert shown["num_bytes"] == sum(p.stat().st_size for p in folder.iterdir() if p.name != MANIFEST)
    assert {(t["kind"], t["name"]): t["shape"] for t in shown["tensors"]} == {
        key: list(array.shape) for key, (_, array) in tensors.items()
    }
    assert main(["checkpoint", "inspect", str(folder.parent), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "step 100" in text and "embedding.weight [64, 16]" in text


def test_verify_says_whole_or_names_the_damage(folder, capsys):
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert "is whole" in capsys.readouterr().out
    path = next(folder.glob("exp_avg_rank_*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    assert main(["checkpoint", "verify", str(folder)]) == 1
    assert path.name in capsys.readouterr().err
    assert main(["checkpoint", "verify", "--json", str(folder)]) == 1
    assert path.name in json.loads(capsys.readouterr().out)["damaged"]
    assert main(["checkpoint", "reshard", str(folder), str(folder.parent / "out"), "--ranks", "1"]) == 1
    assert not (folder.parent / "out").exists()
    (folder / MANIFEST).unlink()
    assert main(["checkpoint", "inspect", str(folder)]) == 1


def test_diff_finds_what_was_changed_and_by_how_much(folder, tmp_path, capsys):
    reshard(folder, tmp_path / "cut", "tp2 etp2 pp2 ep2 on 8")
    kinds = [word for kind in ("weight", "master", "exp_avg", "balance_bias") for word in ("--kind", kind)]
    assert main(["checkpoint", "diff", str(folder), str(tmp_path / "cut"), *kinds]) == 0
    text = capsys.readouterr().out
    assert "equal to the bit" in text and "config parallel.tensor_parallel_size: 1 there, 2 here" in text
    assert main(["checkpoint", "diff", str(folder), str(tmp_path / "cut")]) == 1  # random states are only in one
    assert "random rank_00000/cpu: only in" in capsys.readouterr().out

    tensors, config = model_tensors()
    bf16, fp32 = ("weight", "embedding.weight"), ("exp_avg", "final_norm.weight")
    changed = {key: (dtype, array.copy()) for key, (dtype, array) in tensors.items()}
    changed[bf16][1][3, 5], tensors[bf16][1][3, 5] = 0x3F80, 0x4040  # 1.0 and 3.0
    changed[fp32][1][:2] += np.float32(0.5)
    changed["exp_avg_sq", "final_norm.weight"] = ("F32", np.full(16, np.nan, np.float32))
    del changed["master", "embedding.weight"]
    for kind in ("master",):
        changed = {key: tensor for key, tensor in changed.items() if key[0] != kind}
    one = save(tmp_path / "one", 1, tensors, config=config)
    other = save(tmp_path / "other", 2, changed, config=config)
    assert main(["checkpoint", "diff", "--json", str(one), str(other)]) == 1
    found = json.loads(capsys.readouterr().out)
    rows = {(row["kind"], row["name"]): row for row in found["tensors"] if row["kind"] != "master"}
    assert rows[bf16] | {"reason": None} == rows[bf16] and rows[bf16]["num_different"] == 1
    assert rows[bf16]["largest"] == 2.0
    assert rows[fp32]["num_different"] == 2 and rows[fp32]["largest"] == pytest.approx(0.5, abs=1e-6)
    assert rows["exp_avg_sq", "final_norm.weight"]["largest"] is None
    assert len(rows) == 3 and all("only in" in r["reason"] for r in found["tensors"] if r["kind"] == "master")
    assert found["state"] == [{"key": "samples", "first": 10, "second": 20}] and not found["equal"]


def test_config_differences_name_dotted_keys():
    one, other = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2], "e": None}, "d": 2}
    assert config_differences(one, other) == [("a.c", [1], [2]), ("a.e", None, None)]


def test_parts_are_shared_out_evenly_and_small_ones_go_to_one_rank(monkeypatch):
    tensors, _ = model_tensors()
    config = load_config("laptop-moe", SMALL)
    entries = [
        manifest.TensorEntry(kind, name, dtype, array.shape, ())
        for (kind, name), (dtype, array) in tensors.items()
        if kind == "weight"
    ]
    num_bytes = [
        sum(piece.num_elements * STORAGE[piece.dtype].itemsize for piece in slices)
        for slices in slices_by_rank(entries, holders(config, 4), 4)
    ]
    assert max(num_bytes) - min(num_bytes) < 400
    monkeypatch.setattr(layouts, "_SMALLEST_SHARE", 1 << 20)
    pieces = [piece for slices in slices_by_rank(entries, holders(config, 4), 4) for piece in slices]
    assert len(pieces) == len(entries)


MEASURE = """
import sys
from megamoe.cli import main
import megamoe.checkpoint.reshard, megamoe.config.loading, numpy

def peak_kib():  # not ru_maxrss: that counts what the process was forked from
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

base = peak_kib()
code = main(["checkpoint", *sys.argv[1:]])
print((peak_kib() - base) // 1024, file=sys.stderr)
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path, monkeypatch):
    """reshard and verify of 33 and of 130 MB: both within the same few windows."""
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 1 << 20)
    peaks = []
    for layers in (2, 8):
        config = load_config("laptop-moe", [f"model.num_layers={layers}", "model.hidden_size=256", "moe.num_experts=4"])
        tensors = {
            ("weight", parameter.name): ("F32", np.zeros(parameter.shape, np.float32))
            for parameter in param_table(config.model, config.moe)
        }
        folder = save(tmp_path / str(layers), 1, tensors, config=config.model_dump(mode="json"))
        for arguments in (["verify", str(folder)], ["reshard", str(folder), str(folder) + "b", "--ranks", "2"]):
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=60
            )
            peaks.append(int(done.stderr.split()[-1]))
    print(f"peak MB above the imports, verify and reshard, at 2 and 8 layers: {peaks}")
    assert max(peaks) < 150
    assert peaks[2] - peaks[0] < 20 and peaks[3] - peaks[1] < 40


def test_long_values_are_shown_by_their_length():
    assert [_short(value) for value in ([4, 8], None, {"a": 1}, "x" * 90, [2.5] * 128, {"a": [2.5] * 128, "b": 1})] == [
        "[4, 8]", "None", "{'a': 1}", "x" * 90, "128 entries", "2 entries"
    ]  # fmt: skip
