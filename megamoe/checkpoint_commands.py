"""`megamoe checkpoint inspect | verify | diff | reshard`: arguments, output and exit codes. No torch.

Exit codes: 0 whole or equal, 1 damaged or different, 2 usage. Numbers and JSON go to stdout, progress to stderr.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from megamoe.errors import CheckpointError, ConfigError, SaveError
from megamoe.progress import ByteProgress

DAMAGED_OR_DIFFERENT = 1
_LONGEST_VALUE = 80  # characters of a value that is shown among others
_PATH_HELP = "a checkpoint's folder, or a run's: then its newest checkpoint"


def add_checkpoint_commands(commands: Any) -> None:
    """Add `checkpoint` with its four commands to the subparsers of `megamoe`."""
    summary = "look into, verify, compare and rewrite checkpoints"
    parser = commands.add_parser("checkpoint", help=summary, description=f"{summary.capitalize()}.")
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect = _add(inner, "inspect", _inspect, "show what a checkpoint holds")
    inspect.add_argument("path", metavar="PATH", type=Path, help=_PATH_HELP)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor, too")
    verify = _add(inner, "verify", _verify, "compare the checksum of every block of every file")
    verify.add_argument("path", metavar="PATH", type=Path, help=_PATH_HELP)
    diff = _add(inner, "diff", _diff, "compare two checkpoints of any layouts, tensor by tensor")
    diff.add_argument("path", metavar="PATH", type=Path, help=_PATH_HELP)
    diff.add_argument("other", metavar="OTHER", type=Path, help="the same")
    diff.add_argument("--kind", action="append", default=[], metavar="KIND", help="only this kind; may be repeated")
    reshard = _add(inner, "reshard", _reshard, "rewrite a checkpoint as another layout's ranks would write it")
    reshard.add_argument("path", metavar="PATH", type=Path, help=_PATH_HELP)
    reshard.add_argument("out", metavar="OUT", type=Path, help="the new checkpoint's folder; it must not exist")
    reshard.add_argument("overrides", metavar="parallel.key=value", nargs="*", help="the new layout")
    reshard.add_argument("--ranks", type=int, metavar="N", help="number of ranks of the new layout; default: as it was")
    reshard.add_argument("--weights-only", action="store_true", help="leave out everything of the optimizer")


def _add(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=lambda options: _answer(run, options), parser=parser)
    return parser


def _answer(run: Any, options: argparse.Namespace) -> int:
    """Damage is an answer, not a wrong use of the command."""
    try:
        return run(options)
    except SaveError:
        raise
    except CheckpointError as error:
        if options.json:
            print(json.dumps({"damaged": str(error)}, indent=2))
        else:
            print(f"megamoe: damaged: {error}", file=sys.stderr)
        return DAMAGED_OR_DIFFERENT


def _inspect(options: argparse.Namespace) -> int:
    from megamoe.checkpoint.compare import summary
    from megamoe.checkpoint.folders import resolve_checkpoint
    from megamoe.checkpoint.reader import Checkpoint

    with Checkpoint.open(resolve_checkpoint(options.path)) as checkpoint:
        shown = summary(checkpoint)
        tensors = [
            {"kind": e.kind, "name": e.name, "dtype": e.dtype, "shape": list(e.shape), "num_slices": len(e.slices)}
            for e in checkpoint.manifest.tensors.values()
        ]
    if options.json:
        print(json.dumps(shown | ({"tensors": tensors} if options.tensors else {}), indent=2))
        return 0
    print(f"{shown['folder']}: step {shown['step']}, save {shown['save_id']}")
    print(f"{shown['num_files']} files, {shown['num_bytes']:,} bytes")
    for title in ("layout", "state", "versions"):
        print(f"{title:<9} " + ", ".join(f"{key} {_short(value)}" for key, value in shown[title].items()))
    print(f"{'kind':<16}{'tensors':>9}{'slices':>9}{'elements':>22}{'bytes':>22}  dtype")
    for kind, row in shown["kinds"].items():
        counts = f"{row['num_tensors']:>9,}{row['num_slices']:>9,}{row['num_elements']:>22,}{row['num_bytes']:>22,}"
        print(f"{kind:<16}{counts}  {', '.join(row['dtypes'])}")
    for entry in tensors if options.tensors else ():
        print(f"{entry['kind']:<16}{entry['dtype']:<6}{entry['name']} {entry['shape']} in {entry['num_slices']} slices")
    return 0


def _short(value: Any) -> str:
    """What fits on a line: of long lists and objects, such as the guard's losses, how long they are."""
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE or not isinstance(value, list | dict) else f"{len(value)} entries"


def _verify(options: argparse.Namespace) -> int:
    from megamoe.checkpoint.folders import resolve_checkpoint
    from megamoe.checkpoint.reader import Checkpoint

    folder = resolve_checkpoint(options.path)
    with Checkpoint.open(folder) as checkpoint:
        manifest = checkpoint.manifest
        num_bytes = sum(file.size for file in manifest.files)
        progress = ByteProgress("verifying", num_bytes)
        try:
            checkpoint.verify(progress=progress.add)
        finally:
            progress.finish()
    counts = {"step": manifest.step, "num_tensors": len(manifest.tensors), "num_files": len(manifest.files)}
    if options.json:
        print(json.dumps({"folder": str(folder), "damaged": None, **counts, "num_bytes": num_bytes}, indent=2))
    else:
        print(f"{folder} is whole: {counts['num_tensors']} tensors, {counts['num_files']} files, {num_bytes:,} bytes")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from megamoe.checkpoint.compare import config_differences, differences
    from megamoe.checkpoint.folders import resolve_checkpoint
    from megamoe.checkpoint.reader import Checkpoint

    paths = resolve_checkpoint(options.path), resolve_checkpoint(options.other)
    with Checkpoint.open(paths[0]) as one, Checkpoint.open(paths[1]) as other:
        progress = ByteProgress("comparing", sum(file.size for file in one.manifest.files))
        try:
            found = list(differences(one, other, kinds=tuple(options.kind), progress=progress.add))
        finally:
            progress.finish()
        settings = config_differences(one.manifest.config, other.manifest.config)
        state = config_differences(one.manifest.state, other.manifest.state)
    code = DAMAGED_OR_DIFFERENT if found else 0
    if options.json:
        rows = [dataclasses.asdict(difference) for difference in found]
        named = {
            title: [{"key": key, "first": a, "second": b} for key, a, b in pairs]
            for title, pairs in (("config", settings), ("state", state))
        }
        print(json.dumps({"equal": not found, "tensors": rows} | named, indent=2))
        return code
    for difference in found:
        what = difference.reason or f"{difference.num_different:,} elements differ, at most by {difference.largest}"
        print(f"{difference.kind} {difference.name}: {what}")
    for title, pairs in (("config", settings), ("state", state)):
        for key, a, b in pairs:
            print(f"{title} {key}: {_short(a)} there, {_short(b)} here")
    print(f"{len(found)} tensors differ" if found else "all tensors are equal to the bit")
    return code


def _reshard(options: argparse.Namespace) -> int:
    from megamoe.checkpoint.folders import resolve_checkpoint
    from megamoe.checkpoint.reader import Checkpoint
    from megamoe.checkpoint.reshard import config_of, num_bytes_to_write, reshard
    from megamoe.config.loading import override_config

    strangers = [override for override in options.overrides if not override.startswith("parallel.")]
    if strangers:
        raise ConfigError(f'"{strangers[0]}" is no part of a layout: only parallel.* can be set here')
    if options.ranks is not None and options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks} is no number of ranks: use 1 or more")
    source = resolve_checkpoint(options.path)
    with Checkpoint.open(source) as checkpoint:
        config = override_config(config_of(checkpoint), options.overrides, str(source))
        num_ranks = options.ranks or checkpoint.manifest.layout.get("num_ranks")
        total_bytes = num_bytes_to_write(checkpoint, weights_only=options.weights_only)
    if type(num_ranks) is not int:
        raise ConfigError(f"{source} does not say how many ranks it is of: give --ranks")
    progress = ByteProgress("writing", total_bytes)
    try:
        reshard(
            source, options.out, config=config, num_ranks=num_ranks, weights_only=options.weights_only,
            progress=progress.add,
        )  # fmt: skip
    finally:
        progress.finish()
    if options.json:
        print(json.dumps({"folder": str(options.out), "num_ranks": num_ranks, "num_bytes": total_bytes}, indent=2))
    else:
        print(f"{options.out} is complete, for {num_ranks} ranks")
    return 0
