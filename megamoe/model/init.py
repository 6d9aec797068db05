"""Initial weights by global name: the same whatever the layout, and a seed of its own for every expert."""

import torch
from torch import Tensor

from megamoe.topology.initial import Constant, Initial, Normal, seed_of
from megamoe.topology.parameters import Parameter


def _draw(shape: tuple[int, ...], init: Initial, seed: int) -> Tensor:
    if isinstance(init, Constant):
        return torch.full(shape, init.value)
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape, dtype=torch.float32)
    if isinstance(init, Normal):
        return values.normal_(0.0, init.std, generator=generator)
    return values.uniform_(-init.bound, init.bound, generator=generator)


def initial_tensor(parameter: Parameter, seed: int, slices: tuple[slice, ...] | None = None) -> Tensor:
    """The fp32 initial values of `parameter`, or of the part `slices` cuts from its global shape.

    Tensors are drawn whole and cut, experts one at a time, so the memory in use is that of one uncut tensor or one
    expert. `slices` has one slice per dimension; None is the whole.
    """
    cut = slices or tuple(slice(0, size) for size in parameter.shape)
    if parameter.expert_dim is None:
        return _draw(parameter.shape, parameter.init, seed_of(seed, parameter.name))[cut].clone()
    experts = range(parameter.shape[0])[cut[0]]
    one = parameter.shape[1:]
    return torch.stack([_draw(one, parameter.init, seed_of(seed, f"{parameter.name}/{e}"))[cut[1:]] for e in experts])
