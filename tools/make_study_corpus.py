#!/usr/bin/env python3
"""Build the texts of launch_scripts/studies/laptop.yaml from Debian's documentation packages.

    train.jsonl, in_domain.jsonl    technical documentation; of every 40 documents one is held out
    essays.jsonl                    the essays of the package anarchism: prose on politics and history, never trained on

The packages are downloaded by apt-get and unpacked by dpkg-deb beside the output; nothing is installed. The same
packages give the same bytes. Which text is held out follows from its own words, so that another version of a package
moves few documents.
"""

import argparse
import gzip
import hashlib
import html.parser
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# The first of a row that can be had: names of packages hold versions.
TECHNICAL = (
    ("linux-doc-6.1", "linux-doc-6.12"), ("python3.11-doc", "python3.13-doc"),
    ("postgresql-doc-15", "postgresql-doc-17"), ("git-doc",), ("debian-handbook",), ("debian-reference-en",),
    ("developers-reference",),
)  # fmt: skip
ESSAYS = (("anarchism",),)
HELD_OUT_OF, HELD_OUT_BYTES, ESSAY_BYTES = 40, 1_500_000, 1_500_000
DOCUMENT_CHARACTERS = 8_000  # long files are cut into documents at the next end of a paragraph
LEAST_PARAGRAPH, LEAST_DOCUMENT = 60, 300  # characters
LETTER_SHARE = 0.8  # of a paragraph's characters: less is a table, a listing or a formula
COMMON_WORDS = frozenset(
    ("a", "and", "are", "as", "at", "be", "by", "can", "from", "has", "have", "if", "in", "is", "it", "not", "of", "on",
     "or", "that", "the", "this", "to", "was", "which", "will", "with", "you")
)  # fmt: skip
COMMON_SHARE, LEAST_WORDS = 0.15, 12  # English has so many of them; shorter paragraphs are not judged
TRANSLATION = re.compile(r"/(?:translations?|[a-z]{2}[-_][A-Z]{2})/")
SKIPPED_TAGS = frozenset({"button", "form", "head", "nav", "pre", "script", "style", "svg", "table"})
SKIPPED_CLASSES = frozenset({"navfooter", "navheader", "related", "sphinxsidebar"})
BLOCK_TAGS = frozenset({"article", "br", "dd", "div", "dt", "h1", "h2", "h3", "h4", "li", "p", "section"})


class ProseOfHtml(html.parser.HTMLParser):
    """The running text of a page: no scripts, navigation, listings or tables. Blocks end in empty lines."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipping: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._skipping:
            if tag == self._skipping[-1]:
                self._skipping.append(tag)
        elif tag in SKIPPED_TAGS or dict(attributes).get("class") in SKIPPED_CLASSES:
            self._skipping.append(tag)
        elif tag in BLOCK_TAGS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self._skipping and tag == self._skipping[-1]:
            self._skipping.pop()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data)


def prose_of_rst(text: str) -> str:
    """Directives with what hangs on them, literal blocks and inline marks are taken out."""
    text = re.sub(r"(?m)^\.\. .*(?:\n[ \t]+.*|\n(?=\n[ \t]))*", "", text)
    text = re.sub(r"::[ \t]*\n((?:[ \t]+.*\n|\n)+)", "\n\n", text)
    text = re.sub(r":[\w:+-]+:`~?!?([^`<]*)(?:<[^>]*>)?`", r"\1", text)
    return re.sub(r"`+|\*\*?", "", text)


def is_english_prose(paragraph: str) -> bool:
    if len(paragraph) < LEAST_PARAGRAPH or not re.search(r"[.!?:;]", paragraph):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    foreign = sum(character > "\u024f" for character in paragraph)
    if letters < LETTER_SHARE * len(paragraph) or foreign > 0.02 * len(paragraph):
        return False
    words = paragraph.lower().split()
    return len(words) < LEAST_WORDS or sum(word in COMMON_WORDS for word in words) >= COMMON_SHARE * len(words)


def fetch(alternatives: tuple[str, ...], folder: Path) -> Path:
    """The unpacked tree of the first package of a row that apt-get finds."""
    for name in alternatives:
        root = folder / name
        if (folder / f"{name}.done").exists():
            return root
        if subprocess.run(["apt-get", "-q", "download", name], cwd=folder, capture_output=True, check=False).returncode:
            continue
        for package in sorted(folder.glob(f"{name}_*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        (folder / f"{name}.done").touch()
        return root
    sys.exit(f"error: apt-get finds none of {', '.join(alternatives)}: run apt-get update, on Debian 12 or 13")


def texts_of(root: Path) -> Iterator[str]:
    """The text of every page of a package, in the order of their names."""
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        name = path.name.removesuffix(".gz")
        if TRANSLATION.search(f"/{path.relative_to(root)}") or "changelog" in name or "copyright" in name:
            continue
        if not name.endswith((".html", ".xhtml", ".rst", ".rst.txt")):
            continue
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", errors="replace")
        if "html" in name:
            reader = ProseOfHtml()
            reader.feed(text)
            yield "".join(reader.parts)
        else:
            yield prose_of_rst(text)


def documents_of(rows: tuple[tuple[str, ...], ...], folder: Path, seen: set[bytes]) -> Iterator[str]:
    """Documents of new paragraphs: what stands in several pages is taken once."""
    for root in (fetch(alternatives, folder) for alternatives in rows):
        for text in texts_of(root):
            held: list[str] = []
            for raw in [*re.split(r"\n\s*\n", text), None]:
                paragraph = " ".join(raw.split()) if raw is not None else ""
                key = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
                if raw is not None and key not in seen and is_english_prose(paragraph):
                    seen.add(key)
                    held.append(paragraph)
                if raw is None or sum(map(len, held)) > DOCUMENT_CHARACTERS:
                    if sum(map(len, held)) >= LEAST_DOCUMENT:
                        yield "\n".join(held)
                    held = []


def write(path: Path, documents: list[str]) -> None:
    temporary = path.with_suffix(".writing")
    with open(temporary, "w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path}: {len(documents)} documents, {size / 1e6:.1f} MB, sha256 {digest[:16]}")


def order_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def first_bytes(documents: list[str], limit_bytes: int) -> list[str]:
    """Documents in an order that follows from their words, until they hold so many bytes."""
    chosen, size = [], 0
    for text in sorted(documents, key=order_of):
        size += len(text.encode())
        if size > limit_bytes:
            break
        chosen.append(text)
    return chosen


def main() -> int:
    """Write the texts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study_corpus"), help="a folder (%(default)s)")
    output: Path = parser.parse_args().output
    packages = output / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    essays = list(documents_of(ESSAYS, packages, seen))
    technical = list(documents_of(TECHNICAL, packages, seen))
    is_held_out = [order_of(text) % HELD_OUT_OF == 0 for text in technical]
    write(output / "train.jsonl", [text for text, held in zip(technical, is_held_out, strict=True) if not held])
    held_out = [text for text, held in zip(technical, is_held_out, strict=True) if held]
    write(output / "in_domain.jsonl", first_bytes(held_out, HELD_OUT_BYTES))
    write(output / "essays.jsonl", first_bytes(essays, ESSAY_BYTES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
