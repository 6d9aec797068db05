"""What the pages say: commands run, settings exist, links lead somewhere.

A block fenced as ```bash is a promise: the blocks of a page, one after another, are run in a clean clone of the
repository. A block fenced as ```sh is only shown, because it needs other machines, minutes, or files of the reader's;
its `megamoe train` and `megamoe show` commands are checked as far as the configuration goes.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamoe.cli import _parse
from megamoe.config.loading import load_config
from megamoe.config.validation import validate, validate_for_training
from tests.journeys.clone import ROOT, clone

PAGES = sorted(path for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if path.exists())
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SCRIPT = re.compile(r"\b(?:tools|launch_scripts|tests)/[\w/.*-]*\w")
PAGE_SECONDS = 240  # on a busy machine; all pages together take less than 90 s on two idle cores
MY_RUN = re.compile(r"^cat > my_run\.yaml <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
ANY_RUN = "preset: laptop-moe\ndata: {train: [{path: data/my_text}]}\nrun: {global_batch_size: 64}\n"


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def page_id(page: Path) -> str:
    return page.name


def shown_commands(page: Path) -> list[str]:
    """Every line of a page's ```sh blocks, continued lines joined, comments cut off."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.slow
@pytest.mark.timeout(PAGE_SECONDS + 60)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=page_id)
def test_commands_of_a_page_run(page, tmp_path):
    repository = tmp_path / "megamoe"
    clone(repository)
    script = tmp_path / "page.sh"
    script.write_text("set -euo pipefail\n" + "\n".join(blocks(page, "bash")), encoding="utf-8")
    environment = dict(os.environ) | {
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]]),
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(repository),  # the clone's megamoe, also for the installed command
        "OMP_NUM_THREADS": "1",  # threads that wait for a core another test has are slower than none
    }
    started = time.monotonic()
    done = subprocess.run(
        ["bash", script], cwd=repository, env=environment, text=True, timeout=PAGE_SECONDS, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(f"{page.name}: {time.monotonic() - started:.0f} s\n{done.stdout}")
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_shown_commands_have_settings_that_fit(page, tmp_path, monkeypatch):
    own = MY_RUN.search(page.read_text(encoding="utf-8"))
    (tmp_path / "my_run.yaml").write_text(own[1] if own else ANY_RUN)
    monkeypatch.chdir(tmp_path)
    for line in shown_commands(page):
        words = shlex.split(line, comments=True)
        if "launch_scripts/local_cpu.sh" in words:
            number, *rest = words[words.index("launch_scripts/local_cpu.sh") + 1 :]
            words = ["megamoe", "train", *rest, "--local-ranks", number]
        if "megamoe" not in words:
            continue
        options = _parse(words[words.index("megamoe") + 1 :])
        if getattr(options, "source", None) is None:
            continue
        shipped = ROOT / options.source
        config = load_config(str(shipped) if shipped.exists() else options.source, options.overrides)
        ranks = getattr(options, "local_ranks", None) or ranks_of(words)
        check = validate_for_training if "train" in words else validate
        check(config, ranks)


def ranks_of(words: list[str]) -> int | None:
    """The world that torchrun or srun is told to start, if the command says."""
    number = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
    per_node = number.get("--nproc-per-node") or number.get("--ntasks-per-node")
    return int(per_node) * int(number.get("--nodes", 1)) if per_node else None


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_named_scripts_are_there(page):
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):  # of the web: no business of a test
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    broken += [name for name in SCRIPT.findall(text) if not any(ROOT.glob(name))]
    assert not broken, f"{page.name} names what is not there: {broken}"


def anchors(page: Path) -> set[str]:
    """Headings as GitHub links to them."""
    titles = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_keys_that_pages_name_exist():
    """`section.key` in code style, with or without a value, is a key of the configuration."""
    sections = type(load_config("laptop-moe")).model_fields
    wrong = []
    for page in PAGES:
        for section, key in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", page.read_text(encoding="utf-8")):
            if section in sections and key not in sections[section].annotation.model_fields:
                wrong.append(f"{page.name}: {section}.{key}")
    assert not wrong, wrong
