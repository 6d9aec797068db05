"""Which texts an evaluation scores and how it reads them: the schema of SETS.yaml. No torch.

    sets:
      - {name: valid, path: data/valid, domain: in_domain}
      - {name: wiki, path: wiki/*.jsonl.zst, domain: out_of_domain, reading: documents, max_documents: 1000}
"""

import errno
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megamoe.config.keys import InWords
from megamoe.config.loading import checked_settings, read_settings
from megamoe.config.schema import PositiveInt, Section
from megamoe.data.indexed import bin_path, idx_path
from megamoe.data.preprocess import Rules
from megamoe.data.readers import Source, TxtDocuments, describe_file
from megamoe.errors import ConfigError, DataError

Format = Literal["indexed", "jsonl", "text"]
Reading = Literal["blocks", "documents"]
Word = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100), InWords("of letters, digits and ._- (at most 100)")
]
_MOST_SHOWN = 100  # characters of a path: a text in its place may be long


class EvaluationSet(Section):
    """One set of texts. What is null is as for all sets of the file, and there as the command or the model says."""

    name: Word
    path: str  # indexed: of the .bin/.idx pair without the ending; else a file or a glob, plain, .gz or .zst
    domain: Word = "unnamed"  # results are also told by domain: in_domain, out_of_domain, or any word
    format: Format | None = None  # null: indexed where path.idx exists, jsonl where the path says so, else text
    reading: Reading | None = None
    context_tokens: PositiveInt | None = None
    stride_tokens: PositiveInt | None = None
    max_documents: PositiveInt | None = None  # the first ones
    max_tokens: PositiveInt | None = None  # documents: whole ones until so many tokens; blocks: those that fit
    json_key: str = "text"  # jsonl: where a line's text is
    text_documents: TxtDocuments = "blank_line"  # text: documents end at blank lines, or a file is one document
    rules: Rules = "document"  # how text becomes ids: as `megamoe preprocess` has it, for training alike


class EvaluationSets(Section):
    """A whole SETS.yaml."""

    sets: Annotated[tuple[EvaluationSet, ...], Field(min_length=1)]
    reading: Reading | None = None  # null: blocks
    context_tokens: PositiveInt | None = None  # null: model.seq_length
    stride_tokens: PositiveInt | None = None  # of documents longer than the context; null: half the context


@dataclass(frozen=True)
class TextSet:
    """A set with nothing left open. JSON by `describe`."""

    settings: EvaluationSet
    files: tuple[dict[str, Any], ...]  # what each is known by: see `megamoe.data.readers.describe_file`

    def describe(self) -> dict[str, Any]:
        """What must be the same for an evaluation to go on: the settings, and the files by content."""
        return self.settings.model_dump(mode="json") | {"files": list(self.files)}

    @classmethod
    def from_description(cls, tree: dict[str, Any]) -> "TextSet":
        settings = {key: value for key, value in tree.items() if key != "files"}
        return cls(EvaluationSet.model_validate(settings), tuple(tree["files"]))

    def sources(self) -> tuple[Source, ...]:
        """Of a set that is text: its files, for `megamoe.data.readers.read_chunks`."""
        return tuple(_source(path, self.settings.format or "text") for path in _paths(self.settings))


def read_sets(path: Path) -> EvaluationSets:
    """The sets of a YAML file. Raises ConfigError, one sentence, for an unknown key, a wrong value, a name twice."""
    found = checked_settings(EvaluationSets, read_settings(path), str(path))
    names = [each.name for each in found.sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'two sets of {path} are named "{name}": give each a name of its own')
    return found


def single_text(path: Path) -> EvaluationSets:
    """One file, or one indexed dataset, as a set that is named after it."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[:100] or "text"
    return EvaluationSets(sets=(EvaluationSet(name=name, path=str(path)),))


def settled_sets(
    found: EvaluationSets, *, seq_length: int, reading: Reading | None = None, context_tokens: int | None = None,
    stride_tokens: int | None = None, needs_files: bool = True,
) -> tuple[TextSet, ...]:  # fmt: skip
    """The sets with every choice made, files found and known by their content, or left out where none is needed.

    What is given here is the command's, and stands where neither a set nor the file says otherwise. Raises ConfigError
    for a context longer than the model's sequences, for a stride longer than the context, and for one that no set asks
    for; DataError for files that are not there.
    """
    _check_stride_is_used(found, reading, stride_tokens)
    settled = []
    for each in found.sets:
        chosen = each.reading or found.reading or reading or "blocks"
        context = each.context_tokens or found.context_tokens or context_tokens or seq_length
        if context > seq_length:
            raise ConfigError(
                f"set {each.name}: context_tokens {context} is longer than the model's sequences: use at most "
                f"{seq_length}"
            )
        stride = None
        if chosen == "documents":
            stride = each.stride_tokens or found.stride_tokens or stride_tokens or max(1, context // 2)
            if stride > context:
                raise ConfigError(
                    f"set {each.name}: stride_tokens {stride} is longer than its context of {context} tokens, so that "
                    f"tokens would be left out: use at most {context}"
                )
        elif each.stride_tokens is not None:
            raise ConfigError(
                f"set {each.name}: stride_tokens is for reading documents, but it is read in blocks: leave it out, or "
                "set reading: documents"
            )
        update = {"format": each.format or _format(each.path), "reading": chosen}
        update |= {"context_tokens": context, "stride_tokens": stride}
        settings = each.model_copy(update=update)
        settled.append(TextSet(settings, _files(settings) if needs_files else ()))
    return tuple(settled)


def _check_stride_is_used(found: EvaluationSets, reading: Reading | None, stride_tokens: int | None) -> None:
    """Of a file, or of the command. That of a set is looked at with the set."""
    if any((each.reading or found.reading or reading) == "documents" for each in found.sets):
        return
    for given, name, advice in (
        (found.stride_tokens, "stride_tokens", "set reading: documents"),
        (stride_tokens, "--stride", "add --reading documents"),
    ):
        if given is not None:
            raise ConfigError(
                f"{name} is for reading documents, but all sets are read in blocks: leave it out, or {advice}"
            )


def _format(path: str) -> Format:
    if os.path.exists(idx_path(path)):  # unlike Path's, it finds no path too long to be looked for
        return "indexed"
    return "jsonl" if ".jsonl" in Path(path).name else "text"


def _files(settings: EvaluationSet) -> tuple[dict[str, Any], ...]:
    try:
        if settings.format == "indexed":
            return tuple(_describe(str(path)) for path in (idx_path(settings.path), bin_path(settings.path)))
        return tuple(_describe(path) for path in _paths(settings))
    except DataError as error:
        raise DataError(f"set {settings.name}: {error}") from None


def _describe(path: str) -> dict[str, Any]:
    try:
        status = Path(path).stat()
    except OSError as error:
        raise DataError(f"cannot open {path} ({error.strerror})") from None
    return describe_file(path, status.st_size, status.st_mtime_ns)


def _paths(settings: EvaluationSet) -> Sequence[str]:
    given = settings.path
    paths = [given] if os.path.exists(given) else sorted(glob.glob(given, recursive=True))
    if not paths:
        shown = given if len(given) <= _MOST_SHOWN else f"{given[:_MOST_SHOWN]}…"
        raise DataError(
            f"{_why_not_found(given)} {shown}: give a text file, a .jsonl file, a glob, or the path of a .bin/.idx "
            "pair without the ending"
        )
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"{path} is no file: name its files, as in {path.rstrip('/')}/*.txt")
    return paths


def _why_not_found(path: str) -> str:
    """The beginning of a sentence that ends with the path."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.ENAMETOOLONG):
            return f"cannot look for a file ({error.strerror}) at"
    except ValueError:  # a character that no path has
        pass
    return "no file matches"


def _source(path: str, format_: Format) -> Source:
    status = Path(path).stat()
    compression: Literal["", "gz", "zst"] = "gz" if path.endswith(".gz") else "zst" if path.endswith(".zst") else ""
    kind: Literal["txt", "jsonl"] = "jsonl" if format_ == "jsonl" else "txt"
    return Source(path, kind, compression, status.st_size, status.st_mtime_ns)
