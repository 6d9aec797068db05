"""What a study's commands leave on the disk, written without them: runs that have ended, and their results."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megamoe.evaluation.plan import Capacity, header
from megamoe.evaluation.results import Results
from megamoe.evaluation.sets import read_sets, settled_sets
from megamoe.evaluation.sums import Sums, set_result
from megamoe.inference.settings import forward_settings
from megamoe.runs.events import append_event
from megamoe.study.ladder import StudyRun
from megamoe.study.schema import StudySettings
from megamoe.study.scoring import results_path
from tests.unit.study_cases import TINY_SETS, TINY_STUDY, load_tiny

FINITE = {"verses": 3.0, "letters": 3.5}


def lay_out(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = TINY_STUDY) -> tuple[StudySettings, list]:
    """A study that is not begun, with texts to evaluate on; `folder` becomes the current one."""
    monkeypatch.chdir(folder)
    (folder / "study.yaml").write_text(text)
    (folder / "sets.yaml").write_text(TINY_SETS)
    for name in ("held_out.txt", "other.txt"):
        (folder / name).write_text("a line of forty letters, or thereabouts\n\n" * 20)
    study, runs = load_tiny(folder)
    return study, list(runs)


def end_run(run: StudyRun) -> None:
    """It has come to its end, and its checkpoints were removed."""
    run.dir.mkdir(parents=True, exist_ok=True)
    append_event(run.dir, "end", "all steps are done", step=run.config.run.num_steps)


def write_results(
    study: StudySettings, run: StudyRun, nats: Mapping[int, Mapping[str, float | None]], *, layout: Sequence[str] = (),
    unfinished: Sequence[int] = (), checksums: dict[int, str] | None = None,
) -> None:  # fmt: skip
    """A file as `megamoe evaluate` leaves it: by step and set nats a token, None where the loss is not finite."""
    config = forward_settings(run.config, layout)
    texts = settled_sets(read_sets(Path(study.evaluation.sets)), seq_length=config.model.seq_length)
    folders = {step: run.dir / "checkpoints" / f"step_{step:08d}" for step in nats}
    results = Results.begin(
        header(config, 1, texts, Capacity(), "cpu"),
        [
            {
                "checkpoint": str(folders[step]), "folder": str(folders[step]), "step": step,
                "manifest_checksum": (checksums or {}).get(step, f"save-{step}"), "num_trained_tokens": 0,
                "num_parameters": 1, "num_active_parameters": 1, "config_hash": "", "save_id": "",
            }
            for step in nats
        ],
    )  # fmt: skip
    for model in results.tree["models"]:
        for number, each in enumerate(model["sets"]):
            if model["step"] not in unfinished:
                loss = nats[model["step"]][each["name"]]
                sums = Sums(math.nan if loss is None else 100 * loss, num_tokens=100, num_units=10, num_bytes=400)
                results.finish_set(model, number, set_result(sums, num_documents=10, num_text_bytes=400))
    results.write(results_path(run, study.folder))
