"""The stop file of a run: seen, looked for rarely, set aside once heeded."""

import pytest

from megamoe.runs import stop_file
from megamoe.runs.stop_file import StopFile


def test_it_is_seen_and_set_aside(tmp_path):
    there = StopFile(tmp_path)
    assert not there.is_there() and there.set_aside() is None
    (tmp_path / "stop").touch()
    assert there.is_there() and StopFile(tmp_path).was_there()
    assert there.set_aside() is None
    assert {path.name for path in tmp_path.iterdir()} == {"stop.done"} and not there.is_there()
    (tmp_path / "stop").touch()  # a second time
    assert there.set_aside() is None and not there.is_there()


def test_the_folder_is_looked_into_at_most_once_in_a_while(tmp_path, monkeypatch):
    now, looks = [100.0], []
    monkeypatch.setattr(stop_file.time, "monotonic", lambda: now[0])
    watched = StopFile(tmp_path)
    monkeypatch.setattr(watched, "is_there", lambda: looks.append(now[0]) or len(looks) > 1)
    for now[0] in (100.0, 100.5, 100.99, 101.0, 101.5):
        assert watched.was_there() == (now[0] >= 101.0)
    assert looks == [100.0, 101.0]


def test_a_file_that_cannot_be_renamed_is_told(tmp_path, monkeypatch):
    (tmp_path / "stop").touch()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stop_file.os, "replace", refuse)
    assert StopFile(tmp_path).set_aside() == (
        f"{tmp_path}/stop cannot be renamed (Permission denied): remove it before the next start"
    )


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_whatever_bears_the_name_counts(tmp_path, kind):
    path = tmp_path / "stop"
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path)
    assert StopFile(tmp_path).was_there()
