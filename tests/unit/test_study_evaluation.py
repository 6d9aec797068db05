"""What a study refuses before anything is trained: sets, settings and scores with which its evaluation would fail."""

import json

import pytest

from megamoe.cli import main
from megamoe.errors import MegamoeError, OutputError
from megamoe.study import scoring
from megamoe.study.schema import EvaluationSettings, StudySettings
from megamoe.study.scoring import check_evaluation, results_path
from megamoe.study.write import write_study
from tests.unit.study_cases import TINY_SETS, TINY_STUDY
from tests.unit.study_files import FINITE, end_run, lay_out, write_results


@pytest.fixture
def place(tmp_path, monkeypatch):
    return lay_out(tmp_path, monkeypatch)


def evaluated_with(study: StudySettings, *settings: str, **changes) -> StudySettings:
    evaluation = EvaluationSettings(sets=study.evaluation.sets, settings=settings)
    return study.model_copy(update={"evaluation": evaluation, **changes})


def change(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(study, runs, **options) -> str:
    with pytest.raises(MegamoeError) as refused:
        check_evaluation(runs, study, study.folder, **options)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "bf16"}, "scores in bf16, where fp32 is asked for now"),
        ({"capacity": {"drops_tokens": True, "kind": "factor", "value": 1.0}}, "scores of another capacity than "),
        ({"device": "cuda"}, "scores of another device than "),
        ({"tokenizer": {"kind": "sentencepiece"}}, "scores by another tokenizer than is asked for now"),
    ],
)
def test_unlike_scores_are_refused(place, changes, told):
    study, runs = place
    for run in runs[:2]:
        write_results(study, run, dict.fromkeys(run.eval_steps, FINITE))
    check_evaluation(runs, study, study.folder)
    path = results_path(runs[1], study.folder)
    change(path, **changes)
    message = refusal(study, runs)
    assert message.startswith(f"{path} holds {told}")
    assert message.endswith(f": move {study.folder / 'evaluations'} away, and all models are scored anew")


def test_scores_of_a_text_that_has_changed_are_refused(place, tmp_path):
    study, runs = place
    write_results(study, runs[3], dict.fromkeys(runs[3].eval_steps, FINITE))
    (tmp_path / "other.txt").write_text("another line of forty letters, or thereabouts\n")
    assert "dense-1-seed1.json holds scores of other sets than sets.yaml names now: move " in refusal(study, runs)


def test_a_report_of_other_sets_than_were_scored_is_refused(place, tmp_path, capsys):
    """The texts themselves need not be there for a report, nor a tokenizer."""
    study, runs = place
    for run in runs:
        end_run(run)
        write_results(study, run, dict.fromkeys(run.eval_steps, FINITE))
    for name in ("held_out.txt", "other.txt"):
        (tmp_path / name).unlink()
    assert main(["study", "study.yaml", "--report-only"]) == 0
    capsys.readouterr()
    for other in (TINY_SETS.replace("letters", "words"), TINY_SETS.replace("reading: documents", "reading: blocks")):
        (tmp_path / "sets.yaml").write_text(other)
        assert main(["study", "study.yaml", "--report-only"]) == 2
        assert "holds scores of other sets than sets.yaml names now" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["dense", "moe"])
def test_expert_parallelism_is_of_the_mixtures_alone(place, first):
    study, runs = place
    study = evaluated_with(study, "parallel.expert_parallel_size=2", local_ranks=2)
    runs.sort(key=lambda run: run.model.family != first)
    check_evaluation(runs, study, study.folder)
    study = evaluated_with(study, "parallel.expert_parallel_size=3", local_ranks=3)
    told = "model moe-0 cannot be evaluated as evaluation.settings say: expert_parallel_size 3 does not divide"
    assert refusal(study, runs).startswith(told)


def test_every_model_is_looked_at(tmp_path, monkeypatch):
    mixture = "{model: {hidden_size: 32}, moe: {num_experts: 4}}"
    text = TINY_STUDY.replace(mixture, "{model: {hidden_size: 32, num_attention_heads: 1}, moe: {num_experts: 4}}")
    study, runs = lay_out(tmp_path, monkeypatch, text)
    study = evaluated_with(study, "parallel.tensor_parallel_size=2", local_ranks=2)
    check_evaluation(runs[:-1], study, study.folder)
    assert refusal(study, runs).startswith("model moe-1 cannot be evaluated as evaluation.settings say: ")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("moe.eval_capacity_factor=1.0", "evaluation.settings has moe.eval_capacity_factor=1.0: experts drop no token"),
        ("run.num_steps=5", "run.num_steps cannot be set for a forward pass: valid are parallel.…, run.precision, "),
        ("run.dir=elsewhere", "run.dir cannot be set for a forward pass"),
        ("data.tokenizer={kind: gpt2_bpe, path: nowhere}", "nowhere"),
    ],
)
def test_settings_that_evaluation_refuses(place, setting, told):
    study, runs = place
    assert told in refusal(evaluated_with(study, setting), runs)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "set verses: the files of held_out.txt hold no text"),
        (b"too short\n", "set verses has 10 tokens: one block of context_tokens 32 needs 33 to be there"),
        (b"\xff\xfe\x00" * 50, "held_out.txt, line 1, byte 1: not UTF-8"),
    ],
)
def test_texts_that_cannot_be_scored(place, tmp_path, content, told):
    study, runs = place
    check_evaluation(runs, study, study.folder)
    (tmp_path / "held_out.txt").write_bytes(content)
    assert told in refusal(study, runs)


def test_a_line_without_the_text_of_a_set(place, tmp_path):
    study, runs = place
    (tmp_path / "lines.jsonl").write_text('{"body": "one"}\n')
    sets = "sets: [{name: lines, path: lines.jsonl, reading: documents, json_key: %s}]\n"
    (tmp_path / "sets.yaml").write_text(sets % "text")
    assert refusal(study, runs).startswith("lines.jsonl, line 1: no key 'text' (keys here: body)")
    (tmp_path / "sets.yaml").write_text(sets % "body")
    check_evaluation(runs, study, study.folder)


@pytest.mark.parametrize("content", ["", "{}", '{"format": "megamoe-evaluation", "version": 1}'])
def test_a_file_that_is_no_results_is_one_sentence(place, content):
    study, runs = place
    path = results_path(runs[1], study.folder)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    told = f"{path} holds no results that can be read: move it away, and its model is scored anew"
    assert refusal(study, runs) == told == refusal(study, runs, report_only=True)
    with pytest.raises(OutputError, match="holds no results that can be read"):
        write_study(study, runs, [])


@pytest.fixture
def commands(monkeypatch):
    """What `score_runs` would start, for a study whose checkpoints are all there."""
    started = []
    monkeypatch.setattr(scoring, "run_command", lambda words, *_, **__: started.append(words) or (0, ""))
    monkeypatch.setattr(scoring, "saved_steps", lambda run: [4, 8])
    monkeypatch.setattr(scoring, "saved_checksums", lambda run: {4: "save-4", 8: "save-8"})
    return started


def test_expert_parallelism_is_left_out_of_a_dense_models_command(place, commands):
    study, runs = place
    settings = ("parallel.expert_parallel_size=2", "run.micro_batch_size=4")
    scoring.score_runs(runs[1:3], evaluated_with(study, *settings, local_ranks=2), study.folder, held=())
    assert commands[0][-3:] == ["run.micro_batch_size=4", "--local-ranks", "2"] and settings[0] not in commands[0]
    assert commands[1][-4:] == [*settings, "--local-ranks", "2"]


def test_what_another_layout_has_begun_is_begun_anew_and_what_it_has_finished_stays(place, commands):
    study, runs = place
    both = dict.fromkeys((4, 8), FINITE)
    write_results(study, runs[0], both)
    write_results(study, runs[1], both, unfinished=[8])
    scoring.score_runs(runs[:2], study, study.folder, held=())
    assert len(commands) == 1 and "--overwrite" not in commands[0], "under its own layout it goes on"
    commands.clear()
    assert scoring.score_runs(runs[:2], evaluated_with(study, "run.micro_batch_size=4"), study.folder, held=()) == []
    assert len(commands) == 1 and commands[0][-2:] == ["run.micro_batch_size=4", "--overwrite"]
    assert str(runs[1].dir) in commands[0]


def test_scores_without_a_checkpoint_are_not_lost_to_another_layout(place, commands, monkeypatch):
    study, runs = place
    write_results(study, runs[1], {4: FINITE})
    monkeypatch.setattr(scoring, "saved_steps", lambda run: [8])
    monkeypatch.setattr(scoring, "saved_checksums", lambda run: {8: "save-8"})
    end_run(runs[1])
    failed = scoring.score_runs(runs[1:2], evaluated_with(study, "run.micro_batch_size=4"), study.folder, held=())
    assert commands == [] and [each.message for each in failed] == [
        "it would be evaluated anew under another layout, but the checkpoints of steps 4 are gone: set "
        "evaluation.settings and local_ranks as they were, or move runs/tiny/evaluations/dense-0-seed2.json away to do "
        "without those steps"
    ]
