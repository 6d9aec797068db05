#!/usr/bin/env python3
"""Make two small tasks for `megamoe prime` from a plain text, by default that of the quickstart.

continuation: which of four endings goes on a sentence; the others end other sentences, and have as many words.
cloze: which of four words stands in a gap in a sentence; scored by what follows the gap.

    python tools/make_priming_tasks.py --output runs/priming
    megamoe prime runs/quickstart --task runs/priming/continuation.yaml --task runs/priming/cloze.yaml --shots 0,2

Examples are of the last fiftieth of the documents, which the quickstart validates on; shots are of the others. The same
text and seed give the same files.
"""

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

CORPUS = Path(__file__).resolve().parents[1] / "launch_scripts" / "quickstart_corpus" / "king_james_bible.txt"
SENTENCE = re.compile(r"[A-Z][^.?!]*[.?!]")
FEWEST_WORDS, MOST_WORDS = 12, 30
NUM_CHOICES = 4
TASKS = {
    "continuation": 'text: "{begin} {choice}"\nchoices: endings\nlabel: {field: label}\n',
    "cloze": 'text: "{sentence|fill:_}"\nchoices: words\nlabel: {field: label}\nscore: sum_of_suffix\n',
}


def sentences(documents: list[str]) -> list[str]:
    """Whole sentences of a useful length, each once, in the order of the text."""
    found: dict[str, None] = {}
    for document in documents:
        for line in document.splitlines():
            for match in SENTENCE.finditer(line):
                text = " ".join(match[0].split())
                if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS and "_" not in text:
                    found[text] = None
    return list(found)


def continuations(texts: list[str], generator: random.Random) -> list[dict[str, object]]:
    """A sentence cut in the middle, and four endings of it of one number of words."""
    cut = [(words[: len(words) // 2], words[len(words) // 2 :]) for words in (text.split() for text in texts)]
    alike: dict[int, list[str]] = defaultdict(list)
    for _, ending in cut:
        alike[len(ending)].append(" ".join(ending))
    made = []
    for begin, words in cut:
        right = " ".join(words)
        others = sorted(set(alike[len(words)]) - {right})
        if len(others) >= NUM_CHOICES - 1:
            endings, label = _mixed(right, generator.sample(others, NUM_CHOICES - 1), generator)
            made.append({"begin": " ".join(begin), "endings": endings, "label": label})
    return made


def clozes(texts: list[str], generator: random.Random) -> list[dict[str, object]]:
    """A sentence with a gap for a word of four letters or more, behind its first third, and four words for it."""
    words = sorted({word for text in texts for word in re.findall(r"\b[a-z]{4,}\b", text)})
    made = []
    for text in texts:
        parts = text.split()
        places = [i for i in range(len(parts) // 3, len(parts) - 2) if re.fullmatch(r"[a-z]{4,}", parts[i])]
        if places:
            place = generator.choice(places)
            others = generator.sample([word for word in words if word != parts[place]], NUM_CHOICES - 1)
            choices, label = _mixed(parts[place], others, generator)
            gap = " ".join([*parts[:place], "_", *parts[place + 1 :]])
            made.append({"sentence": gap, "words": choices, "label": label})
    return made


def _mixed(right: str, wrong: list[str], generator: random.Random) -> tuple[list[str], int]:
    """All in random order, and where the right one is."""
    label = generator.randrange(len(wrong) + 1)
    return [*wrong[:label], right, *wrong[label:]], label


def main() -> int:
    """Write the tasks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="text with blank lines between documents")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--examples", type=int, default=200, help="of each task (default: %(default)s)")
    parser.add_argument("--pool", type=int, default=500, help="examples to draw shots from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    documents = options.corpus.read_text(encoding="utf-8").split("\n\n")
    border = len(documents) - max(1, len(documents) // 50)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, make in (("continuation", continuations), ("cloze", clozes)):
        for part, some, most in (
            ("train", documents[:border], options.pool),
            ("test", documents[border:], options.examples),
        ):
            generator = random.Random(f"{options.seed}/{name}/{part}")
            made = make(sentences(some), generator)
            made = generator.sample(made, min(most, len(made)))
            path = options.output / f"{name}_{part}.jsonl"
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made), encoding="utf-8")
            print(f"{path}: {len(made)} examples")
        head = f"name: {name}\ndata: {{file: {name}_test.jsonl}}\ntrain: {{file: {name}_train.jsonl}}\n"
        (options.output / f"{name}.yaml").write_text(head + TASKS[name], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
