"""Lines of a task's data files, in the formats in which they are published."""

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.data.json_text import check_texts, json_object
from megamoe.errors import DataError
from megamoe.priming.tasks import DataFile


@dataclass(frozen=True)
class Line:
    """One example as the file has it; `where` names file and line."""

    where: str
    fields: dict[str, Any]


def read_lines(source: DataFile, folder: Path) -> list[Line]:
    """All examples of a file. Raises DataError: it leaves the folder, cannot be read, or a line is not as it should be.
    """
    path = inside(folder, source.file)
    text = _text(path)
    reader = {"jsonl": _jsonl, "csv": _csv, "record": _record}[source.format]
    lines = list(reader(text, path))
    if not lines:
        raise DataError(f"{path} holds no examples")
    if source.labels is None:
        return lines
    labels_path = inside(folder, source.labels)
    labels = [line.strip() for line in _text(labels_path).splitlines() if line.strip()]
    if len(labels) != len(lines):
        raise DataError(f"{labels_path} has {len(labels)} labels for the {len(lines)} examples of {path}")
    return [Line(line.where, line.fields | {"label": label}) for line, label in zip(lines, labels, strict=True)]


def digest(source: DataFile, folder: Path) -> str:
    """Of the content of its files: the same bytes give the same examples."""
    found = hashlib.sha256()
    for name in filter(None, (source.file, source.labels)):
        found.update(hashlib.sha256(_bytes(inside(folder, name))).digest())
    return found.hexdigest()


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a task names. Raises DataError where it leads out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        rule = "a task names files of its own folder only, and no links out of it"
        raise DataError(f"{name} leads out of {folder}: {rule}")
    return path


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}") from None


def _jsonl(text: str, path: Path) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            fields = json_object(where, line)
            check_texts(where, fields)
            yield Line(where, fields)


def _csv(text: str, path: Path) -> Iterator[Line]:
    rows = csv.reader(io.StringIO(text, newline=""))
    names: list[str] | None = None
    for row in _csv_rows(rows, path):
        where = f"{path}, line {rows.line_num}"
        if names is None:
            names = row
        elif row:
            if len(row) != len(names):
                raise DataError(f"{where}: {len(row)} columns, the header has {len(names)}")
            yield Line(where, dict(zip(names, row, strict=True)))


def _csv_rows(rows: Any, path: Path) -> Iterator[list[str]]:
    """Of a reader. A quote that is left open takes in what follows, until the library's limit to a field's length."""
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {begin}: not as CSV is ({error}): is a quote left open?") from None
        yield row


def _record(text: str, path: Path) -> Iterator[Line]:
    """Entities as often as they differ, in the order of the passage; ends of spans are inclusive in both forms."""
    for line in _jsonl(text, path):
        articles = line.fields["data"] if isinstance(line.fields.get("data"), list) else [line.fields]
        try:
            for article in articles:
                passage = article["passage"]["text"]
                spans = sorted((each["start"], each["end"]) for each in article["passage"]["entities"])
                entities = list(dict.fromkeys(passage[start : end + 1] for start, end in spans))
                for query in article["qas"]:
                    answers = list(dict.fromkeys(each["text"] for each in query["answers"]))
                    fields = {"passage": passage, "query": query["query"], "entities": entities, "answers": answers}
                    yield Line(f"{line.where}, query {query.get('id', query.get('idx'))}", fields)
        except (KeyError, TypeError) as error:
            raise DataError(f"{line.where}: not as ReCoRD's files are ({type(error).__name__}: {error})") from None
