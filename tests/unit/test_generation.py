"""How tokens are drawn, and what `megamoe generate` refuses."""

import io
import json

import numpy as np
import pytest
import torch

from megamoe.cli import main
from megamoe.errors import ConfigError, DataError
from megamoe.generate_commands import _read
from megamoe.generation.choosing import NO_TOKEN, choose, uniform
from megamoe.generation.settings import Sampling
from megamoe.inference import settings as settings_module
from tests.unit import attempt_cases
from tests.unit.attempt_cases import save_checkpoint

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -torch.inf, 0.0])


NUM_DRAWS = 4_000


def expected(temperature: float, kept: list[int]) -> np.ndarray:
    """Softmax over the kept ids alone."""
    weights = np.zeros(len(LOGITS))
    weights[kept] = np.exp(LOGITS.double().numpy()[kept] / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("sampling", "temperature", "kept"),
    [
        (Sampling(temperature=1.0), 1.0, [0, 1, 2, 3, 5]),
        (Sampling(temperature=0.5), 0.5, [0, 1, 2, 3, 5]),
        (Sampling(temperature=1.0, top_k=2), 1.0, [0, 3]),
        # Probabilities 0.47, 0.29, 0.10, 0.06, 0.02 of ids 0, 3, 2, 5, 1 (times 1/0.94): 0.75 needs the first two.
        (Sampling(temperature=1.0, top_p=0.75), 1.0, [0, 3]),
        (Sampling(temperature=1.0, top_p=0.9), 1.0, [0, 2, 3]),
        (Sampling(temperature=2.0, top_k=4, top_p=0.5), 2.0, [0, 3]),
        (Sampling(temperature=1.0, top_p=1e-9), 1.0, [0]),
    ],
)
def test_draws_follow_what_is_left_of_the_distribution(sampling, temperature, kept):
    """Each draw is where its uniform number falls among the kept ids, the likeliest first."""
    ids = choose(LOGITS.expand(NUM_DRAWS, -1), sampling, range(NUM_DRAWS), step=3).numpy()
    weights = expected(temperature, kept)
    likeliest_first = np.argsort(-weights, kind="stable")
    numbers = np.array([uniform(sampling.seed, text, 3) for text in range(NUM_DRAWS)])
    places = np.searchsorted(weights[likeliest_first].cumsum(), numbers, side="right")
    np.testing.assert_array_equal(ids, likeliest_first[places])
    np.testing.assert_allclose(np.bincount(ids, minlength=len(LOGITS)) / NUM_DRAWS, weights, atol=0.03)


def test_the_top_k_of_a_large_vocabulary_are_those_of_all_of_it():
    logits = torch.randn(1_000, generator=torch.Generator().manual_seed(4))
    logits[300] = logits[20]  # of equal ones the first comes first
    values = logits.double().numpy() / 0.7
    likeliest_first = np.argsort(-values, kind="stable")[:17]
    weights = np.exp(values[likeliest_first] - values.max())
    numbers = np.array([uniform(0, text, 5) for text in range(NUM_DRAWS)]) * weights.sum()
    expected_ids = likeliest_first[np.searchsorted(weights.cumsum(), numbers, side="right")]
    ids = choose(logits.expand(NUM_DRAWS, -1), Sampling(0.7, top_k=17, seed=0), range(NUM_DRAWS), step=5).numpy()
    np.testing.assert_array_equal(ids, expected_ids)


def test_the_likeliest_token():
    assert choose(LOGITS[None], Sampling(), [0], 0).tolist() == [0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, top_k=3), Sampling(0.7, top_p=0.8)])
def test_logits_that_are_no_distribution_give_no_token(sampling):
    """And the rows beside them are as if they were alone."""
    rows = LOGITS.repeat(6, 1)
    rows[1, 4], rows[2, 0], rows[3], rows[4] = torch.nan, torch.inf, -torch.inf, torch.nan
    found = choose(rows, sampling, range(6), step=1).tolist()
    assert found[1:5] == [NO_TOKEN] * 4
    assert [found[0], found[5]] == choose(LOGITS.repeat(2, 1), sampling, [0, 5], step=1).tolist()


def test_a_draw_is_the_texts_own():
    sampling = Sampling(temperature=1.5, seed=9)
    rows = torch.randn((8, 50), generator=torch.Generator().manual_seed(0))
    together = choose(rows, sampling, range(8), step=2)
    for number in range(8):
        assert choose(rows[number : number + 1], sampling, [number], step=2) == together[number]
    assert uniform(2**63 + 5, 1, 2) != uniform(2**63 + 6, 1, 2), "every bit of a seed counts"
    draws = {uniform(seed, text, step) for seed in range(5) for text in range(5) for step in range(5)}
    assert len(draws) == 125 and all(0.0 <= draw < 1.0 for draw in draws)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0 is impossible: use 0 (the likeliest token) or more"),
        ({"temperature": float("nan")}, "temperature nan is impossible: use 0 (the likeliest token) or more"),
        ({"top_k": -1}, "top-k -1 is impossible: use 1 or more, or 0 for all tokens"),
        ({"top_p": 0.0}, "top-p 0.0 is impossible: use more than 0 and at most 1"),
        ({"top_p": 1.5}, "top-p 1.5 is impossible: use more than 0 and at most 1"),
        ({"top_k": 5}, "top-k says how tokens are drawn, and temperature 0 draws none: give one above 0"),
        ({"top_p": 0.5}, "top-p says how tokens are drawn, and temperature 0 draws none: give one above 0"),
        ({"seed": -1}, "seed -1 is impossible: use a whole number from 0 to 2**64 - 1"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ConfigError) as raised:
        Sampling(**settings)
    assert str(raised.value) == message


def _texts(path) -> list[str]:
    return [text for _, text in _read(str(path))]


def _type_in(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape"))


def test_prompts_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "prompts"
    path.write_text("one\n\n two \n")
    assert _read(str(path)) == [(f"{path}, line 1", "one"), (f"{path}, line 3", " two ")]
    path.write_bytes(b"one\r\ntwo\r\n")
    assert _texts(path) == ["one", "two"]
    path.write_text(json.dumps({"prompt": "a\nb", "more": 1}) + "\n\n" + json.dumps({"prompt": ""}) + "\n")
    assert _texts(path) == ["a\nb", ""]
    path.write_text("\ufeff" + json.dumps({"prompt": "after a mark"}) + "\n")
    assert _texts(path) == ["after a mark"]
    path.write_text(json.dumps({"prompt": "one\u2028line"}, ensure_ascii=False) + "\n")
    assert _texts(path) == ["one\u2028line"]
    _type_in(monkeypatch, "fröm stdin\n".encode())
    assert _read("-") == [("-, line 1", "fröm stdin")]
    _type_in(monkeypatch, b"caf\xe9\n")  # Python would let it pass in some locales, as what cannot be written again
    with pytest.raises(DataError, match=r"^- cannot be read as text: 'utf-8' codec can't decode byte 0xe9 "):
        _read("-")
    for content, message in (
        ("", f"{path} holds no prompt"),
        ('{"prompt": "x"}\n{"text": "x"}', f"{path}, line 2: no key 'prompt' (keys here: text)"),
        ('{"prompt": 3}', f"{path}, line 1: 'prompt' holds a int where text is expected"),
        ('{"prompt": "\\ud800"}', f"{path}, line 1: 'prompt' holds a lone surrogate at character 0"),
        ('{"prompt": "x"}\n[1]', f"{path}, line 2: a JSON list where an object is expected"),
    ):
        path.write_text(content)
        with pytest.raises(DataError) as raised:
            _read(str(path))
        assert str(raised.value) == message
    with pytest.raises(DataError, match=r"^/none/there cannot be read as text: "):
        _read("/none/there")


def test_prompts_that_the_model_cannot_take_are_named(tmp_path, capsys, monkeypatch):
    model = attempt_cases.TINY.model.model_copy(update={"vocab_size": 260, "vocab_size_multiple": 4, "seq_length": 16})
    monkeypatch.setattr(attempt_cases, "TINY", attempt_cases.TINY.model_copy(update={"model": model}))
    save_checkpoint(tmp_path, 1)
    (tmp_path / "prompts").write_text("x\n\n" + "y" * 30 + "\n")
    for words, where in (
        (["--prompt", "x", "--prompt", "caf\udce9"], "--prompt 2: 'prompt' holds a lone surrogate at character 3"),
        (["--prompts", str(tmp_path / "prompts")], f"{tmp_path / 'prompts'}, line 3: the prompt has 30 tokens: "),
    ):
        assert main(["generate", str(tmp_path), *words]) == 2
        assert capsys.readouterr().err.startswith(f"megamoe: error: {where}")


def test_the_prompts_are_not_written_over(tmp_path, capsys):
    save_checkpoint(tmp_path, 1)
    path = tmp_path / "prompts"
    path.write_text("x\n")
    (tmp_path / "link").symlink_to(path)
    for out in (path, tmp_path / "link"):
        assert main(["generate", str(tmp_path), "--prompts", str(path), "--out", str(out)]) == 2
        assert capsys.readouterr().err == (
            f"megamoe: error: {out} holds the prompts, whose place the texts would take: give --out another file\n"
        )
    assert path.read_text() == "x\n"


def test_what_is_no_model_is_refused(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert capsys.readouterr().err == f"megamoe: error: {tmp_path} is no checkpoint, and no folder with checkpoints\n"


def test_ranks_of_a_launcher_do_not_share_an_input(tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path, 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MEGAMOE_INIT_METHOD", "file:///nowhere")
    assert main(["generate", str(tmp_path), "--prompts", "-"]) == 2
    assert capsys.readouterr().err == (
        "megamoe: error: --prompts - reads one input, which a launcher's ranks share: put the prompts into a file\n"
    )


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    save_checkpoint(tmp_path, 1)
    (tmp_path / "texts").write_text("before")
    for out in (tmp_path, tmp_path / "none" / "texts"):
        assert main(["generate", str(tmp_path), "--prompt", "x", "--out", str(out)]) == 2
        assert capsys.readouterr().err == (
            f"megamoe: error: {out} cannot be written: give --out a file in a folder that is there and not read-only\n"
        )
    words = ["generate", str(tmp_path), "--prompt", "x", "--out", str(tmp_path / "texts")]
    assert main(words) == 2 and (tmp_path / "texts").read_text() == "before"
    assert "makes 260 ids, but model.vocab_size is 8" in capsys.readouterr().err


def test_a_classifier_gives_no_tokens(tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path, 1)
    usual = settings_module.config_of

    def classifier(opened):
        config = usual(opened)
        return config.model_copy(update={"model": config.model.model_copy(update={"num_labels": 3})})

    monkeypatch.setattr(settings_module, "config_of", classifier)
    for command in (["generate", str(tmp_path), "--prompt", "x"], ["evaluate", str(tmp_path), "--text", __file__]):
        assert main(command) == 2
        assert "is a classifier of 3 labels, which gives no tokens: name a language model" in capsys.readouterr().err
