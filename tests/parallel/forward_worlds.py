"""What tests of models that only compute share: small models of transformers, imported, and one of them on ranks."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megamoe.config.schema import Config
from megamoe.convert.from_hf import import_
from megamoe.convert.hf_tables import conversion, from_hf_config
from megamoe.inference.model import ForwardModel, build_forward_model
from megamoe.inference.settings import forward_config
from megamoe.runs.run_folder import checkpoint_name, checkpoints_path
from tests.harness import run_ranks
from tests.parallel.test_convert_layouts import make_custom
from tests.parallel.worlds import world
from tests.unit.convert_cases import CASES

MULTIPLE = 40  # more rows of the vocabulary than tokens: they are no tokens
LAUNCH_SECONDS = 300


def checkpoint_of(root: str | Path, name: str) -> Path:
    return checkpoints_path(Path(root) / name / "run") / checkpoint_name(0)


def make_model(root: Path, name: str, vocab_multiple: int | None = MULTIPLE) -> torch.nn.Module:
    """Transformers' model of this name ("custom": the paper's), and its weights as a checkpoint of ours."""
    folder = root / name / "hf"
    built = make_custom(folder) if name == "custom" else CASES[name].build()
    if name != "custom":
        built.save_pretrained(folder)
    their_config = json.loads((folder / "config.json").read_text())
    config = from_hf_config(their_config, vocab_multiple=vocab_multiple)
    import_(folder, root / name / "run", conversion(config, their_config), workers=0)
    return built


@contextmanager
def forward_model(config: Config, checkpoint: Path) -> Iterator[ForwardModel]:
    """On a rank, in a world of its own. An error leaves all standing: peers shall not break before it is heard."""
    with world(config) as device:
        model = build_forward_model(config, checkpoint, device)
        yield model
        torch.distributed.barrier()
        model.close()


@contextmanager
def model_of(root: str | Path, name: str, settings: Sequence[str], size: int) -> Iterator[ForwardModel]:
    """`forward_model` of a model that `make_model` made, on `size` ranks."""
    checkpoint = checkpoint_of(root, name)
    with forward_model(forward_config(checkpoint, settings, num_ranks=size), checkpoint) as model:
        yield model


def both_sides(
    root: Path, models: Sequence[str], sizes: Sequence[int], theirs: Callable[[torch.nn.Module], Any],
    compute_all: Callable[[int, str], Mapping[Any, Any]], *, same: Callable[[Any, Any], None],
    vocab_multiples: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """{"theirs": by model, "ours": by the keys of `compute_all`}, which every rank of every launch returns alike.

    same: asserts that what two ranks found is the same.
    """
    expected, ours = {}, {}
    torch.set_num_threads(1)
    for name in models:
        expected[name] = theirs(make_model(root, name, (vocab_multiples or {}).get(name, MULTIPLE)))
    for size in sizes:
        first, *others = run_ranks(compute_all, size, size, str(root), init=False, timeout_seconds=LAUNCH_SECONDS)
        ours |= first
        for other in others:
            assert other.keys() == first.keys()
            for key, found in first.items():
                same(other[key], found)
    return {"theirs": expected, "ours": ours}
