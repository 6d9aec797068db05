"""`megamoe report` and `megamoe status`: arguments and output. No torch.

Exit codes: 0 written or shown, 2 what is no run's folder, or an output that cannot be written.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megamoe.arguments import positive

FOLLOW_SECONDS = 2.0


def add_report_commands(commands: Any) -> None:
    """Add `report` and `status` to the subcommands of `megamoe`."""
    report = commands.add_parser(
        "report",
        help="draw runs: one page that needs nothing else, and PNGs",
        description="Draw the curves, loads, times and events of one run, or of several over each other.",
        epilog="examples:\n  megamoe report runs/first\n  megamoe report runs/first runs/second --output runs/compared",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.set_defaults(command=_report, parser=report)
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    report.add_argument("--output", type=Path, metavar="DIR", help="default: report/ in the first run's folder")
    report.add_argument(
        "--smoothing", type=positive, default=1, metavar="N",
        help="draw means of the last N lines over the lines themselves (default: %(default)s)",
    )  # fmt: skip
    report.add_argument("--no-png", action="store_true", help="write the page alone")
    status = commands.add_parser(
        "status",
        help="how a run is doing, in a few lines",
        description="Tell at a glance how a run is doing, from what it has written so far.",
        epilog="examples:\n  megamoe status runs/first\n  megamoe status runs/first --follow",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    status.set_defaults(command=_status, parser=status)
    status.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    status.add_argument("--follow", action="store_true", help="again and again until the run has ended, or Ctrl-C")
    status.add_argument("--json", action="store_true", help="print one JSON object (a line each with --follow)")


def _report(options: argparse.Namespace) -> int:
    from megamoe.report.images import has_matplotlib
    from megamoe.report.write import write_report

    with_images = not options.no_png and has_matplotlib()
    for path in write_report(options.runs, options.output, smoothing_lines=options.smoothing, with_images=with_images):
        print(path)
    if not with_images and not options.no_png:
        print("no PNGs: matplotlib draws them, pip install 'megamoe[report]'", file=sys.stderr)
    return 0


def _status(options: argparse.Namespace) -> int:
    from megamoe.report.facts import check_is_run
    from megamoe.report.status import read_glance, status_text, status_tree, terminal_width

    check_is_run(options.run)
    is_terminal = sys.stdout.isatty()
    colour = is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    num_rows = 0
    while True:
        glance = read_glance(options.run)
        if options.json:
            text = json.dumps(status_tree(glance), indent=None if options.follow else 2) + "\n"
        else:
            text = status_text(glance, terminal_width(), colour=colour, unicode=unicode)
            if not unicode:
                text = text.encode("ascii", errors="replace").decode()
        if num_rows and is_terminal and not options.json:
            print(f"\x1b[{num_rows}A\x1b[J", end="")  # over what was shown before
        print(text, end="", flush=True)
        num_rows = text.count("\n")
        if not options.follow or glance.facts.state not in ("running", "stale", "requeued", "not started"):
            return 0
        time.sleep(FOLLOW_SECONDS)
