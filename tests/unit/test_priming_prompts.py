"""Prompts as tokens: the newline rule, which tokens each rule scores, draws of shots, and prompts without room.

Expected ids are written out: a byte b is 4 + b for the byte tokenizer, and 2 ends a document.
"""

import dataclasses

import pytest

from megamoe.config.schema import TokenizerConfig
from megamoe.data.tokenizers import ByteTokenizer, build_tokenizer
from megamoe.errors import ConfigError, DataError
from megamoe.priming.batching import batches, families
from megamoe.priming.encoding import Encoder, make_prompt
from megamoe.priming.examples import Example, load_examples
from megamoe.priming.shots import draw_shots
from megamoe.priming.tasks import Task
from tests.unit.priming_cases import write_lines

END = 2


def ids(*parts):
    """Texts to bytes' ids, numbers as they are."""
    return tuple(i for part in parts for i in ([part] if isinstance(part, int) else [4 + b for b in part.encode()]))


def encoder(newlines="end_of_document", document_start=True):
    return Encoder(ByteTokenizer(), newlines, document_start)


def example(before, choices, after="", **more):
    texts = tuple(before + choice + after for choice in choices)
    return Example("f, line 1", tuple(choices), texts, before, frozenset({0}), **more)


def prompt(rule, *of, shots=(), room=100, too_long="drop-shots", by=None):
    return make_prompt(by or encoder(), rule, example(*of), shots, max_tokens=room, too_long=too_long)


def scored(texts):
    return [text.tokens[text.start : text.end] for text in texts]


def test_newlines_become_ends_of_documents_or_stay():
    text = "a\n\nb"
    assert encoder().ids(text, shots=["x", "y\n"]) == ids(END, "x", END, "y", END, "a", END, "b")
    assert encoder(document_start=False).ids(text) == ids("a", END, "b")
    assert encoder("as_is").ids(text, shots=["x"]) == ids(END, "x\na\nb")


def test_lines_are_encoded_as_the_papers_preprocessing_encodes_them(tmp_path):
    """Each line by itself: sentencepiece begins each with its own mark of a word's beginning."""
    import sentencepiece

    (tmp_path / "text").write_text("the cat sat on the mat\nthe dog ran\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=40, model_type="bpe", pad_id=1,
        bos_id=0, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    tokenizer = build_tokenizer(TokenizerConfig(kind="sentencepiece", path=str(tmp_path / "m.model")))
    cat, dog = tokenizer.encode("the cat"), tokenizer.encode("the dog")
    assert Encoder(tokenizer, "end_of_document", True).ids("the dog", shots=["the cat"]) == (2, *cat, 2, *dog)


def test_the_mean_is_over_what_follows_the_common_prefix():
    found = prompt("mean_after_prefix", "Q ", ["and so", "and then"])
    assert scored(found.texts) == [ids("so"), ids("then")]
    assert found.texts[0].tokens == ids(END, "Q and so")


def test_of_a_choice_that_begins_another_something_is_scored():
    found = prompt("mean_after_prefix", "Q ", ["cat", "cat food"])
    assert scored(found.texts) == [ids("t"), ids("t food")]


def test_a_first_token_that_is_scored_has_one_before_it():
    for rule in ("mean_after_prefix", "sum_of_choice"):
        found = prompt(rule, "", ["yes", "no"], by=encoder(document_start=False))
        assert [text.tokens for text in found.texts] == [ids(END, "yes"), ids(END, "no")]
        assert scored(found.texts) == [ids("yes"), ids("no")]


def test_the_suffix_is_what_all_choices_are_followed_by():
    found = prompt("sum_of_suffix", "Ann gave Eve ", ["one", "nine"], " more.")
    assert scored(found.texts) == [ids("ne more."), ids("ne more.")], "in tokens: both words end alike"
    with pytest.raises(DataError, match="f, line 1: nothing common follows the choices, which sum_of_suffix scores"):
        prompt("sum_of_suffix", "Ann gave Eve ", ["one", "two"])


def test_the_choice_is_what_lm_eval_scores():
    """It strips the context and scores what the whole is longer by."""
    found = prompt("sum_of_choice", "Q: ", ["an apple", "an ape"], shots=["S s"])
    assert scored(found.texts) == [ids(" an apple"), ids(" an ape")]
    assert found.texts[1].tokens == ids(END, "S s", END, "Q: an ape")
    bare = prompt("sum_of_choice", "", ["a", "b"], shots=["S"])
    assert scored(bare.texts) == [ids(END, "a"), ids(END, "b")]


def test_the_unconditional_text_has_neither_shots_nor_question():
    one = dataclasses.replace(example("Why? ", ["a", "bc"]), unconditional="Answer: ")
    found = make_prompt(encoder(), "sum_minus_unconditional", one, ["S s"], max_tokens=99, too_long="refuse")
    assert [text.tokens for text in found.unconditional] == [ids(END, "Answer: a"), ids(END, "Answer: bc")]
    assert scored(found.unconditional) == scored(found.texts) == [ids(" a"), ids(" bc")]


def test_choice_and_unconditional_text_are_scored_on_the_same_tokens(tmp_path):
    """Where the choice's own spaces and newlines collapse in the one, they do so in the other."""
    task = {
        "name": "t", "data": {"file": "t.jsonl"}, "text": "{q} {choice}", "choices": "c", "label": {"field": "a"},
        "score": "sum_minus_unconditional", "unconditional": "Answer:  {choice}",
    }  # fmt: skip
    write_lines(tmp_path / "t.jsonl", {"q": "Q ", "c": ["two  words", "two\n\nlines"], "a": 0})
    (one,) = load_examples(Task.model_validate(task), tmp_path)
    found = make_prompt(encoder(), "sum_minus_unconditional", one, [], max_tokens=99, too_long="refuse")
    assert scored(found.unconditional) == scored(found.texts) == [ids(" two words"), ids(" two", END, "lines")]


def test_unconditional_texts_have_to_fit_too():
    one = dataclasses.replace(example("A ", ["1", "12345"]), unconditional="Answer: ")
    with pytest.raises(DataError, match="f, line 1: 13 tokens do not fit into the model's 9; --too-long cut cuts"):
        make_prompt(encoder(), "sum_minus_unconditional", one, [], max_tokens=9, too_long="drop-shots")
    found = make_prompt(encoder(), "sum_minus_unconditional", one, [], max_tokens=9, too_long="cut")
    assert [text.tokens for text in found.unconditional] == [ids(END, "Answer: 1"), ids("wer: 12345")]
    assert scored(found.unconditional) == scored(found.texts) == [ids(" 1"), ids(" 12345")]
    assert found.num_cut_texts == 1 and found.texts[0].tokens == ids(END, "A 1")


def test_shots_are_dropped_from_the_front_until_the_longest_choice_fits():
    shots = ["first", "second", "third"]
    room = len(ids(END, "third", END, "Q long")) - 1  # the last token is predicted, and predicts nothing
    found = prompt("mean_after_prefix", "Q ", ["x", "long"], shots=shots, room=room)
    assert found.num_dropped_shots == 2 and found.texts[0].tokens == ids(END, "third", END, "Q x")
    assert prompt("mean_after_prefix", "Q ", ["x", "long"], shots=shots, room=room - 1).num_dropped_shots == 3
    assert prompt("mean_after_prefix", "Q ", ["x", "long"], shots=shots, room=50).num_dropped_shots == 0


def test_what_does_not_fit_is_refused_or_cut():
    with pytest.raises(DataError) as error:
        prompt("mean_after_prefix", "A question ", ["x", "yz"], shots=["s"], room=6)
    assert str(error.value) == (
        "f, line 1: 13 tokens do not fit into the model's 6; --too-long cut cuts its beginning off"
    )
    said = "15 tokens with 1 shots do not fit into the model's 13; --too-long drop-shots leaves shots out"
    with pytest.raises(DataError, match=said):
        prompt("mean_after_prefix", "A question ", ["x", "yz"], shots=["s"], room=13, too_long="refuse")
    found = prompt("mean_after_prefix", "A question ", ["x", "yz"], shots=["s"], room=6, too_long="cut")
    assert [text.tokens for text in found.texts] == [ids("stion x"[-7:]), ids("tion yz")]
    assert scored(found.texts) == [ids("x"), ids("yz")] and (found.num_dropped_shots, found.num_cut_texts) == (1, 2)
    with pytest.raises(DataError, match="f, line 1: 7 tokens are to be scored, more than the model's 6"):
        prompt("mean_after_prefix", "A ", ["1234567", "x"], room=6, too_long="cut")


POOL = [example(f"question {number} ", ["yes", "no"]) for number in range(6)]


def drawn(number_of_shots, *, seed=1, draw=0, number=0, of=None, pool=POOL):
    shots = draw_shots(pool, of or example("new ", ["a", "b"]), number_of_shots, seed=seed, draw=draw, number=number)
    return [shot.before for shot in shots]


def test_draws_depend_on_seed_draw_and_example_alone():
    assert drawn(3) == drawn(3) and len(set(drawn(3))) == 3
    others = {tuple(drawn(3, **{key: 7})) for key in ("seed", "draw", "number")}
    assert len(others | {tuple(drawn(3))}) == 4
    assert drawn(3) == ["question 5 ", "question 4 ", "question 3 "], "the same on every machine and for all times"
    assert drawn(3)[:2] == drawn(2)


def test_an_example_is_never_its_own_shot():
    for number in range(20):
        assert sorted(drawn(5, of=POOL[2], number=number)) == sorted({e.before for e in POOL} - {"question 2 "})
    with pytest.raises(ConfigError, match="6 shots cannot be drawn for f, line 1: its train file has 5 other examples"):
        drawn(6, of=POOL[2])


def test_every_example_is_drawn_about_as_often():
    counts = [sum(f"question {i} " in drawn(2, number=n) for n in range(600)) for i in range(6)]
    assert all(150 < count < 250 for count in counts), counts


def test_what_is_shared_ends_before_what_predicts():
    prompts = [
        prompt("mean_after_prefix", "Q ", ["ab", "acd"]),
        prompt("sum_of_suffix", "Q ", ["a", "bc"], " end"),
        prompt("mean_after_prefix", "A much longer question ", ["x", "y", "z"]),
    ]
    found = families(prompts)
    assert [family.shared for family in found] == [len(ids(END, "Q ")), len(ids(END, "Q ")), 23]
    assert [family.longest_ending for family in found] == [2, 5, 1]
    assert batches(found, 2) == [[2, 1], [0]], "the longest first"
