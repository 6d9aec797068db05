"""The benchmarks run and their tables add up; what they measure is nobody's test."""

import json
import re
import subprocess
import sys

import pytest

from tests.journeys.clone import ROOT

SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.vocab_size=256", "model.seq_length=16",
    "run.micro_batch_size=1", "run.global_batch_size=2",
)  # fmt: skip


def benchmark(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "benchmarks" / name, *arguments], capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_memory_adds_up_on_every_rank():
    text = benchmark("memory.py", "--layout", "2 parallel.expert_parallel_size=2 parallel.zero_stage=2", *SMALL)
    assert "2 ranks ep2 dp2 ZeRO-2" in text
    rows = [[float(cell) for cell in line.split("|")] for line in text.splitlines() if re.match(r"\s+\d+ \|", line)]
    assert [row[0] for row in rows] == [0, 1]
    for _, base, built, peak, used, weights, gradients, optimizer, total, rest, _ in rows:
        assert 0 < base <= built <= peak
        assert used == pytest.approx(peak - base, abs=0.2)
        assert total == pytest.approx(weights + gradients + optimizer, abs=0.2)
        assert rest == pytest.approx(used - total, abs=0.2)


@pytest.mark.slow
def test_profile_shares_are_those_of_the_whole_step():
    text = benchmark(
        "profile_step.py", "--ranks", "2", "--rank", "1", "--steps", "1", *SMALL,
        "parallel.pipeline_parallel_size=2", "parallel.recompute=full",
    )  # fmt: skip
    kinds = text.split("kind", 1)[1].split("operator  ")[0]
    shares = {
        line[:55].strip(): float(line.rsplit(maxsplit=1)[1].rstrip("%"))
        for line in kinds.splitlines()
        if line.endswith("%")
    }
    assert len(shares) == 10 and sum(shares.values()) == pytest.approx(100, abs=0.6)
    for kind in ("matrix", "attention", "cross entropy", "MoE", "collectives", "optimizer"):
        assert next(share for name, share in shares.items() if name.startswith(kind)) > 0, kind


@pytest.mark.slow
def test_startup_measures_the_first_step_and_the_quick_commands():
    text = benchmark(
        "startup.py", "--ranks", "2", "--repeats", "1", "--quick-repeats", "1", "parallel.pipeline_parallel_size=1",
        "parallel.tensor_parallel_size=1",
    )  # fmt: skip
    for name in ("train --local-ranks 2, to step 1", "megamoe --help", "megamoe presets", "megamoe show moe-1.1t"):
        assert re.search(rf"^{re.escape(name)} +\d+\.\d\d s", text, re.MULTILINE), text


@pytest.mark.slow
def test_moe_layer_races_all_contestants_and_judges_every_goal(tmp_path):
    text = benchmark("moe_layer.py", "--quick", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = {row["name"]: row for table in figures["tables"] for row in table["rows"] if "seconds" in row}
    for name in ("deepspeed, dropless", "deepspeed, capacity", "transformers, grouped_mm", "megatron, sequential"):
        assert len(rows[name]["seconds"]) == 2, rows[name]
        same_tokens_dropped = name != "deepspeed, capacity"  # drops by probability at more than two choices
        assert not same_tokens_dropped or rows[name]["differing_tokens"] == 0.0
    for name in ("floor: per expert + activation, dropless", "floor: per expert + activation, capacity"):
        assert rows[name]["gradient_difference"] < 1e-5
    goals = {finding["goal"]: finding for finding in figures["findings"]}
    assert goals["largest tensor / S*E*C"]["met"]
    for goal in goals:
        assert re.search(rf"^{re.escape(goal)} .*(met|MISSED)", text, re.MULTILINE), text


@pytest.mark.slow
def test_a_stall_is_set_beside_a_copy():
    text = benchmark("checkpoint_stall.py", "--mebibytes", "16", "--repeats", "3", "--precision", "bf16")
    found = re.search(r"state (\d+) MiB \(bf16\): .* still ([\d.]+) ms, one copy .* takes ([\d.]+) ms", text)
    assert found is not None, text
    size, stall, copy = map(float, found.groups())
    assert 10 <= size <= 22 and stall > 0 and copy > 0


def ratio_of_rounded(one: float, other: float) -> object:
    """What equals the ratio, to two digits, of speeds that are printed as whole numbers: slow ones say less of it."""
    ratio = one / other
    return pytest.approx(ratio, abs=ratio * (0.5 / one + 0.5 / other) + 0.006)


@pytest.mark.slow
def test_checkpoint_compares_like_with_like_and_states_the_peaks():
    text = benchmark("checkpoint.py", "--size-mb", "24", "--repeats", "2", "--memory-sizes-mb", "24", "48")
    lines = [line.split("|")[1:] for line in text.splitlines() if re.match(r"\s+\d+ \|", line)]
    speeds, peaks = [[float(cell) for cell in line] for line in lines if len(line) == 6], text.splitlines()[-2:]
    assert len(speeds) == 2
    for saved, written, save_ratio, loaded, read, load_ratio in speeds:
        assert save_ratio == ratio_of_rounded(saved, written)
        assert load_ratio == ratio_of_rounded(loaded, read)
    for line, size_mb in zip(peaks, (24, 48), strict=True):
        state, largest, read, resharded = (float(cell) for cell in line.split("|")[:4])
        assert 0.7 * size_mb < state < 1.3 * size_mb and largest < state
        assert 0 < read < 100 and 0 < resharded < 100 and line.endswith("reached")


@pytest.mark.slow
def test_convert_compares_like_with_like_and_states_bytes_and_peaks():
    text = benchmark("convert.py", "--size-mb", "8", "--repeats", "2", "--memory-sizes-mb", "8")
    rows = [line.split("|")[1:] for line in text.splitlines() if re.match(r"\s+[01] \|", line)]
    assert len(rows) == 2
    for exported, copied, export_ratio, imported, copied_too, rest, *_ in rows:
        assert float(export_ratio) == ratio_of_rounded(float(exported), float(copied))
        import_ratio = rest.split()[0]
        assert float(import_ratio) == ratio_of_rounded(float(imported), float(copied_too))
    for read, written in re.findall(r"(\d\.\d{3}) \| (\d\.\d{3})", text):
        assert 1.0 <= float(read) < 1.1 and 1.0 <= float(written) < 1.1
    peak = re.search(r"^\s+23 \|\s+4\.2 \|\s+(\d+) \|\s+(\d+) \| reached$", text, re.MULTILINE)
    assert peak is not None and all(0 < int(each) < 100 for each in peak.groups()), text
