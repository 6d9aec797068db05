"""Tasks and their files: the six shipped ones on lines of the official releases, and what is refused in which words."""

import json

import pytest
import yaml

from megamoe.errors import ConfigError, DataError
from megamoe.priming.examples import load_examples, load_pool
from megamoe.priming.tasks import load_task, parse_task, shipped_tasks
from megamoe.priming.templates import CHOICE, Template
from tests.unit.priming_cases import (
    HELLASWAG,
    OPENBOOKQA,
    RECORD,
    STORYCLOZE,
    WINOGRANDE,
    write_lines,
    write_releases,
)

TASK = {"name": "t", "data": {"file": "t.jsonl"}, "text": "{q} {choice}", "choices": "c", "label": {"field": "a"}}


def examples(name, folder):
    task, where = load_task(name, folder)
    assert [e.texts for e in load_pool(task, where)] == [e.texts for e in load_examples(task, where)]
    return load_examples(task, where)


def refusal(tmp_path, line, **changes):
    """What is said of a line under TASK with changes."""
    write_lines(tmp_path / "t.jsonl", {"q": "Q", "c": ["x", "y"], "a": 0}, line)
    task = parse_task(yaml.safe_dump(TASK | changes), "t.yaml")
    with pytest.raises(DataError) as error:
        load_examples(task, tmp_path)
    return str(error.value).replace(str(tmp_path), "")


def task_refusal(**changes):
    with pytest.raises(ConfigError) as error:
        parse_task(yaml.safe_dump(TASK | changes), "t.yaml")
    return str(error.value)


def test_the_six_tasks_read_lines_of_the_official_files(tmp_path):
    write_releases(tmp_path)
    assert list(shipped_tasks()) == ["hellaswag", "openbookqa", "piqa", "record", "storycloze", "winogrande"]

    first, wikihow = examples("hellaswag", tmp_path)
    assert first.texts[3] == "Roof shingle removal: A man is sitting on a roof. He starts pulling up roofing."
    assert first.correct == {3} and first.shot == first.texts[3] and len(first.choices) == 4
    assert wikihow.texts[0] == "Health: A man is sitting on a roof. is using wrap.", "no two spaces"

    one, two = examples("piqa", tmp_path)
    assert one.texts == ("To open a jar, turn the lid.", "To open a jar, turn the jar into sand.")
    assert (one.correct, two.correct) == ({0}, {1})

    who, where = examples("record", tmp_path)
    assert who.choices == ("Ann", "the Bob", "Rome"), "each entity once, in the passage's order"
    assert who.texts[0] == "Ann met the Bob in Rome.\nAnn saw Rome\nAnn was met in Rome"
    assert (who.correct, who.answers) == ({1}, ("the Bob",))
    assert where.texts[2].endswith("\nThey were in Rome") and where.correct == {2}

    (pronoun,) = examples("winogrande", tmp_path)
    assert pronoun.texts == (
        "Ann gave Eve the book because Ann had read it.", "Ann gave Eve the book because Eve had read it.",
    )  # fmt: skip
    assert pronoun.correct == {0}

    (story,) = examples("storycloze", tmp_path)
    assert story.texts[1] == 'Rick grew up, alone. He stole. He was caught. He went home. He robbed "us".'
    assert story.correct == {1}

    (question,) = examples("openbookqa", tmp_path)
    assert question.texts[1] == "The sun is responsible for plants sprouting"
    assert (question.before, question.unconditional) == ("The sun is responsible for ", "Answer: ")
    assert question.correct == {1}


def test_the_six_tasks_are_scored_as_the_paper_scores_them():
    rules = {name: parse_task(text, name).score for name, text in shipped_tasks().items()}
    special = {"winogrande": "sum_of_suffix", "openbookqa": "sum_minus_unconditional"}
    assert rules == {name: special.get(name, "mean_after_prefix") for name in rules}


def test_record_reads_the_original_form_too(tmp_path):
    write_lines(tmp_path / "ReCoRD/val.jsonl", {"version": "v1", "data": [{"id": "1", **RECORD}]})
    task, folder = load_task("record", tmp_path)
    assert [len(e.choices) for e in load_examples(task, folder)] == [3, 3]
    write_lines(tmp_path / "ReCoRD/val.jsonl", HELLASWAG)
    with pytest.raises(DataError, match=r"val.jsonl, line 1: not as ReCoRD's files are \(KeyError: 'passage'\)"):
        load_examples(task, folder)


def test_templates():
    line = {"a": "one", "b": {"c": [1, 2.5]}, "s": "x _ y _"}
    assert Template.parse("{{{a|capitalize}}} {b.c.1}{choice}").render(line) == "{One} 2.5" + CHOICE
    assert Template.parse("{s|fill:_}").render(line) == f"x {CHOICE} y {CHOICE}"
    assert Template.parse("[{s|drop:x |strip}]").render(line) == "[_ y _]"
    assert Template.parse("{q} {choice}").ends_with_choice
    assert not Template.parse("{choice} {choice}").ends_with_choice
    assert not Template.parse("{s|fill:_} {choice}").ends_with_choice
    assert not Template.parse("{q}").has_choice


def test_lines_that_do_not_fit_are_named(tmp_path):
    line = {"q": "Q", "c": ["x", "y"], "a": 0}
    head = "/t.jsonl, line 2: "
    assert refusal(tmp_path, line, text="{nothing} {choice}") == (
        "/t.jsonl, line 1: no field \"nothing\"; valid: q, c, a"
    )
    assert refusal(tmp_path, {"c": ["x"], "a": 0}) == head + "1 choices: two are needed at least"
    assert refusal(tmp_path, line | {"c": "xy"}) == head + 'field "c" is no list'
    assert refusal(tmp_path, line | {"c": ["x", " "]}) == head + "choice 1 is empty"
    assert refusal(tmp_path, line | {"c": ["x", None]}) == head + "field \"c\" is no text: 'None'"
    assert refusal(tmp_path, line | {"a": 2}) == head + 'field "a" is "2", which is no choice; valid: 0, 1'
    assert refusal(tmp_path, line | {"a": 0}, label={"field": "a", "kind": "number"}) == (
        '/t.jsonl, line 1: field "a" is "0", which is no choice; valid: 1, 2'
    )
    assert refusal(tmp_path, [1]) == head + "a JSON list where an object is expected"
    assert refusal(tmp_path, line | {"c": ["x", "\ud800"]}) == head + "'c.1' holds a lone surrogate at character 0"
    assert refusal(tmp_path, line, text="{q|fill:_}") == '/t.jsonl, line 1: field "q" has no "_" to fill'
    right = {"label": {"field": "a", "kind": "texts"}}
    write_lines(tmp_path / "t.jsonl", line | {"a": ["z"]})
    with pytest.raises(DataError, match='line 1: none of field "a" is among the choices'):
        load_examples(parse_task(yaml.safe_dump(TASK | right), "t.yaml"), tmp_path)
    (tmp_path / "t.jsonl").write_text('{"q": 1\n')
    with pytest.raises(DataError, match="line 1: no valid JSON"):
        load_examples(parse_task(yaml.safe_dump(TASK), "t.yaml"), tmp_path)


def test_labels_and_what_they_are_compared_with_lose_the_same_spaces(tmp_path):
    line = {"q": "Q", "c": [" foo ", "ba  r"], "keys": ["A", " B "]}
    for kind, answer in (({"kind": "texts"}, ["ba  r "]), ({"kind": "key", "keys": "keys"}, " B")):
        write_lines(tmp_path / "t.jsonl", line | {"a": answer})
        task = parse_task(yaml.safe_dump(TASK | {"label": {"field": "a", **kind}}), "t.yaml")
        (one,) = load_examples(task, tmp_path)
        assert one.choices == ("foo", "ba r") and one.correct == {1}


def test_half_a_surrogate_pair_is_named_however_deep_it_lies(tmp_path):
    question = {"choices": [{"text": "x"}, {"text": "a\ud800"}]}
    assert refusal(tmp_path, {"q": "Q", "c": question, "a": 0}) == (
        "/t.jsonl, line 2: 'c.choices.1.text' holds a lone surrogate at character 1"
    )
    write_lines(tmp_path / "ReCoRD/val.jsonl", RECORD | {"passage": {"text": "Ann\udfff", "entities": []}})
    with pytest.raises(DataError, match=r"line 1: 'passage.text' holds a lone surrogate at character 3"):
        load_examples(*load_task("record", tmp_path))
    # As deep as JSON is read: what looks for the texts must not give up before.
    (tmp_path / "t.jsonl").write_text('{"q": ' + "[" * 900 + '"\\ud800"' + "]" * 900 + "}\n")
    with pytest.raises(DataError, match=r"line 1: 'q(\.0)+' holds a lone surrogate at character 0"):
        load_examples(parse_task(yaml.safe_dump(TASK), "t.yaml"), tmp_path)


def test_files_stay_in_the_tasks_folder_and_fit_each_other(tmp_path):
    inner = tmp_path / "inner"
    write_lines(tmp_path / "t.jsonl", {"q": "Q", "c": ["x", "y"], "a": 0})
    inner.mkdir()
    (inner / "link.jsonl").symlink_to(tmp_path / "t.jsonl")
    for name in ("../t.jsonl", str(tmp_path / "t.jsonl"), "link.jsonl"):
        task = parse_task(yaml.safe_dump(TASK | {"data": {"file": name}}), "t.yaml")
        with pytest.raises(DataError) as caught:
            load_examples(task, inner)
        assert str(caught.value) == (
            f"{name} leads out of {inner}: a task names files of its own folder only, and no links out of it"
        )
    (inner / "own.jsonl").write_bytes((tmp_path / "t.jsonl").read_bytes())
    (inner / "link.jsonl").unlink()
    (inner / "link.jsonl").symlink_to("own.jsonl")
    assert len(load_examples(task, inner)) == 1, "a link that stays in the folder"
    (tmp_path / "labels").write_text("0\n1\n")
    task = parse_task(yaml.safe_dump(TASK | {"data": {"file": "t.jsonl", "labels": "labels"}}), "t.yaml")
    with pytest.raises(DataError, match=r"labels has 2 labels for the 1 examples of .*t.jsonl"):
        load_examples(task, tmp_path)
    task = parse_task(yaml.safe_dump(TASK | {"data": {"file": "none.jsonl"}}), "t.yaml")
    with pytest.raises(DataError, match=r"cannot read .*none.jsonl: No such file or directory"):
        load_examples(task, tmp_path)


def test_a_quote_that_is_left_open_is_named_with_its_line(tmp_path):
    write_releases(tmp_path)
    path = tmp_path / "storycloze" / "test.csv"
    path.write_text(f'{STORYCLOZE}c930,"He stole.\n' + "c931,He went home.\n" * 10_000)
    with pytest.raises(DataError) as caught:
        load_examples(*load_task("storycloze", tmp_path))
    assert str(caught.value) == (
        f"{path}, line 3: not as CSV is (field larger than field limit (131072)): is a quote left open?"
    )


def test_task_files_are_checked():
    assert task_refusal(nme=1) == 'unknown key "nme" in t.yaml: did you mean "name"?'
    assert task_refusal(zzz=1).startswith(
        'unknown key "zzz" in t.yaml: the keys are name, about, data, train, text, choices, label, '
    )
    assert task_refusal(label={"field": "a", "kidn": "key"}) == (
        'unknown key "label.kidn" in t.yaml: did you mean "label.kind"?'
    )
    assert task_refusal(train={"file": "f", "split": "x"}) == (
        'unknown key "train.split" in t.yaml: train has file, format, labels'
    )
    assert task_refusal(text="{q}") == (
        't.yaml: text: "{q}" has no place for the choice: {choice}, or a field with |fill:MARK'
    )
    assert task_refusal(text="{q} {choice") == 't.yaml: text: "{q} {choice" has a { without its other: write {{ for ' \
        "one of the text"
    assert task_refusal(text="{q|upper} {choice}") == (
        't.yaml: text: "{q|upper} {choice}" has an unknown filter "upper"; valid: capitalize, strip, drop:TEXT, '
        "fill:MARK"
    )
    assert task_refusal(text="{q} { choice |capitalize}") == (
        't.yaml: text: "{q} { choice |capitalize}" has a filter on {choice}, which takes none'
    )
    for each in ("{choice}", "{q|fill:_}"):
        assert task_refusal(choices=["x", each]) == (
            f't.yaml: choices: "{each}" is a choice itself: it takes neither {{choice}} nor |fill:MARK'
        )
    for changes in ({"text": "\0 {choice}"}, {"choices": ["x", "\0"]}):
        assert task_refusal(**changes).endswith("holds a NUL character")
    assert task_refusal(score="sum_of_choice", text="{choice}.") == (
        "t.yaml: score: sum_of_choice needs text to end with {choice}, and to hold it once"
    )
    assert task_refusal(score="sum_minus_unconditional") == (
        "t.yaml: unconditional: is given with score: sum_minus_unconditional, and only with it"
    )
    assert task_refusal(choices=["{a}"]) == "t.yaml: choices: needs two templates at least"
    assert task_refusal(label={"field": "a", "kind": "key"}).endswith(
        "label: keys: is given with kind: key, and only with it"
    )
    assert task_refusal(metrics="record") == (
        "t.yaml: metrics: record compares with the answers that label: {kind: texts} names, and needs it"
    )
    assert "mean_after_prefix" in task_refusal(score="best")
    with pytest.raises(ConfigError, match=r"t.yaml is no task: it must hold keys such as name"):
        parse_task("[1]", "t.yaml")
    with pytest.raises(ConfigError, match=r"cannot read t.yaml, line 1: "):
        parse_task("a: [", "t.yaml")


def test_task_files_are_read_as_configurations_are():
    text = json.dumps(TASK)
    with pytest.raises(ConfigError, match=r'^cannot read t.yaml, line 1: key "text" is given twice$'):
        parse_task(text.replace('"choices"', '"text": "{choice}", "choices"'), "t.yaml")
    with pytest.raises(ConfigError, match=r'^cannot read t.yaml, line 1: key "file" is given twice$'):
        parse_task(text.replace('"file"', '"file": "f", "file"'), "t.yaml")
    assert parse_task(yaml.safe_dump(TASK) + "about: 2020-13-45\n", "t.yaml").about == "2020-13-45"


def test_tasks_are_found_by_file_or_name(tmp_path):
    (tmp_path / "t.yaml").write_text(json.dumps(TASK))
    assert load_task(str(tmp_path / "t.yaml"))[1] == tmp_path
    with pytest.raises(ConfigError, match="nothing is no task: name a YAML file, or one of hellaswag, openbookqa"):
        load_task("nothing")
    with pytest.raises(ConfigError, match="the data of piqa is not shipped: say where its files lie, with --data"):
        load_task("piqa")
    with pytest.raises(ConfigError, match=r"the task no.yaml cannot be read: No such file or directory"):
        load_task("no.yaml")


def test_official_lines_with_a_wrong_label_are_refused(tmp_path):
    write_releases(tmp_path)
    write_lines(tmp_path / "winogrande_1.1/dev.jsonl", WINOGRANDE | {"answer": ""})
    write_lines(tmp_path / "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl", OPENBOOKQA | {"answerKey": "E"})
    for name, said in (("winogrande", '"", which is no choice; valid: 1, 2'), ("openbookqa", '"E", .* valid: A, B')):
        task, folder = load_task(name, tmp_path)
        with pytest.raises(DataError, match=said):
            load_examples(task, folder)
