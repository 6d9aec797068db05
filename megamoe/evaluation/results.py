"""results.json: what is found so far, replaced as one act, and gone on from. No torch. Keys: docs/evaluate.md."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.outputs import writing
from megamoe.errors import ConfigError, OutputError
from megamoe.evaluation.sums import Sums, set_result, summary
from megamoe.evaluation.table import table

FORMAT, VERSION = "megamoe-evaluation", 1
MAX_BYTES = 1 << 28
TOKENS = ".tokens"  # beside the file: text as ids, until all is done
# What must be the same for an evaluation to go on to the bit, in words.
SAME = {
    "sets": "the sets", "capacity": "the capacity of experts", "layout": "the layout", "precision": "the precision",
    "device": "the device", "tokenizer": "the tokenizer",
}  # fmt: skip
_MODEL_KEYS = ("checkpoint", "folder", "manifest_checksum", "step", "is_complete", "sets")


@dataclass
class Results:
    """The whole file as a tree. Models and their sets stand in the order in which they are scored.

    notes: what the user should hear of what `go_on` has left out.
    """

    tree: dict[str, Any]
    notes: list[str] = field(default_factory=list)

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

        keeps_others: checkpoints of the run that `wanted` is of stay where they are not wanted; otherwise, as those of
        another run, they make it something else.
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
        of_run = self._those_of_the_run(strangers, wanted) if keeps_others else []
        for model in strangers:
            if model not in of_run:
                raise ConfigError(
                    f"{path} holds results of another model, {model['checkpoint']} at step {model['step']}: add "
                    "--overwrite to start anew, or choose another --out"
                )
        self._leave_out_outdated(strangers, wanted, path)
        # Of what is not there any more, or not asked for, only what is whole is worth keeping.
        self.tree["models"] = [
            model for model in self.tree["models"] if model["is_complete"] or model["manifest_checksum"] in there
        ]
        for model in wanted.tree["models"]:
            if model["manifest_checksum"] not in here:
                self._add({key: value for key, value in model.items() if key not in ("is_complete", "sets")})
        self.tree["models"].sort(key=lambda model: model["step"])
        self._settle()

    def _those_of_the_run(self, strangers: Sequence[dict[str, Any]], wanted: "Results") -> list[dict[str, Any]]:
        """Those whose checkpoint lies, or lay, beside the wanted ones.

        A run that was moved, or is named from elsewhere, is known by a checkpoint that is wanted and here already: all
        of its run lay beside that, where nothing lies now. (Else it is a copy, which has gone its own way.)
        """
        there = {model["manifest_checksum"] for model in wanted.tree["models"]}
        places = {_folder_of(model).resolve() for model in wanted.tree["models"]}
        former = {_folder_of(model) for model in self.tree["models"] if model["manifest_checksum"] in there}
        former = {folder for folder in former if not folder.exists()}
        found = []
        for model in strangers:
            if _folder_of(model).resolve() not in places:
                if _folder_of(model) not in former:
                    continue
                now = _folder_of(wanted.tree["models"][0]) / Path(model["checkpoint"]).name
                model.update(checkpoint=str(now), folder=str(now))
            found.append(model)
        return found

    def _leave_out_outdated(self, strangers: Sequence[Mapping[str, Any]], wanted: "Results", path: Path) -> None:
        """A step that was saved anew has other weights, and so have all after it: the run went another way there."""
        steps = {model["step"] for model in wanted.tree["models"]} & {model["step"] for model in strangers}
        if not steps:
            return
        gone = [model for model in strangers if model["step"] >= min(steps)]
        self.tree["models"] = [model for model in self.tree["models"] if model not in gone]
        if any(model["is_complete"] for model in gone):
            told = ", ".join(str(model["step"]) for model in gone if model["is_complete"])
            self.notes.append(
                f"{path} held results of step{'s' if ',' in told else ''} {told} from before the run saved step "
                f"{min(steps)} anew: they are left out, for their weights are not the run's any more"
            )

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
    try:
        _touch(tree)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise OutputError(
            f"{path} is damaged: not all that results of an evaluation hold is there: choose another --out, or add "
            "--overwrite to start anew"
        ) from None
    return Results(tree)


def _touch(tree: Mapping[str, Any]) -> None:
    """Whatever is read of results later. Fails with any of Python's own errors where something is not as written."""
    table(tree)
    for model in tree["models"]:
        if not set(_MODEL_KEYS) <= model.keys() or type(model["step"]) is not int:
            raise LookupError
        for each, text in zip(model["sets"], tree["sets"], strict=True):
            if (each["name"], each["domain"]) != (text["name"], text["domain"]):
                raise LookupError
            if not each["is_complete"]:
                Results.progress(each)
            elif not set_result(Sums(num_tokens=1), num_documents=1, num_text_bytes=1).keys() <= each.keys():
                raise LookupError
        if model["is_complete"]:
            summary(model["sets"])


def _folder_of(model: Mapping[str, Any]) -> Path:
    return Path(model["checkpoint"]).parent


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
