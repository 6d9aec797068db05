"""What the tests of the old formats share: a conversion carried out in memory, and seeded numbers for tensors."""

import numpy as np
import torch

from megamoe.checkpoint.slices import whole_box, within
from megamoe.convert.links import Conversion

FLOATS = {"F32": np.float32, "F16": np.float16}


def tensor(name: str, *shape: int) -> torch.Tensor:
    """Normal numbers that the name decides."""
    seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(name))
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits as fp32."""
    return (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw.view(FLOATS[dtype])


def converted(source, conversion: Conversion) -> dict[str, torch.Tensor]:
    """Every tensor of ours in fp32, by the links alone; constants and duplicates are checked as an executor would."""
    ours = {key: np.full(shape, np.nan, np.float32) for key, shape in conversion.ours.items()}
    for padding in conversion.paddings:
        ours[padding.ours][within(padding.our_box, whole_box(ours[padding.ours].shape))] = 0
    for link in conversion.links:
        raw = link.to_ours(source.read(link.theirs, link.their_box))
        values = floats(raw, source.tensors[link.theirs].dtype)
        ours[link.ours][within(link.our_box, whole_box(ours[link.ours].shape))] = values
    for item in conversion.duplicates:
        both = [source.read(name, whole_box(conversion.theirs[name])) for name in (item.theirs, item.original)]
        assert np.array_equal(*both), item
    for item in conversion.constants:
        raw = source.read(item.theirs, whole_box(conversion.theirs[item.theirs]))
        assert (floats(raw, source.tensors[item.theirs].dtype) == item.value).all()
    assert set(source.tensors) == set(conversion.theirs)
    assert not any(np.isnan(values).any() for values in ours.values())
    return {name: torch.from_numpy(values) for (_, name), values in ours.items()}
