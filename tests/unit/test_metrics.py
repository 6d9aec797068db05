"""The record of a run: valid JSON whatever the numbers, no step twice after a resume, readable lines."""

import io
import json
import subprocess
import sys

import numpy as np

from megamoe.runs.metrics import MetricsWriter, ProgressBar, format_line, read_metrics, to_json_line

FULL = {
    "step": 70, "loss": 5.12345, "lm_loss": 5.1, "aux_loss": 0.0201, "perplexity": 164.02, "grad_norm": 1.25,
    "lr": 6e-4, "tokens_per_second": 12_345.6, "step_seconds": 0.5, "samples": 560, "tokens": 143_360,
    "dropped_fraction": 0.034, "expert_load_max_over_mean": 1.31, "skipped_steps": 0, "memory_bytes": 3 * 2**29,
    "loss_scale": 1.0, "global_batch_size": 8,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def write(run_dir, steps, **options):
    writer = MetricsWriter(run_dir, **options)
    for step in steps:
        writer.write({"step": step, "loss": 10.0 / step})
    writer.close()


def steps(run_dir):
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]


def test_lines_appear_at_once_and_read_back(tmp_path):
    writer = MetricsWriter(tmp_path / "new" / "run")
    writer.write(FULL)
    assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [FULL]  # still open


def test_resume_cuts_later_steps(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], resume_step=3)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.partial"))


def test_fresh_start_empties_the_file(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert steps(tmp_path) == [1]


def test_torn_last_line_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert steps(tmp_path) == [1, 2]
    write(tmp_path, [3], resume_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_line_torn_inside_a_number_that_still_parses_is_no_object(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n12')
    write(tmp_path, [2], resume_step=1)
    assert steps(tmp_path) == [1, 2]


def test_nonfinite_numbers_are_null_and_listed():
    metrics = {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1}
    line = json.loads(to_json_line(metrics), parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "nonfinite": ["loss", "grad_norm"]}


def test_numpy_numbers_are_written():
    assert json.loads(to_json_line({"step": np.int64(3), "loss": np.float32(0.5)})) == {"step": 3, "loss": 0.5}


def test_line():
    assert format_line(FULL, num_steps=200) == (
        "step  70/200 | loss  5.1235 | ppl   164.02 | lr 6.00e-04 | grad norm  1.250 | tokens/s 12.3k | aux 0.0201 | "
        "dropped  3.4% | load max/mean 1.31 | skipped 0 | scale 1 | memory 1.50 GiB"
    )


def test_line_of_validation_and_of_broken_numbers():
    assert format_line({"step": 5, "valid_loss": 4.0, "valid_perplexity": 54.6}, num_steps=5) == (
        "step 5/5 | valid loss  4.0000 | valid ppl    54.60"
    )
    line = format_line({"step": 5, "loss": float("nan"), "perplexity": float("inf"), "grad_norm": None})
    assert line == "step 5 | loss     nan | ppl      inf"


def test_progress_bar_draws_only_on_a_terminal():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = ProgressBar(4, stream=stream)
        bar.update(2)
        bar.print("a line")
        bar.close()
    assert pipe.getvalue() == "a line\n"
    assert "[############............] 2/4  50%" in terminal.getvalue()
    assert "\ra line\n" in terminal.getvalue()
    assert terminal.getvalue().endswith(" \r"), "the bar is taken away"


def test_no_torch():
    code = "import megamoe.runs.metrics, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
