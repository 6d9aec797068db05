#!/usr/bin/env python3
"""Rebuild the text of launch_scripts/quickstart_corpus from two Debian packages (apt-get and dpkg-deb are needed).

One chapter is one document: paragraphs of some verses, one per line; a blank line ends the chapter.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("bible-kjv-text", "bible-kjv")
WHOLE_TEXT = "gen1:1-rev22:21"
PARAGRAPH_CHARACTERS = 400  # a paragraph is closed by the first verse that ends a sentence beyond this length
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "launch_scripts" / "quickstart_corpus" / "king_james_bible.txt"
VERSE = re.compile(r"(\S+?)(\d+):(\d+) (.*)")


def print_verses() -> str:
    """All verses as the packaged reader prints them: "Ge1:1 In the beginning ...", one per line."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "-q", "download", *PACKAGES], cwd=folder, check=True)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, f"{folder}/root"], check=True)
        # The reader looks for its data in the working directory.
        command = [f"{folder}/root/usr/bin/bible", "-f", WHOLE_TEXT]
        return subprocess.run(command, cwd=f"{folder}/root/usr/lib", check=True, capture_output=True, text=True).stdout


def chapters(verses: str) -> list[str]:
    """Chapters as blocks of paragraphs, one paragraph per line."""
    blocks: list[list[str]] = []
    current, paragraph = "", ""
    for line in verses.splitlines():
        match = VERSE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        chapter, text = match[1] + match[2], " ".join(match[4].split())
        if chapter != current:
            if paragraph:
                blocks[-1].append(paragraph)
            blocks.append([])
            current, paragraph = chapter, ""
        paragraph = f"{paragraph} {text}".strip()
        if len(paragraph) >= PARAGRAPH_CHARACTERS and paragraph[-1] in ".?!":
            blocks[-1].append(paragraph)
            paragraph = ""
    if paragraph:
        blocks[-1].append(paragraph)
    return ["\n".join(block) for block in blocks]


def main() -> int:
    """Write the corpus; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="(%(default)s)")
    output: Path = parser.parse_args().output
    documents = chapters(print_verses())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    print(f"{output}: {len(documents)} chapters, {output.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
