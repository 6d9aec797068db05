"""Initial values as facts: which distribution each tensor is drawn from, and from which seed. No torch.

The draw itself belongs to `megamoe.model`. It is made for the whole tensor (for experts: one expert at a time) and cut
afterwards, so the starting weights are the same under every layout.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

from megamoe.config.schema import ModelConfig


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: float


@dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float


Initial = Uniform | Normal | Constant


def seed_of(seed: int, name: str) -> int:
    """A seed in [0, 2**63) for the tensor `name` of a run seeded with `seed`.

    For expert e of a stacked tensor the name is "{parameter name}/{e}", e counted over the whole model.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class InitRule(Protocol):
    """Chooses a distribution by the role of a tensor. Norms are ones and zeros under every rule.

    `fan_in` is the number of inputs of one output; `fan_out` the number of outputs.
    """

    def embedding(self) -> Initial: ...  # token embedding and output head alike

    def qkv_weight(self, fan_in: int, query_fan_out: int) -> Initial: ...

    def attention_out_weight(self, fan_in: int, fan_out: int) -> Initial: ...

    def linear_weight(self, fan_in: int) -> Initial: ...  # fc1, router

    def residual_weight(self, fan_in: int) -> Initial: ...  # fc2, which writes to the residual stream

    def linear_bias(self, fan_in: int) -> Initial: ...


@dataclass(frozen=True)
class FairseqRule:
    """What the released code of Artetxe et al. 2021, arXiv 2112.10684, starts from (fairseq, branch moe).

    Linear layers keep nn.Linear's default: kaiming-uniform with a = sqrt(5), in other words a bound of 1/sqrt(fan_in).
    Queries, keys and values are xavier-uniform with gain 1/sqrt(2). They are one fused tensor here, and with fewer
    key/value heads than query heads the three matrices differ in fan: the bound is the query matrix's.
    """

    hidden_size: int

    def embedding(self) -> Initial:
        return Normal(self.hidden_size**-0.5)

    def qkv_weight(self, fan_in: int, query_fan_out: int) -> Initial:
        return Uniform(_xavier_bound(fan_in, query_fan_out, gain=1 / math.sqrt(2)))

    def attention_out_weight(self, fan_in: int, fan_out: int) -> Initial:
        return Uniform(_xavier_bound(fan_in, fan_out, gain=1.0))

    def linear_weight(self, fan_in: int) -> Initial:
        return Uniform(fan_in**-0.5)

    def residual_weight(self, fan_in: int) -> Initial:
        return Uniform(fan_in**-0.5)

    def linear_bias(self, fan_in: int) -> Initial:
        return Uniform(fan_in**-0.5)


@dataclass(frozen=True)
class NormalRule:
    """GPT-2's and Megatron's rule: N(0, std^2), smaller by sqrt(2 * layers) where a matrix writes to the residual."""

    std: float
    num_layers: int

    def embedding(self) -> Initial:
        return Normal(self.std)

    def qkv_weight(self, fan_in: int, query_fan_out: int) -> Initial:
        return Normal(self.std)

    def attention_out_weight(self, fan_in: int, fan_out: int) -> Initial:
        return Normal(self.std / math.sqrt(2 * self.num_layers))

    def linear_weight(self, fan_in: int) -> Initial:
        return Normal(self.std)

    def residual_weight(self, fan_in: int) -> Initial:
        return Normal(self.std / math.sqrt(2 * self.num_layers))

    def linear_bias(self, fan_in: int) -> Initial:
        return Constant(0.0)


def init_rule(model: ModelConfig) -> InitRule:
    """The rule that `model.init` names."""
    if model.init == "fairseq":
        return FairseqRule(model.hidden_size)
    return NormalRule(model.init_std, model.num_layers)


def _xavier_bound(fan_in: int, fan_out: int, *, gain: float) -> float:
    """Glorot and Bengio 2010: the bound of a uniform whose variance is gain^2 * 2 / (fan_in + fan_out)."""
    return gain * math.sqrt(6.0 / (fan_in + fan_out))
