"""What is refused before ranks meet: the first rank says it, and on other nodes the first rank there, with its name."""

from pathlib import Path

import pytest

from megamoe.cli import main
from tests.unit.attempt_cases import save_checkpoint

COMMANDS = {  # after the model; what each says of a file that is not there
    "evaluate": (["--text", "gone"], "set gone: no file matches gone"),
    "prime": (["--task", "gone.yaml"], "gone.yaml"),
    "generate": (["--prompts", "gone"], "gone cannot be read as text"),
}


def two_nodes_of_two(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as one of four ranks."""
    values = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2, "LOCAL_WORLD_SIZE": 2}
    for key, value in values.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("MEGAMOE_INIT_METHOD", "file:///nowhere")
    monkeypatch.setenv("MEGAMOE_NODE_NAME", f"node{rank // 2}")


@pytest.mark.parametrize("model", ["here", "elsewhere"])
@pytest.mark.parametrize("command", COMMANDS)
def test_each_node_says_once_what_it_lacks(command, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(Path("here"), 1)
    arguments, message = COMMANDS[command]
    if model == "elsewhere":
        message = "elsewhere is no checkpoint, and no folder with checkpoints"
    check_words(said_by([command, model, *arguments], monkeypatch, capsys), message)


def test_training_does_so_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check_words(said_by(["train", "gone.yaml"], monkeypatch, capsys), 'no file "gone.yaml", nor a preset')


def said_by(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each of the four ranks says before it ends."""
    said = []
    for rank in range(4):
        with monkeypatch.context() as patch:
            two_nodes_of_two(rank, patch)
            assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") <= 1
        said.append(printed.err)
    return said


def check_words(said: list[str], message: str) -> None:
    assert said[0].startswith("megamoe: error: ") and message in said[0]
    assert said[2] == said[0].replace("error: ", "error on node node1: ", 1)
    assert said[1] == said[3] == ""
