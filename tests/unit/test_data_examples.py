"""Examples as rows, by hand; what is refused, with file and line; batches that weigh what counts."""

import json
from pathlib import Path

import numpy as np
import pytest

from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.data.batches import micro_batches
from megamoe.data.example_files import summarize
from megamoe.data.examples import open_examples
from megamoe.errors import DataError

END = 2


def ids(text: str) -> list[int]:
    return [4 + byte for byte in text.encode()]


def config_of(tmp_path: Path, lines: list, *settings: str) -> Config:
    """`lines`: objects, or text as it is to stand in the file."""
    path = tmp_path / "task.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    (tmp_path / "base.yaml").write_text("{}\n")
    usual = (
        "model.vocab_size=260", "model.seq_length=8", "finetune.objective=language_model",
        f"finetune.train_files=[{path}]", f"finetune.valid_files=[{path}]",
    )  # fmt: skip
    return load_config(str(tmp_path / "base.yaml"), [*usual, *settings])


def first_row(tmp_path: Path, line: dict, *settings: str):
    return open_examples(config_of(tmp_path, [line], *settings)).valid.row(0)


CLASSIFY = ("finetune.objective=classification", "model.num_labels=3")


@pytest.mark.parametrize(
    ("line", "settings", "tokens", "labels", "counts"),
    [
        ({"prompt": "ab", "completion": "cd"}, (), [*ids("abcd"), END], [*ids("bcd"), END], [1, 2, 3]),
        ({"prompt": "ab", "completion": "cd"}, ("finetune.loss_on=all",), [*ids("abcd")], [*ids("bcd"), END],
         [0, 1, 2, 3]),
        ({"prompt": "", "completion": "cd"}, (), ids("cd"), [*ids("d"), END], [0, 1]),
        ({"text": "abc"}, (), ids("abc"), [*ids("bc"), END], [0, 1, 2]),
        ({"text": "a\n\nb"}, ("finetune.newlines_end_documents=true",), [*ids("a"), END, END, *ids("b")],
         [END, END, *ids("b"), END], [0, 1, 2, 3]),
        ({"text": "a\nb"}, (), ids("a\nb"), [*ids("\nb"), END], [0, 1, 2]),
        ({"text": "abc", "label": 2, "id": 7}, CLASSIFY, ids("abc"), [0, 0, 2], [2]),
        ({"text": "abcdefgh", "label": 0}, CLASSIFY, ids("abcdefgh"), [0] * 8, [7]),
        ({"text": "ab", "label": "b"}, (*CLASSIFY, "finetune.labels=[a,b,c]"), ids("ab"), [0, 1], [1]),
        # Cut: a text at its end, a prompt at its beginning, then a completion at its end.
        ({"text": "abcdefghij"}, ("finetune.too_long=cut",), ids("abcdefgh"), ids("bcdefghi"), list(range(8))),
        ({"prompt": "abcdefgh", "completion": "ij"}, ("finetune.too_long=cut",), ids("cdefghij"),
         [*ids("defghij"), END], [5, 6, 7]),
        ({"prompt": "ab", "completion": "cdefghijklm"}, ("finetune.too_long=cut",), ids("bcdefghi"), ids("cdefghij"),
         list(range(8))),
        ({"text": "abcdefghij", "label": 1}, (*CLASSIFY, "finetune.too_long=cut"), ids("abcdefgh"), [0] * 7 + [1], [7]),
    ],
)  # fmt: skip
def test_rows_by_hand(tmp_path, line, settings, tokens, labels, counts):
    row = first_row(tmp_path, line, *settings)
    assert row.tokens.tolist() == (tokens + [END] * 8)[:8]
    assert np.flatnonzero(row.mask).tolist() == counts
    for position in counts:
        assert row.labels[position] == labels[position]


def test_what_fits_exactly_is_not_cut_and_cuts_are_told(tmp_path):
    lines = [{"text": "abcdefgh"}, {"text": "abcdefghi"}, {"text": "abcdefghij"}]
    splits = open_examples(config_of(tmp_path, lines, "finetune.too_long=cut"))
    assert splits.notes == (
        "2 of 3 training examples were longer than model.seq_length 8 and cut",
        "2 of 3 validation examples were longer than model.seq_length 8 and cut",
    )
    with pytest.raises(DataError, match=r"task.jsonl, line 2: the example has 9 tokens, model.seq_length is 8"):
        open_examples(config_of(tmp_path, lines))


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        ([], (), r"task.jsonl holds no examples: write one JSON object a line"),
        (["", "  "], (), r"holds no examples"),
        ([{"text": "a"}, "{"], (), r"task.jsonl, line 2: no valid JSON \("),
        (["[1]"], (), r"line 1: a JSON list where an object is expected"),
        ([{"completion": "a"}], (), r"line 1: no key 'prompt' \(keys here: completion\)"),
        ([{"prompt": "a"}], (), r"line 1: no key 'completion' \(keys here: prompt\)"),
        ([{"text": "a"}, {}], (), r'line 2 has neither "text" nor "prompt" and "completion": its keys are none'),
        ([{"text": 3}], (), r"line 1: 'text' holds a int where text is expected"),
        ([{"text": ""}], (), r'line 1: "text" is empty'),
        ([{"text": "a", "label": 0}, {"text": "b"}], CLASSIFY, r'line 2 has no "label": its keys are text'),
        ([{"label": 1}], CLASSIFY, r"line 1: no key 'text'"),
        ([{"text": "\ud800"}], (), r"line 1: 'text' holds a lone surrogate at character 0"),
        ([{"text": "", "label": 1}], CLASSIFY, r"line 1: the text has no tokens"),
        ([{"text": "a", "label": 3}], CLASSIFY, r"line 1: the label 3 is not a number from 0 to 2"),
        ([{"text": "a", "label": "b"}], CLASSIFY, r'the label "b" is not a number from 0 to 2'),
        ([{"text": "a", "label": True}], CLASSIFY, r'"label" is true: it must be a name, or a number from 0'),
        ([{"text": "a", "label": -1}], CLASSIFY, r'"label" is -1'),
        ([{"text": "a", "label": "d"}], (*CLASSIFY, "finetune.labels=[a,b,c]"),
         r'the label "d" is unknown: finetune.labels names a, b, c'),
        ([{"text": "a"}], ("model.vocab_size=100",), r"data.tokenizer byte makes 260 ids, but model.vocab_size is 100"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(tmp_path, lines, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        open_examples(config_of(tmp_path, lines, *settings))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    config = config_of(tmp_path, [{"text": "a"}], "finetune.train_files=[nowhere.jsonl]")
    with pytest.raises(DataError, match=r"cannot read nowhere.jsonl: No such file"):
        open_examples(config)
    (tmp_path / "task.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"task.jsonl is not a text file in UTF-8"):
        summarize([str(tmp_path / "task.jsonl")], with_labels=True)


def test_every_epoch_has_each_example_once_in_an_order_of_its_own(tmp_path):
    lines = [{"text": f"{number:02d}"} for number in range(23)]
    train, valid = (getattr(open_examples(config_of(tmp_path, lines)), split) for split in ("train", "valid"))
    epochs = [[train.example_number(epoch * 23 + i) for i in range(23)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3
    other = open_examples(config_of(tmp_path, lines, "run.seed=5")).train
    assert [other.example_number(i) for i in range(23)] != epochs[0]
    assert [valid.example_number(i) for i in range(23)] == list(range(23))
    # Beyond the last example nothing counts.
    assert not valid.row(23).mask.any() and valid.num_loss_tokens(range(20, 30)) == 3 * 2


@pytest.mark.parametrize(("micro", "data"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_mean_over_micro_batches_is_that_of_what_counts(tmp_path, micro, data):
    lines = [{"prompt": "a", "completion": "b" * (1 + number % 6)} for number in range(8)]
    train = open_examples(config_of(tmp_path, lines)).train
    losses = np.random.default_rng(1).normal(size=(8, 8))  # one a position of each sample
    dealt = [
        list(micro_batches(train, consumed_samples=0, global_batch_size=8, micro_batch_size=micro,
                           data_parallel_rank=rank, data_parallel_size=data)) for rank in range(data)
    ]  # fmt: skip
    means = []
    for rank, batches in enumerate(dealt):
        for number, batch in enumerate(batches):
            first = (number * data + rank) * micro
            means.append((losses[first : first + micro] * batch.weights).sum())
    masks = np.stack([train.row(i).mask for i in range(8)])
    assert np.mean(means) == pytest.approx(losses[masks].mean(), rel=1e-6)
    assert len({int((batch.weights > 0).sum()) for batches in dealt for batch in batches}) > 1 or micro * data == 4


def test_labels_are_found_in_the_files(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"text": "a", "label": "yes"}\n\n{"text": "b", "label": "no"}\n')
    found = summarize([str(path), str(path)], with_labels=True)
    assert (found.num_examples, found.labels, found.are_numbers) == (4, ("no", "yes"), False)
    path.write_text('{"text": "a", "label": 3}\n{"text": "b", "label": 0}\n')
    assert summarize([str(path)], with_labels=True).labels == ("0", "1", "2", "3")
    path.write_text('{"text": "a", "label": 4000000000}\n')
    with pytest.raises(DataError, match=r"task.jsonl, line 1: the label 4000000000 is too large: numbers count the"):
        summarize([str(path)], with_labels=True)
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": "a"}\n')
    found = summarize([str(path)], with_labels=True)
    assert (found.labels, found.are_numbers) == (("0", "a"), False)
    # A task without classes may have any such key.
    path.write_text('{"text": "a", "label": null}\n')
    found = summarize([str(path)], with_labels=False)
    assert (found.num_examples, found.labels) == (1, ())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"label": 0}, {"label": 1}, {"label": "0"}],
         r'^\S*task.jsonl, line 3: the label "0" stands in an earlier line as 0: write it always as a number, or alw'),
        ([{"label": "1"}, {"label": 1}], r'task.jsonl, line 2: the label 1 stands in an earlier line as "1": write it'),
        ([{"text": "a"}], r'^\S*task.jsonl, line 1 has no "label": its keys are text$'),
        ([{"label": "a"}, {"text": "a"}], r'task.jsonl, line 2 has no "label": its keys are text$'),
        ([{"label": "a"}, {"label": "b\ud800"}], r"task.jsonl, line 2: 'label' holds a lone surrogate at character 1$"),
        ([{"label": 0}, {"label": 0}], r'^every line of \S*task.jsonl has the label "0": write examples of another'),
    ],
)  # fmt: skip
def test_labels_that_make_no_classes_are_said_by_file_and_line(tmp_path, lines, message):
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        summarize([str(path)], with_labels=True)
