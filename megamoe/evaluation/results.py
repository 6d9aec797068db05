"""results.json: what is found so far, replaced as one act, and gone on from. No torch. Keys: docs/evaluate.md."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.outputs import writing
from megamoe.errors import ConfigError, OutputError
from megamoe.evaluation.sums import Sums, summary

FORMAT, VERSION = "megamoe-evaluation", 1
MAX_BYTES = 1 << 28
TOKENS = ".tokens"  # beside the file: text as ids, until all is done
# What must be the same for an evaluation to go on to the bit, in words.
SAME = {
    "sets": "the sets", "capacity": "the capacity of experts", "layout": "the layout", "precision": "the precision",
    "device": "the device", "tokenizer": "the tokenizer",
}  # fmt: skip


@dataclass
class Results:
    """The whole file as a tree. Models and their sets stand in the order in which they are scored."""

    tree: dict[str, Any]

    @classmethod
    def begin(cls, header: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> "Results":
        """header: what holds for all models, the keys of SAME among it. models: what identifies each."""
        tree = {"format": FORMAT, "version": VERSION, "is_complete": False, **header, "models": []}
        found = cls(tree)
        for model in models:
            found._add(model)
        return found

    def _add(self, model: Mapping[str, Any]) -> None:
        sets = [
            {"name": each["name"], "domain": each["domain"], "is_complete": False} for each in self.tree["sets"]
        ]
        self.tree["models"].append({**model, "is_complete": False, "sets": sets})

    def go_on(self, wanted: "Results", path: Path, *, keeps_others: bool) -> None:
        """Take up what `wanted` asks for beyond what is here. Raises ConfigError where this is of something else.

        keeps_others: models that are not wanted stay; otherwise they make it something else.
        """
        for key, name in SAME.items():
            if self.tree.get(key) != wanted.tree[key]:
                raise ConfigError(
                    f"{path} holds results of another evaluation: {name} differ{_s(name)} "
                    f"({_first_difference(self.tree.get(key), wanted.tree[key])}): add --overwrite to start anew, or "
                    "choose another --out"
                )
        here = [model["manifest_checksum"] for model in self.tree["models"]]
        there = [model["manifest_checksum"] for model in wanted.tree["models"]]
        strangers = [model for model in self.tree["models"] if model["manifest_checksum"] not in there]
        if strangers and not keeps_others:
            raise ConfigError(
                f"{path} holds results of another model, {strangers[0]['checkpoint']} at step {strangers[0]['step']}: "
                "add --overwrite to start anew, or choose another --out"
            )
        # Of what is not there any more, or not asked for, only what is whole is worth keeping.
        self.tree["models"] = [
            model for model in self.tree["models"] if model["is_complete"] or model["manifest_checksum"] in there
        ]
        for model in wanted.tree["models"]:
            if model["manifest_checksum"] not in here:
                self._add({key: value for key, value in model.items() if key not in ("is_complete", "sets")})
        self.tree["models"].sort(key=lambda model: model["step"])
        self._settle()

    @property
    def is_complete(self) -> bool:
        return self.tree["is_complete"]

    def waiting(self) -> list[tuple[dict[str, Any], list[int]]]:
        """Models that are not done, each with the numbers of its sets that are not."""
        return [
            (model, [number for number, each in enumerate(model["sets"]) if not each["is_complete"]])
            for model in self.tree["models"]
            if not model["is_complete"]
        ]

    @staticmethod
    def progress(entry: Mapping[str, Any]) -> tuple[Sums, tuple[int, int]]:
        """Sums of an unfinished set, and the (unit, window) that is next."""
        kept = entry.get("progress")
        if kept is None:
            return Sums(), (0, 0)
        return Sums.from_json(kept["sums"]), (kept["next_unit"], kept["next_window"])

    def keep_progress(self, model: dict[str, Any], number: int, sums: Sums, place: tuple[int, int]) -> None:
        model["sets"][number]["progress"] = {"next_unit": place[0], "next_window": place[1], "sums": sums.to_json()}

    def finish_set(self, model: dict[str, Any], number: int, result: Mapping[str, Any]) -> None:
        entry = model["sets"][number]
        entry.pop("progress", None)
        entry.update(result, is_complete=True)
        self._settle()

    def _settle(self) -> None:
        for model in self.tree["models"]:
            if not model["is_complete"] and all(each["is_complete"] for each in model["sets"]):
                model.update(summary(model["sets"]), is_complete=True)
        self.tree["is_complete"] = all(model["is_complete"] for model in self.tree["models"])

    def write(self, path: Path) -> None:
        """Replace the file as one act. Raises OutputError where the disk refuses; what was there is whole."""
        text = json.dumps(self.tree, indent=2, allow_nan=False, ensure_ascii=False)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, f"{text}\n".encode())


def tokens_folder(path: Path) -> Path:
    """Where the ids of texts lie that are scored into the results `path`."""
    return path.with_name(f"{path.name}{TOKENS}")


def read_results(path: Path) -> Results | None:
    """What a file holds, None where there is none. Raises OutputError for anything but results of an evaluation."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise OutputError(f"{path} is no file of results: it has more than {MAX_BYTES} bytes: choose another --out")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror}): choose another --out") from None
    except ValueError:
        tree = None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise OutputError(f"{path} holds no results of an evaluation: choose another --out, or move it away")
    if tree.get("version") != VERSION:
        raise OutputError(
            f"{path} is of version {tree.get('version')}, this megamoe writes {VERSION}: choose another --out"
        )
    return Results(tree)


def _s(name: str) -> str:
    return "" if name == "the sets" else "s"


def _first_difference(old: Any, new: Any, key: str = "") -> str:
    """ "key X there, Y here" for the first thing in which two trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            if old.get(name) != new.get(name):
                return _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            if one != other:
                return _first_difference(one, other, f"{key}[{number}]")
    if isinstance(old, list) and isinstance(new, list):
        return f"{len(old)} there, {len(new)} here"
    return f"{key or 'it'} {json.dumps(old)[:80]} there, {json.dumps(new)[:80]} here"
