"""Carrying out a plan: a new run folder that has its name when it is complete, written in parts of bounded size.

A run that was killed goes on with the first part that is not there; the sources are only ever read.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megamoe import __version__
from megamoe.checkpoint import manifest as manifests
from megamoe.checkpoint.commit import fresh_state, merge, read_part, write_manifest
from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.folders import checkpoint_name, remove_tree, set_latest
from megamoe.checkpoint.layouts import layout_of
from megamoe.checkpoint.manifest import MANIFEST, Manifest
from megamoe.checkpoint.outputs import check_places, growing, put_in_place, writing
from megamoe.checkpoint.slices import STORAGE, Slice, volume
from megamoe.checkpoint.strict_json import dumps
from megamoe.checkpoint.writer import Save, part_name, write_streams
from megamoe.config.loading import dump_yaml
from megamoe.config.schema import Config
from megamoe.errors import CheckpointError, ConversionError
from megamoe.surgery.recipes import Plan, Region, Target, check_regions
from megamoe.surgery.sources import Sources
from megamoe.surgery.values import Kitchen
from megamoe.topology.parameters import num_active_parameters, num_parameters, param_table

PART_BYTES = 1 << 30  # of one file, and of what a killed run does again
REPORT = "surgery.json"

CheckLoss = Callable[[Path], float]  # a checkpoint's folder -> its loss on some text


@dataclass(frozen=True)
class Result:
    """What was done; `surgery.json` in the new run's folder says the same."""

    operation: str
    folder: str  # of the new run
    sources: tuple[str, ...]
    num_parameters_before: int  # of the first source
    num_active_parameters_before: int  # that one token passes
    num_parameters: int
    num_active_parameters: int
    num_bytes: int
    preserves: str  # what of the old function the new model computes
    notes: tuple[str, ...]
    losses_before: tuple[float, ...] = ()  # of each source, where they were asked for
    loss: float | None = None


def apply(
    sources: Sources,
    plan: Plan,
    out: Path,
    *,
    progress: Callable[[int], None] | None = None,
    check_loss: CheckLoss | None = None,
) -> Result:
    """Write the run folder `out`: checkpoints/step_00000000, latest, config.yaml, surgery.json.

    progress: called with numbers of bytes, `plan.num_bytes` in all. check_loss: called for each source and for the new
    checkpoint before it gets its name. Raises ConfigError for an `out` that exists or lies in a source, CheckpointError
    for a damaged source, ConversionError for values that a 16-bit type cannot hold, OutputError when the
    disk refuses or another process writes there.
    """
    check_places(sources.folders, out)
    for target in plan.targets:
        check_regions(target)
    save_id = _save_id(sources, plan)
    config = plan.config.model_copy(update={"run": plan.config.run.model_copy(update={"dir": str(out)})})
    with growing(out, save_id) as partial, writing(partial):
        folder = partial / "checkpoints" / checkpoint_name(0)
        folder.mkdir(parents=True, exist_ok=True)
        if _is_complete(folder, save_id):
            _tell(progress, plan.num_bytes)
        else:
            try:
                _write_checkpoint(sources, plan, config, Save(folder, 0, save_id, 0), progress)
            except ConversionError:  # another run would not get further
                remove_tree(partial)
                raise
        losses = tuple(check_loss(one) for one in sources.folders) if check_loss is not None else ()
        result = _result(sources, plan, out, losses, None if check_loss is None else check_loss(folder))
        set_latest(folder.parent, folder.name)
        replace_file(partial / "config.yaml", dump_yaml(config).encode())
        replace_file(partial / REPORT, (dumps(dataclasses.asdict(result)) + "\n").encode())
        put_in_place(partial, out)
    return result


def parts_of(plan: Plan) -> list[list[tuple[Target, Region, Slice]]]:
    """The plan in parts of about PART_BYTES: each a file for every kind, written at one go."""
    parts: list[list[tuple[Target, Region, Slice]]] = [[]]
    room = PART_BYTES
    for target in plan.targets:
        item_bytes = STORAGE[target.dtype].itemsize
        for region in target.regions:
            first, size = 0, volume(region.box)
            while first < size:
                if room < min(PART_BYTES, manifests.BLOCK_BYTES, (size - first) * item_bytes):
                    parts.append([])
                    room = PART_BYTES
                fits = max(1, room // manifests.BLOCK_BYTES) * manifests.BLOCK_BYTES // item_bytes
                last = size if (size - first) * item_bytes <= room else min(size, first + fits)
                parts[-1].append((target, region, target.slice_of(region, first, last)))
                room -= (last - first) * item_bytes
                first = last
    return parts


def _write_checkpoint(
    sources: Sources, plan: Plan, config: Config, save: Save, progress: Callable[[int], None] | None
) -> None:
    kitchen, written = Kitchen(sources), []
    for number, pieces in enumerate(parts_of(plan)):
        if (save.partial / part_name(number)).exists():
            _tell(progress, sum(piece.num_bytes for _, _, piece in pieces))
        else:
            streams = [(piece, kitchen.blocks(target, region, piece, progress)) for target, region, piece in pieces]
            write_streams(dataclasses.replace(save, rank=number), streams)
        written.append(read_part(save.partial, number, save.step, save.save_id))
    layout = layout_of(config, _fewest_ranks(config))
    manifest = merge(written, state=fresh_state(), config=config.model_dump(mode="json"), layout=layout)
    write_manifest(save.partial, manifest)


def _fewest_ranks(config: Config) -> int:
    """The smallest world of the configuration's layout."""
    sizes = config.parallel
    experts = sizes.expert_parallel_size * sizes.expert_tensor_parallel_size
    return sizes.pipeline_parallel_size * math.lcm(sizes.tensor_parallel_size, experts)


def _result(sources: Sources, plan: Plan, out: Path, losses: tuple[float, ...], loss: float | None) -> Result:
    counts = []
    for config in (sources.config, plan.config):
        table = param_table(config.model, config.moe)
        counts += [num_parameters(table), num_active_parameters(table, config.moe)]
    folders = tuple(str(folder) for folder in sources.folders)
    return Result(plan.operation, str(out), folders, *counts, plan.num_bytes, plan.preserves, plan.notes, losses, loss)


def _save_id(sources: Sources, plan: Plan) -> str:
    """The same for the same bytes to be written: what a killed run left is then taken up."""
    tree = [__version__, sources.identity, plan.operation, plan.arguments, plan.config.model_dump(mode="json"),
            PART_BYTES, manifests.BLOCK_BYTES]  # fmt: skip
    return f"surgery-{xxhash.xxh3_64_hexdigest(dumps(tree).encode())}"


def _is_complete(folder: Path, save_id: str) -> bool:
    """The manifest is there, which is the last file of a checkpoint; parts that it was made of may still stand by.

    OSErrors pass.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    try:
        is_ours = Manifest.read(folder).save_id == save_id
    except CheckpointError:
        is_ours = False
    if not is_ours:
        os.unlink(path)
    else:
        for name in os.listdir(folder):
            if name.startswith("rank_"):
                os.unlink(folder / name)
    return is_ours


def _tell(progress: Callable[[int], None] | None, num_bytes: int) -> None:
    if progress is not None:
        progress(num_bytes)
