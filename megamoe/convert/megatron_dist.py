"""Megatron-core's distributed checkpoints (torch_dist): recognised, and refused with the reason.

The names and places of all tensors are in `.metadata`, a pickle of protocol 4 in which torch's planner describes them
with its own classes. The weights-only unpickler knows neither that protocol nor those classes, and no other loader of
pickles runs nothing. The data beside it does not say which tensor it is of.
"""

from pathlib import Path

from megamoe.errors import ConversionError


def is_torch_dist(path: Path) -> bool:
    """Whether the folder is such a checkpoint: `.metadata` beside files `__{rank}_{number}.distcp`."""
    return path.is_dir() and ((path / ".metadata").is_file() or any(path.glob("*.distcp")))


def refuse_torch_dist(path: Path) -> None:
    """Raises ConversionError, with what to do instead, where `path` is such a checkpoint."""
    if is_torch_dist(path):
        raise ConversionError(
            f"{path} is a torch_dist checkpoint, whose .metadata is a pickle that torch's weights-only unpickler does "
            "not read: export it to a Hugging Face folder with the Megatron that wrote it, and convert that"
        )
