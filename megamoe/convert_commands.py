"""`megamoe convert to-hf | from-hf | from-fairseq | from-deepspeed | verify`: arguments, output, exit codes. No torch.

Exit codes: 0 converted and verified, 1 the two sides are not the same function, 2 usage or a refusal. Results and JSON
go to stdout, progress to stderr.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamoe.errors import ConversionError
from megamoe.progress import ByteProgress

if TYPE_CHECKING:
    from megamoe.convert.links import Conversion
    from megamoe.convert.workers import BytesDone

_STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def add_convert_commands(commands: Any) -> None:
    """Add `convert` with its commands to the subparsers of `megamoe`."""
    summary = "convert checkpoints to and from other formats, and prove it"
    parser = commands.add_parser("convert", help=summary, description=f"{summary.capitalize()}.")
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    to_hf = _add(inner, "to-hf", _to_hf, "write a checkpoint as a Hugging Face folder")
    _add_checkpoint(to_hf)
    to_hf.add_argument("out", metavar="OUT", type=Path, help="the new folder; it must not exist")
    to_hf.add_argument("--architecture", metavar="CLASS", help="default: the native class that fits exactly, else ours")
    to_hf.add_argument(
        "--drops-off", action="store_true", help="accept that a model trained with capacity drops no token any more"
    )
    to_hf.add_argument(
        "--cut-vocabulary", action="store_true", help="leave out the rows that are no tokens"
    )
    to_hf.add_argument("--tokenizer", metavar="PATH", help="the tokenizer's file or folder, where it has moved")
    to_hf.add_argument("--tokenizer-corpus", metavar="TEXT", type=Path, help="prove the tokenizer on this text, too")
    to_hf.add_argument("--no-tokenizer", action="store_true", help="write no tokenizer")
    _add_writing(to_hf)
    for name, run, what in (
        ("from-hf", _from_hf, "a Hugging Face folder"),
        ("from-fairseq", _from_fairseq, "a fairseq checkpoint, dense or X-shared.pt with X-rank-N.pt"),
        ("from-deepspeed", _from_deepspeed, "a folder of DeepSpeed-MoE or Megatron-DeepSpeed"),
    ):
        command = _add(inner, name, run, f"make a run folder to go on from of {what}")
        command.add_argument("foreign", metavar="SOURCE", type=Path, help=what)
        command.add_argument("out", metavar="OUT", type=Path, help="the new run's folder; it must not exist")
        command.add_argument(
            "--vocab-multiple", type=int, metavar="N", help="pad the vocabulary's rows to a multiple of N with zeros"
        )
        if name == "from-hf":
            command.add_argument("--no-tokenizer", action="store_true", help="leave the folder's tokenizer behind")
        else:
            command.add_argument(
                "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
                help="an argument of the old training that the files lack; may be repeated",
            )  # fmt: skip
        _add_writing(command)
    verify = _add(inner, "verify", _verify, "compare the logits of a checkpoint and a Hugging Face folder")
    _add_checkpoint(verify)
    verify.add_argument("folder", metavar="FOLDER", type=Path, help="the Hugging Face folder")


def _add(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=run, parser=parser)
    return parser


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint's folder, or a run's: then its newest one"
    )
    parser.add_argument(
        "--best", action="store_true", help="of a fine-tuning's run: the checkpoint of its best validation"
    )


def _checkpoint_of(options: argparse.Namespace) -> Path:
    from megamoe.checkpoint.folders import best_checkpoint, resolve_checkpoint

    found = (best_checkpoint if options.best else resolve_checkpoint)(options.checkpoint)
    if found != options.checkpoint and not options.json:
        _say(f"{'best' if options.best else 'newest'} checkpoint: {found}")
    return found


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights written; default: as stored")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core, at most 4")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the logits of both sides")


def _to_hf(options: argparse.Namespace) -> int:
    from megamoe.checkpoint.reader import Checkpoint
    from megamoe.checkpoint.reshard import config_of
    from megamoe.convert.export_files import export_files, lines_of, tokenizer_files
    from megamoe.convert.hf_tables import choose_architecture, conversion, to_hf_config
    from megamoe.convert.to_hf import export

    checkpoint = _checkpoint_of(options)
    with Checkpoint.open(checkpoint) as opened:
        config, manifest = config_of(opened), opened.manifest
    stored = _stored_dtype(manifest.tensors)
    dtype = options.dtype or stored
    architecture, refused = choose_architecture(config)
    if options.architecture is None and architecture.startswith("Megamoe") and not options.json:
        _say("no native class computes this model: it is written for the custom one, whose code travels along")
    their_config = to_hf_config(
        config, dtype=_HF_DTYPES[dtype], architecture=options.architecture, drops_off=options.drops_off,
        cut_vocabulary=options.cut_vocabulary,
    )  # fmt: skip
    table = conversion(config, their_config, drops_off=options.drops_off)
    _say_notes(table, options)
    tokenizer = None
    if not options.no_tokenizer:
        texts = lines_of(options.tokenizer_corpus) if options.tokenizer_corpus else ()
        tokenizer = tokenizer_files(config, path=options.tokenizer, texts=texts)
    files = export_files(
        their_config, table, manifest, tokenizer, name=options.out.resolve().name, dtype=_HF_DTYPES[dtype]
    )
    report = export(
        checkpoint, options.out, table, dtype=dtype, files=files, workers=options.workers,
        progress=_progress("converting"),
        check=None if options.no_verify else lambda made: _compare(checkpoint, made, dtype=_rounding(dtype)),
    )  # fmt: skip
    return _finish(options, report, {"architecture": their_config["architectures"][0], "refused_classes": refused})


def _from_hf(options: argparse.Namespace) -> int:
    from megamoe.convert.foreign import open_source
    from megamoe.convert.from_hf import import_
    from megamoe.convert.hf_folders import read_hf_config
    from megamoe.convert.hf_tables import conversion, from_hf_config
    from megamoe.convert.imported_tokenizer import with_tokenizer

    their_config = read_hf_config(options.foreign)
    config, files = from_hf_config(their_config, vocab_multiple=options.vocab_multiple), {}
    if not options.no_tokenizer:
        config, files = with_tokenizer(config, options.foreign, options.out)
    source = open_source(options.foreign)
    try:
        table = conversion(config, their_config, stored=source.tensors)
        _say_notes(table, options)
        report = import_(
            options.foreign, options.out, table, dtype=options.dtype, source=source, workers=options.workers,
            files=files, progress=_progress("converting"),
            check=None if options.no_verify else lambda made: _compare(made, options.foreign, dtype=None),
        )  # fmt: skip
    finally:
        source.close()
    return _finish(options, report, {"architecture": their_config["architectures"][0]})


def _from_fairseq(options: argparse.Namespace) -> int:
    from megamoe.convert.fairseq import open_fairseq

    return _from_old(options, open_fairseq)


def _from_deepspeed(options: argparse.Namespace) -> int:
    from megamoe.convert.deepspeed_folders import open_deepspeed

    return _from_old(options, open_deepspeed)


def _from_old(options: argparse.Namespace, open_: Callable[..., tuple[Any, "Conversion"]]) -> int:
    """Formats whose own code is not there to compare logits with: bytes are counted, names and shapes are proved."""
    from megamoe.convert.from_hf import import_

    source, table = open_(options.foreign, vocab_multiple=options.vocab_multiple, overrides=_settings(options))
    try:
        _say_notes(table, options)
        report = import_(
            options.foreign, options.out, table, dtype=options.dtype, source=source, workers=options.workers,
            progress=_progress("converting"),
        )  # fmt: skip
    finally:
        source.close()
    return _finish(options, report, {"verified": "coverage and checksums; no code of the old format is here to run"})


def _verify(options: argparse.Namespace) -> int:
    checkpoint = _checkpoint_of(options)
    try:
        result = _compare(checkpoint, options.folder, dtype=_rounding_of_folder(checkpoint, options.folder))
    except ConversionError as error:
        if options.json:
            print(json.dumps({"is_good": False, "problem": str(error)}, indent=2))
        else:
            print(f"megamoe: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if options.json else _verdict(result))
    return 0


def _compare(checkpoint: Path, folder: Path, *, dtype: str | None) -> dict[str, Any]:
    from megamoe.verification.verify import verify

    return verify(checkpoint, folder, dtype=dtype, say=_say)


_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _rounding(dtype: str) -> str | None:
    return {"fp32": None, "bf16": "BF16", "fp16": "F16"}[dtype]


def _rounding_of_folder(checkpoint: Path, folder: Path) -> str | None:
    """What the weights must be rounded to before they equal the folder's: None where the checkpoint's are as coarse."""
    from megamoe.checkpoint.reader import Checkpoint
    from megamoe.convert.foreign import open_source

    with Checkpoint.open(checkpoint) as opened:
        ours = {entry.dtype for (kind, _), entry in opened.manifest.tensors.items() if kind in ("weight", "master")}
    source = open_source(folder)
    theirs = {tensor.dtype for tensor in source.tensors.values()}
    source.close()
    coarse = [dtype for dtype in ("BF16", "F16") if dtype in theirs]
    return coarse[0] if coarse and "F32" in ours else None


def _stored_dtype(tensors: Mapping[tuple[str, str], Any]) -> str:
    found = {entry.dtype for (kind, _), entry in tensors.items() if kind == "weight"}
    if len(found) != 1 or not found <= _STORED.keys():
        raise ConversionError(f"the checkpoint's weights are of {', '.join(sorted(found)) or 'no'} type: give --dtype")
    return _STORED[found.pop()]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    import yaml

    settings = {}
    for text in options.settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConversionError(f"--set {text} is not NAME=VALUE")
        settings[name] = yaml.safe_load(value)
    return settings


def _say(line: str) -> None:
    print(f"megamoe: {line}", file=sys.stderr)


def _say_notes(table: "Conversion", options: argparse.Namespace) -> None:
    if not options.json:
        for note in table.notes:
            _say(f"note: {note}")


def _progress(what: str) -> Callable[["BytesDone"], None]:
    line: list[ByteProgress] = []
    seen = [0]

    def show(done: "BytesDone") -> None:
        if not line:
            line.append(ByteProgress(what, done.num_total_bytes))
        line[0].add(done.num_done_bytes - seen[0])
        seen[0] = done.num_done_bytes
        if done.num_done_bytes >= done.num_total_bytes:
            line[0].finish()

    return show


def _finish(options: argparse.Namespace, report: Mapping[str, Any], more: Mapping[str, Any]) -> int:
    path = options.out / "verification.json"
    verification = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if options.json:
        shown = {key: value for key, value in report.items() if key != "tensors"}
        print(json.dumps({"out": str(options.out), **more, "verification": verification, **shown}, indent=2))
        return 0
    print(f"{options.out} is complete" + (f": {_verdict(verification)}" if verification else ""))
    return 0


def _verdict(verification: Mapping[str, Any]) -> str:
    worst = max(verification["results"], key=lambda result: result["largest_difference"] / result["limit"])
    return (
        f"{verification['method']} agree, largest difference {worst['largest_difference']:.2g} of logits up to "
        f"{worst['largest_logit']:.3g}"
    )
