"""Write launch_scripts/layouts: for each of the paper's models the layout that the search finds best, and its plan.

    python tools/write_layouts.py                     all of them, minutes
    python tools/write_layouts.py moe-15b dense-13b   these

Each model gets as many GPUs as the paper's run of it had, or the next power of two on which it fits with a twentieth of
the memory to spare: the working set is an estimate. After a change of
what plans assume, write them anew: `tests/unit/test_layout_presets.py` compares the plans with the files.
"""

import argparse
import sys
from pathlib import Path

from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.plan.cluster import load_cluster
from megamoe.plan.plan import make_plan
from megamoe.plan.quantities import Load
from megamoe.plan.report import text_report
from megamoe.plan.search import SearchResult, search
from megamoe.plan.search_report import overrides_of
from megamoe.progress import StatusLine

FOLDER = Path(__file__).parents[1] / "launch_scripts" / "layouts"
CLUSTER = "a100-80gb"
PAPER_GPUS = {
    "dense-125m": 32, "dense-355m": 64, "dense-1.3b": 256, "dense-2.7b": 128, "dense-6.7b": 128, "dense-13b": 256,
    "moe-15b": 64, "moe-52b": 128, "moe-207b": 256, "moe-1.1t": 256,
}  # fmt: skip
MOST_GPUS = 1024
USABLE = 0.95  # of the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(PAPER_GPUS), help="default: all")
    for name in parser.parse_args().models:
        write(name)


def write(name: str) -> None:
    """The layout and the plan of one model."""
    config, status = load_config(name), StatusLine(sys.stderr)
    num_gpus, cluster = PAPER_GPUS[name], load_cluster(CLUSTER)
    cluster = cluster.model_copy(update={"memory_bytes": int(USABLE * cluster.memory_bytes)})
    while True:
        found = search(config, cluster, num_gpus, Load(), progress=lambda text: show(status, name, text))
        if found.best or num_gpus >= MOST_GPUS:
            break
        num_gpus *= 2
    status.end(f"{name}: {num_gpus} GPUs, {found.num_fitting} of {found.num_tried} layouts fit")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.yaml"
    path.write_text(layout_file(name, num_gpus, found), encoding="utf-8")
    (FOLDER / f"{name}.plan.txt").write_text(plan_text(load_config(str(path)), num_gpus), encoding="utf-8")


def show(status: StatusLine, name: str, text: str) -> None:
    if status.is_due:
        status.show(f"{name}: {text}")


def layout_file(name: str, num_gpus: int, found: SearchResult) -> str:
    """A configuration file: the preset, and what the search decided."""
    sections: dict[str, list[str]] = {}
    for override in overrides_of(found.best[0].config):
        key, _, value = override.partition("=")
        section, _, setting = key.partition(".")
        sections.setdefault(section, []).append(f"  {setting}: {value}")
    lines = [
        f"# {name}: the fastest layout that fits {num_gpus} GPUs of cluster {CLUSTER} with a twentieth of their",
        "# memory to spare. The plan is in the file beside this one, and made anew by",
        f"#   megamoe plan launch_scripts/layouts/{name}.yaml --cluster {CLUSTER} --gpus {num_gpus}",
        "# Data and run folder are for you to give. Written by tools/write_layouts.py.",
        f"preset: {name}",
    ]
    for section, settings in sections.items():
        lines += [f"{section}:", *settings]
    return "\n".join(lines) + "\n"


def plan_text(config: Config, num_gpus: int) -> str:
    """What `megamoe plan` says of it, without advice and assumptions."""
    return text_report(make_plan(config, load_cluster(CLUSTER), num_gpus), (), with_assumptions=False)


if __name__ == "__main__":
    main()
