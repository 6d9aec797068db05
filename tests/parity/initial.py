"""Starting weights by the published rule alone: a whole tensor a draw, an expert a draw, seeds from names.

Only the parameter table (names, shapes, distributions) is shared with the stack; the seeds and draws are redone.
"""

import hashlib

import torch
from torch import Tensor

from megamoe.config.schema import Config
from megamoe.topology.parameters import Parameter, param_table


def _seed(run_seed: int, name: str) -> int:
    """The first eight bytes of the name's hash, little endian, without the top bit torch would read as a sign."""
    return int.from_bytes(hashlib.blake2b(f"{run_seed}:{name}".encode()).digest()[:8], "little") >> 1


def _draw(shape: tuple[int, ...], parameter: Parameter, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    distribution, tensor = parameter.init, torch.empty(shape, dtype=torch.float32)
    if hasattr(distribution, "std"):
        return tensor.normal_(0.0, distribution.std, generator=generator)
    if hasattr(distribution, "bound"):
        return tensor.uniform_(-distribution.bound, distribution.bound, generator=generator)
    return tensor.fill_(distribution.value)


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Every parameter of the model, whole and in fp32, by global name."""
    weights = {}
    for p in param_table(config.model, config.moe):
        if p.kind == "expert":
            draws = [_draw(p.shape[1:], p, _seed(config.run.seed, f"{p.name}/{e}")) for e in range(p.shape[0])]
            weights[p.name] = torch.stack(draws)
        else:
            weights[p.name] = _draw(p.shape, p, _seed(config.run.seed, p.name))
    return weights
