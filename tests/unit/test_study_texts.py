"""What a study is trained on is known by its content: a path that holds another text later is refused."""

import numpy as np
import pytest

from megamoe.cli import main
from megamoe.data.indexed import IndexedWriter
from megamoe.errors import ConfigError
from megamoe.study.texts import RECORD, check_texts, fingerprint
from tests.unit.study_cases import TINY_STUDY, load_tiny


def write(prefix, tokens: np.ndarray) -> None:
    with IndexedWriter(prefix, 260) as writer:
        writer.add_documents(tokens.astype(writer.dtype), np.array([len(tokens)]))


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(TINY_STUDY)
    return load_tiny(tmp_path)


def test_another_text_under_the_same_path_is_refused(study, tmp_path):
    settings, runs = study
    text = np.arange(4_000) % 250
    check_texts(runs, settings.folder)
    assert not settings.folder.exists(), "what is not there is left to training"
    write(tmp_path / "train", text)
    check_texts(runs[:1], settings.folder)
    record = (settings.folder / RECORD).read_bytes()
    write(tmp_path / "train", text)
    check_texts(runs, settings.folder)
    assert (settings.folder / RECORD).read_bytes() == record, "written again, it is the same text"
    for other in (text[::-1], text[:-1], np.where(np.arange(4_000) == 2_000, 7, text)):
        write(tmp_path / "train", other)
        with pytest.raises(ConfigError) as refused:
            check_texts(runs[1:], settings.folder)
        assert str(refused.value) == (
            "train is not the text that other runs in runs/tiny were trained on: restore it, choose another --out, or "
            "remove that folder"
        )


def test_a_large_text_is_known_by_blocks_of_all_of_it(tmp_path):
    tokens = np.zeros(40_000_000, np.uint16)  # 80 MB: 64 blocks of 64 KiB are a twentieth
    write(tmp_path / "a", tokens)
    first = fingerprint(str(tmp_path / "a"))
    for changed in (slice(0, 1), slice(20_000_000, 22_000_000), slice(-1, None)):
        tokens[:] = 0
        tokens[changed] = 1
        write(tmp_path / "b", tokens)
        assert fingerprint(str(tmp_path / "b")) != first


def test_a_record_that_cannot_be_written_is_told(study, tmp_path):
    settings, runs = study
    write(tmp_path / "train", np.arange(100))
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^runs/tiny/texts.json cannot be written \(.*\): choose another folder "):
        check_texts(runs, settings.folder)


@pytest.mark.parametrize("words", [[], ["--submit=--nodes 1 --ranks-per-node 1 --no-preflight --dry-run"]])
def test_the_command_trains_and_submits_nothing_on_another_text(study, tmp_path, monkeypatch, capsys, words):
    settings, runs = study
    write(tmp_path / "train", np.arange(4_000) % 250)
    check_texts(runs, settings.folder)
    write(tmp_path / "train", np.arange(4_000) % 249)
    monkeypatch.setattr("megamoe.study.scoring.check_evaluation", lambda *_, **__: None)
    assert main(["study", "study.yaml", *words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("megamoe: error: train is not the text that other runs ") and not told.out
    assert not any(run.dir.exists() for run in runs)
