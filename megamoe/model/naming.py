"""Between Megatron's module names and the global names of the parameter table, in one place."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megamoe.errors import MegamoeError
from megamoe.model.init import initial_tensor
from megamoe.model.parallel import ParallelGroups
from megamoe.topology.parameters import Parameter, local_shape, local_slices

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

# Module path inside a layer -> global path inside `layers.{i}`.
_IN_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.qkv",
    "self_attention.q_layernorm": "attention.q_norm",
    "self_attention.k_layernorm": "attention.k_norm",
    "self_attention.linear_proj": "attention.out",
    "pre_mlp_layernorm": "ffn_norm",
    "mlp.linear_fc1": "ffn.fc1",
    "mlp.linear_fc2": "ffn.fc2",
    "mlp.router": "router",
    "mlp.experts.fc1": "experts.fc1",
    "mlp.experts.fc2": "experts.fc2",
    "mlp.shared_expert.linear_fc1": "shared_expert.fc1",
    "mlp.shared_expert.linear_fc2": "shared_expert.fc2",
    "mlp.shared_expert.mixing": "shared_expert_mix",
}

# Module path outside the layers -> global path.
_OUTSIDE = {
    "embedding.word_embeddings": "embedding",
    "decoder.final_layernorm": "final_norm",
    "output_layer": "output",
    "score": "score",
}


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank: which slice of which global tensor it holds.

    `tied_copy` is the last pipeline stage's copy of a tied embedding. Megatron may flatten dimensions that the table
    keeps apart (the two halves of a gated FFN): `view` has the table's shape over the same memory.
    """

    parameter: Parameter
    tensor: nn.Parameter
    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    tied_copy: bool

    @property
    def view(self) -> Tensor:
        return self.tensor.detach().view(self.shape)


def global_name(module_name: str, first_layer: int) -> str:
    """The table's name of a chunk's parameter; `first_layer` is the 0-based global number of the chunk's layer 0.

    Raises KeyError for a name outside the table.
    """
    path, _, leaf = module_name.rpartition(".")
    if match := _LAYER.fullmatch(path):
        return f"layers.{first_layer + int(match[1])}.{_IN_LAYER[match[2]]}.{leaf}"
    return f"{_OUTSIDE[path]}.{leaf}"


def local_parameters(
    chunks: Sequence[nn.Module], table: Iterable[Parameter], groups: ParallelGroups
) -> list[LocalParameter]:
    """Every parameter of this rank's chunks, in model order, matched with the table.

    Raises MegamoeError naming the stranger if the model has a parameter the table lacks, or one of another size.
    """
    by_name = {parameter.name: parameter for parameter in table}
    found = []
    for chunk in chunks:
        first_layer = chunk.decoder.layers[0].layer_number - 1
        for module_name, tensor in chunk.named_parameters():
            try:
                name = global_name(module_name, first_layer)
            except KeyError:
                raise MegamoeError(f"the model has a parameter {module_name} that the parameter table lacks") from None
            tied_copy = name == "output.weight" and name not in by_name
            parameter = by_name.get("embedding.weight" if tied_copy else name)
            if parameter is None:
                raise MegamoeError(f"the model has a parameter {module_name} ({name}) that the parameter table lacks")
            shape = local_shape(parameter, groups.grid)
            if tensor.numel() != torch.Size(shape).numel():
                raise MegamoeError(f"{name} is {tuple(tensor.shape)} in the model but {shape} in the parameter table")
            slices = local_slices(parameter, groups.grid, groups.coordinates)
            found.append(LocalParameter(parameter, tensor, slices, shape, tied_copy))
    return found


@torch.no_grad()
def fill_initial(parameters: Iterable[LocalParameter], seed: int) -> None:
    """Draw the initial values of this rank's parameters by global name."""
    for local in parameters:
        local.view.copy_(initial_tensor(local.parameter, seed, local.slices))
