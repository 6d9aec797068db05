"""The import of a Hugging Face folder before a fine-tuning: it ends with the command; what is in its place."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamoe.cli import main
from megamoe.errors import ConfigError, ConversionError
from megamoe.finetune_commands import _imported

ROOT = Path(__file__).parents[2]
FIRST = SimpleNamespace(rank=0)


def hf_folder(root: Path) -> Path:
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_text("{}")
    return root / "hf"


def program(path: Path, *lines: str) -> Path:
    """What stands in for the interpreter that runs `convert from-hf`."""
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def test_the_import_ends_with_the_command_that_began_it(tmp_path):
    noted = tmp_path / "pid"
    slow = program(tmp_path / "slow", f"echo $$ > {noted}.new", f"mv {noted}.new {noted}", "exec sleep 100")
    arguments = ["finetune", "--from", str(hf_folder(tmp_path)), f"run.dir={tmp_path / 'run'}"]
    code = f"import sys\nfrom megamoe.cli import main\nsys.executable = {str(slow)!r}\nmain({arguments!r})"
    command = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not noted.exists():
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child = int(noted.read_text())
    try:
        command.terminate()
        assert command.wait(20) == -signal.SIGTERM
        deadline = time.monotonic() + 20
        while is_alive(child):
            assert time.monotonic() < deadline, "the import lives on"
            time.sleep(0.02)
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether it runs: a dead one may stay as a zombie where nobody reaps orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_import_that_another_process_finished_first_is_taken_if_it_is_of_this_folder(tmp_path, monkeypatch):
    folder, checkpoint = hf_folder(tmp_path), "base/checkpoints/step_00000000"

    def finished_first(source: Path) -> None:
        lines = [f"mkdir -p {tmp_path}/{checkpoint}", f"touch {tmp_path}/{checkpoint}/manifest.json"]
        record = json.dumps({"source": {"folder": str(source)}})
        lines += [f"echo '{record}' > {tmp_path}/base/conversion.json"]
        end = ["echo 'megamoe: error: base has just been written by another process' >&2", "exit 2"]
        monkeypatch.setattr(sys, "executable", str(program(tmp_path / "late", *lines, *end)))

    finished_first(folder)
    assert _imported(folder, tmp_path / "base", None, FIRST, False) == tmp_path / "base"
    (tmp_path / "base").rename(tmp_path / "before")
    finished_first(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"base was imported from .*/other, not from .*/hf: choose another run.dir"):
        _imported(folder, tmp_path / "base", None, FIRST, False)
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "fails", "echo 'megamoe: error: why' >&2", "exit 2")))
    with pytest.raises(ConversionError, match=r"/hf cannot be imported: why$"):
        _imported(folder, tmp_path / "nothing", None, FIRST, False)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "{base} exists, but no conversion.json in it says that it was imported from {hf}: choose another"),
        ("{}", "{base} exists, but no conversion.json"),
        ("[]", "{base} exists, but no conversion.json"),
        ('{"source": "there"}', "{base} exists, but no conversion.json"),
        ('{"source": {"folder": null}}', "{base} exists, but no conversion.json"),
        ('{"source": {"folder": "a\\u0000b"}}', "{base} exists, but no conversion.json"),
        ("{", "{base} exists, but no conversion.json"),
        ('{"source": {"folder": "there"}}', "{base} was imported from there, not from {hf}: choose another run.dir"),
        ('{"source": {"folder": "HF"}}', "{base} holds no checkpoint any more: remove that folder to import {hf}"),
    ],
)
def test_a_folder_in_the_place_of_the_import_is_one_sentence(tmp_path, capsys, record, message):
    folder, base = hf_folder(tmp_path), tmp_path / "run" / "base"
    base.mkdir(parents=True)
    if record is not None:
        (base / "conversion.json").write_text(record.replace("HF", str(folder)))
    assert main(["finetune", "--from", str(folder), f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megamoe: error: " + message.format(base=base, hf=folder)) and error.count("\n") == 1
