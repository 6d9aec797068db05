"""The `megamoe` command: reads arguments, calls what does the work, turns what the user must mend into one line.

Nothing heavy is imported before the command that needs it is known: help, presets and show never load torch.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megamoe import __version__
from megamoe.arguments import add_config_arguments
from megamoe.attempt_commands import add_attempt_commands
from megamoe.checkpoint_commands import add_checkpoint_commands
from megamoe.convert_commands import add_convert_commands
from megamoe.errors import MegamoeError
from megamoe.evaluate_commands import add_evaluate_commands
from megamoe.finetune_commands import add_finetune_commands
from megamoe.generate_commands import add_generate_commands
from megamoe.plan_commands import add_plan_commands
from megamoe.preflight_commands import add_preflight_commands
from megamoe.prime_commands import add_prime_commands
from megamoe.printing import printing
from megamoe.report_commands import add_report_commands
from megamoe.study_commands import add_study_commands
from megamoe.submit_commands import add_submit_commands
from megamoe.surgery_commands import add_surgery_commands
from megamoe.train_start import add_start_arguments, start_training

if TYPE_CHECKING:
    from megamoe.config.schema import Config

EXIT_CODE_FILE = "MEGAMOE_EXIT_CODE_FILE"
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` default to those of the process."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    exit_code = _run(options)
    if exit_code and getattr(options, "leaves_exit_code", False):
        _leave_exit_code(exit_code)
    return exit_code


def _run(options: argparse.Namespace) -> int:
    try:
        exit_code = options.command(options)
        with printing():
            sys.stdout.flush()
        return exit_code
    except MegamoeError as error:
        print(f"megamoe: {'error: ' if error.is_failure else ''}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _leave_exit_code(exit_code: int) -> None:
    """For a batch script whose launcher has exit codes of its own: the first rank to end by itself says which."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path is None:
        return
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{exit_code}\n")
    except OSError:  # another rank was first; or the file cannot be written, and the launcher's code has to do
        pass


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Overrides may stand before and after options, which argparse alone does not allow inside a command."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-") or not hasattr(options, "overrides")]
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megamoe",
        description="Train mixture-of-experts language models, from a laptop to 1.1T parameters.",
        epilog="Try: megamoe show quickstart, then megamoe train quickstart --help",
    )
    parser.add_argument("--version", action="version", version=f"megamoe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    presets = _add_command(
        commands, "presets", _presets, "list the presets with their sizes", "example:\n  megamoe presets"
    )
    presets.add_argument("--json", action="store_true", help="print a JSON list instead of a table")

    show = _add_command(
        commands,
        "show",
        _show,
        "print a whole configuration, every default filled in",
        "example:\n  megamoe show moe-15b run.num_steps=1000 parallel.expert_parallel_size=8 > my_run.yaml",
    )
    add_config_arguments(show)
    show.add_argument(
        "--json", action="store_true", help="print JSON, with the parameter counts beside the configuration"
    )

    train = _add_command(
        commands,
        "train",
        _train,
        "train a model",
        "examples:\n"
        "  megamoe train laptop-moe data.train='[{path: data/my_text}]' run.dir=runs/first\n"
        "  megamoe train my_run.yaml --local-ranks 8 parallel.expert_parallel_size=4\n"
        "  torchrun --nproc-per-node 8 -m megamoe train my_run.yaml\n"
        "  srun --ntasks-per-node 8 megamoe train my_run.yaml",
    )
    add_config_arguments(train)
    add_start_arguments(train)
    add_finetune_commands(commands)
    add_attempt_commands(commands)
    add_preflight_commands(commands)
    add_plan_commands(commands)
    add_submit_commands(commands)
    add_checkpoint_commands(commands)
    add_convert_commands(commands)
    add_surgery_commands(commands)
    add_prime_commands(commands)
    add_evaluate_commands(commands)
    add_report_commands(commands)
    add_generate_commands(commands)
    add_study_commands(commands)
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, epilog: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run, parser=parser)
    return parser


def _num_parameters(config: "Config") -> tuple[int, int]:
    """Parameters in total, and those that one token passes."""
    from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table

    table = param_table(config.model, config.moe)
    return num_parameters(table), num_active_parameters(table, config.moe)


def _presets(options: argparse.Namespace) -> int:
    from megamoe.config.loading import load_config
    from megamoe.config.presets import PRESETS

    rows = []
    for preset in PRESETS.values():
        config = load_config(preset.name)
        total, active = _num_parameters(config)
        rows.append(
            {
                "name": preset.name,
                "family": preset.family,
                "num_layers": config.model.num_layers,
                "hidden_size": config.model.hidden_size,
                "num_experts": config.moe.num_experts,
                "num_parameters": total,
                "num_active_parameters": active,
                "summary": preset.summary,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    header = ("preset", "family", "layers", "hidden", "experts", "parameters", "active per token", "")
    cells = [tuple(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()) for row in rows]
    widths = [max(len(row[column]) for row in (header, *cells)) for column in range(len(header))]
    for row in (header, *cells):
        texts = (row[i].ljust(widths[i]) if i in (0, 1, 7) else row[i].rjust(widths[i]) for i in range(len(row)))
        print("  ".join(texts).rstrip())
    return 0


def _show(options: argparse.Namespace) -> int:
    from megamoe.config.loading import dump_yaml, load_config
    from megamoe.config.validation import validate

    config = load_config(options.source, options.overrides)
    validate(config)
    total, active = _num_parameters(config)
    if options.json:
        counts = {"num_parameters": total, "num_active_parameters": active}
        print(json.dumps(counts | {"config": config.model_dump(mode="json")}, indent=2))
        return 0
    print(f"# {shlex.join(['megamoe', 'show', options.source, *options.overrides])}".replace("\n", " "))
    print(f"# parameters: {total:,}")
    print(f"# active per token: {active:,}")
    print(dump_yaml(config, _derived_sizes(config)), end="")
    return 0


def _derived_sizes(config: "Config") -> dict[str, int]:
    """What the sizes left null come to, by key."""
    from megamoe.topology.parameters import dimensions

    sizes = dimensions(config.model, config.moe)
    derived = {
        "model.ffn_hidden_size": sizes.ffn,
        "model.num_query_groups": sizes.query_groups,
        "model.head_dim": sizes.head_dim,
        "moe.expert_ffn_hidden_size": sizes.expert_ffn,
    }
    sections = config.model_dump()
    return {key: size for key, size in derived.items() if sections[key.split(".")[0]][key.split(".")[1]] is None}


def _train(options: argparse.Namespace) -> int:
    from megamoe.config.loading import load_config

    return start_training(options, lambda environment: load_config(options.source, options.overrides))
