"""`megamoe study`: arguments, output, exit codes. No torch.

Exit codes: 0 all is trained, evaluated and reported (or planned, or submitted), 1 some run failed or is not there yet,
2 refused, 75 it was asked to stop.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.arguments import positive
from megamoe.errors import ConfigError

if TYPE_CHECKING:
    from megamoe.study.ladder import StudyRun
    from megamoe.study.schema import StudySettings

_EPILOG = """examples:
  megamoe study launch_scripts/studies/laptop.yaml --plan --cluster cpu
  megamoe study launch_scripts/studies/laptop.yaml
  megamoe study large.yaml --submit '--nodes 4 --gpus-per-node 8 --time 24:00:00'
  megamoe study large.yaml --no-train           evaluate and report what the jobs have trained"""


def add_study_commands(commands: Any) -> None:
    """Add `study` to the subcommands of `megamoe`."""
    parser = commands.add_parser(
        "study",
        help="train a ladder of dense models and one of mixtures, and compare what they cost",
        description="Train models of several families under equal rules, evaluate their checkpoints, and tell how much "
        "less compute one family needs for the same loss. Run again, it goes on. See docs/study.md.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_study, parser=parser)
    parser.add_argument("study", metavar="STUDY", type=Path, help="a YAML file: see docs/study.md")
    parser.add_argument("--out", metavar="DIR", help="the study's folder, in place of `dir` in the file")
    act = parser.add_mutually_exclusive_group()
    act.add_argument("--plan", action="store_true", help="tell what it will cost, and train nothing")
    act.add_argument("--report-only", action="store_true", help="make the report anew from what is evaluated")
    act.add_argument("--no-train", action="store_true", help="evaluate and report what is trained")
    act.add_argument(
        "--submit", metavar="OPTIONS", help="train on SLURM: an array by `megamoe submit` with these options, quoted"
    )
    parser.add_argument("--only", metavar="NAME", action="append", help="train this model or run; may be repeated")
    parser.add_argument("--local-ranks", type=positive, metavar="N", help="ranks of this machine for each run")
    parser.add_argument("--cluster", metavar="NAME|FILE", help="with --plan: whose time is told; cpu: this machine")
    parser.add_argument("--gpus", type=positive, metavar="N", help="with --plan: for one run (default: 1)")
    parser.add_argument("--json", action="store_true", help="with --plan: print one JSON object")


def _study(options: argparse.Namespace) -> int:
    from megamoe.study.ladder import check_trained_alike, study_runs
    from megamoe.study.schema import read_study
    from megamoe.study.scoring import check_evaluation

    changes = {"dir": options.out, "local_ranks": options.local_ranks}
    study = read_study(options.study).model_copy(update={key: value for key, value in changes.items() if value})
    runs = study_runs(study, str(options.study))
    chosen = _chosen(runs, options.only)
    if (options.cluster or options.json or options.gpus) and not options.plan:
        options.parser.error("--cluster, --gpus and --json go with --plan")
    if options.only and (options.plan or options.report_only or options.no_train):
        options.parser.error("--only says what is trained: it goes with none of --plan, --report-only, --no-train")
    if options.plan:
        return _plan(options, study, runs)
    for run in runs:
        check_trained_alike(run)
    check_evaluation(runs, study, study.folder, report_only=options.report_only)
    if options.submit is not None:
        return _submit(_words(options.submit), study, chosen)
    return _carry_out(options, study, runs, chosen)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--submit is {text!r}: {error}; write options as in a shell") from None


def _chosen(runs: "tuple[StudyRun, ...]", names: list[str] | None) -> "tuple[StudyRun, ...]":
    if names is None:
        return runs
    known = [name for run in runs for name in (run.model.name, run.name)]
    for name in names:
        if name not in known:
            models = ", ".join(dict.fromkeys(run.model.name for run in runs))
            raise ConfigError(f'--only names "{name}": the models are {models}')
    return tuple(run for run in runs if run.model.name in names or run.name in names)


def _plan(options: argparse.Namespace, study: "StudySettings", runs: "tuple[StudyRun, ...]") -> int:
    from megamoe.study.forecast import THIS_MACHINE, forecast, forecast_text, forecast_tree

    num_gpus = options.gpus or 1
    found = forecast(study, runs, cluster_name=options.cluster, num_gpus=num_gpus)
    if options.json:
        print(json.dumps(forecast_tree(study, found, runs), indent=2))
        return 0
    gpus = f"on {num_gpus} rank{'s' if num_gpus > 1 else ''}"
    where = "as measured" if options.cluster is None else f"{gpus} of {options.cluster}"
    if options.cluster == THIS_MACHINE:
        where = f"{gpus} of this machine, at one thread each and as busy as it is now"
    print(forecast_text(study, found, runs, where=where), end="")
    return 0


def _submit(words: list[str], study: "StudySettings", chosen: "tuple[StudyRun, ...]") -> int:
    """One array of what is not complete, by `megamoe submit`, which checks everything and tells what it did."""
    from megamoe.study.processes import run_here
    from megamoe.study.states import is_trained
    from megamoe.study.texts import check_texts
    from megamoe.study.training import write_config

    waiting = [run for run in chosen if not is_trained(run)]
    if not waiting:
        print(f"all {len(chosen)} runs are trained: nothing to submit")
        return 0
    check_texts(waiting, study.folder)
    return run_here(["submit", *(str(write_config(run, study.folder)) for run in waiting), *words])


def _carry_out(
    options: argparse.Namespace, study: "StudySettings", runs: "tuple[StudyRun, ...]", chosen: "tuple[StudyRun, ...]"
) -> int:
    from megamoe.study.lock import study_lock
    from megamoe.study.scoring import score_runs
    from megamoe.study.states import is_trained
    from megamoe.study.texts import check_texts
    from megamoe.study.training import train_runs
    from megamoe.study.write import write_study

    with study_lock(study.folder) as lock:
        failures = []
        if not options.report_only:
            if not options.no_train:
                check_texts([run for run in chosen if not is_trained(run)], study.folder)
                failures += train_runs(
                    runs, chosen, study.folder, local_ranks=study.local_ranks, held=(lock,)
                )
            failures += score_runs(runs, study, study.folder, held=(lock,))
        written = write_study(study, runs, failures)
    for line in written.lines:
        print(line)
    return 0 if written.is_complete and not failures else 1
