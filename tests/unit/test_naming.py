"""Megatron's module names to the table's, and the parameters of a rank matched with the table."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megamoe.config.schema import ModelConfig, MoEConfig, ParallelConfig
from megamoe.errors import MegamoeError
from megamoe.model.init import initial_tensor
from megamoe.model.naming import fill_initial, global_name, local_parameters
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import local_slices, param_table

SWIGLU = ModelConfig(
    num_layers=4, hidden_size=8, num_attention_heads=2, vocab_size=128, activation="swiglu", ffn_hidden_size=6
)
TABLE = param_table(SWIGLU, MoEConfig(num_experts=4))


@pytest.mark.parametrize(
    ("module_name", "first_layer", "name"),
    [
        ("embedding.word_embeddings.weight", 0, "embedding.weight"),
        ("decoder.final_layernorm.weight", 6, "final_norm.weight"),
        ("decoder.final_layernorm.bias", 6, "final_norm.bias"),
        ("output_layer.weight", 6, "output.weight"),
        ("decoder.layers.0.input_layernorm.weight", 0, "layers.0.attention_norm.weight"),
        ("decoder.layers.0.self_attention.linear_qkv.weight", 2, "layers.2.attention.qkv.weight"),
        ("decoder.layers.1.self_attention.linear_qkv.bias", 2, "layers.3.attention.qkv.bias"),
        ("decoder.layers.1.self_attention.q_layernorm.weight", 0, "layers.1.attention.q_norm.weight"),
        ("decoder.layers.1.self_attention.k_layernorm.weight", 0, "layers.1.attention.k_norm.weight"),
        ("decoder.layers.3.self_attention.linear_proj.bias", 8, "layers.11.attention.out.bias"),
        ("decoder.layers.3.pre_mlp_layernorm.bias", 8, "layers.11.ffn_norm.bias"),
        ("decoder.layers.0.mlp.linear_fc1.weight", 4, "layers.4.ffn.fc1.weight"),
        ("decoder.layers.0.mlp.linear_fc2.bias", 4, "layers.4.ffn.fc2.bias"),
        ("decoder.layers.10.mlp.router.weight", 20, "layers.30.router.weight"),
        ("decoder.layers.1.mlp.experts.fc1.bias", 0, "layers.1.experts.fc1.bias"),
        ("decoder.layers.1.mlp.experts.fc2.weight", 0, "layers.1.experts.fc2.weight"),
        ("decoder.layers.1.mlp.shared_expert.linear_fc1.weight", 0, "layers.1.shared_expert.fc1.weight"),
        ("decoder.layers.1.mlp.shared_expert.linear_fc2.bias", 2, "layers.3.shared_expert.fc2.bias"),
        ("decoder.layers.0.mlp.shared_expert.mixing.weight", 2, "layers.2.shared_expert_mix.weight"),
    ],
)
def test_global_names(module_name, first_layer, name):
    assert global_name(module_name, first_layer) == name


@pytest.mark.parametrize(
    "module_name",
    [
        "weight",
        "decoder.layers.0.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.x.input_layernorm.weight",
        "decoder.layers.0.weight",
        "module.decoder.final_layernorm.weight",
        "mtp.layers.0.input_layernorm.weight",
    ],
)
def test_a_name_outside_the_table_is_refused(module_name):
    with pytest.raises(KeyError):
        global_name(module_name, 0)


# ---------------------------------------------------------------- a rank's parameters


class Bag(nn.Module):
    """A chunk of a model as `local_parameters` reads it: parameters by path, and the number of its first layer."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], first_layer: int = 0) -> None:
        super().__init__()
        for path, shape in {"decoder.layers.0.input_layernorm.weight": (8,), **shapes}.items():
            *folders, leaf = path.split(".")
            module = self
            for folder in folders:
                if folder not in module._modules:
                    module.add_module(folder, nn.Module())
                module = module._modules[folder]
            module.register_parameter(leaf, nn.Parameter(torch.full(shape, float("nan"))))
        layers = self.decoder.layers
        layers._modules["0"].layer_number = first_layer + 1
        self.decoder._modules["layers"] = nn.ModuleList(layers._modules.values())


def groups(rank: int = 0, world_size: int = 1, **sizes: int) -> SimpleNamespace:
    grid = Grid.from_config(ParallelConfig(**sizes), world_size)
    return SimpleNamespace(grid=grid, coordinates=grid.coordinates(rank))


def test_parameters_of_all_chunks_in_model_order():
    chunks = [
        Bag({"embedding.word_embeddings.weight": (128, 8)}),
        Bag({"decoder.layers.0.mlp.linear_fc1.bias": (12,)}, first_layer=2),
    ]
    found = local_parameters(chunks, TABLE, groups())
    names = [local.parameter.name for local in found]
    assert sorted(names[:2]) == ["embedding.weight", "layers.0.attention_norm.weight"]
    assert names[2:] == ["layers.2.attention_norm.weight", "layers.2.ffn.fc1.bias"]
    assert found[0].tensor in set(chunks[0].parameters())
    assert found[3].shape == (2, 6) and not any(local.tied_copy for local in found)


def test_flattened_halves_are_viewed_in_the_tables_shape():
    """Megatron has the gate above the linear half in one matrix; a tensor rank has the same columns of both."""
    chunk = Bag({"decoder.layers.0.mlp.linear_fc1.weight": (6, 8)})
    here = groups(rank=1, world_size=2, tensor_parallel_size=2)
    local = local_parameters([chunk], TABLE, here)[-1]
    assert local.view.shape == local.shape == (2, 3, 8)
    fill_initial([local], seed=4)
    whole = initial_tensor(next(p for p in TABLE if p.name == "layers.0.ffn.fc1.weight"), 4)
    assert torch.equal(local.tensor[:3], whole[0, 3:]) and torch.equal(local.tensor[3:], whole[1, 3:])


def test_a_rank_is_filled_with_its_slices():
    shapes = {"embedding.word_embeddings.weight": (64, 8), "decoder.layers.0.mlp.experts.fc2.weight": (2, 8, 6)}
    here = groups(rank=1, world_size=2, tensor_parallel_size=2, expert_parallel_size=2)
    found = local_parameters([Bag(shapes, first_layer=1)], TABLE, here)
    fill_initial(found, seed=4)
    for local in found:
        slices = local_slices(local.parameter, here.grid, here.coordinates)
        assert local.slices == slices
        assert torch.equal(local.view, initial_tensor(local.parameter, 4)[slices]), local.parameter.name


def test_the_last_stages_copy_of_a_tied_embedding_starts_as_the_first_ones():
    first, last = Bag({"embedding.word_embeddings.weight": (128, 8)}), Bag({"output_layer.weight": (128, 8)}, 2)
    one, copy = (local_parameters([chunk], TABLE, groups()) for chunk in (first, last))
    (one,) = [local for local in one if local.parameter.name == "embedding.weight"]
    (copy,) = [local for local in copy if local.parameter.name == "embedding.weight"]
    assert (one.tied_copy, copy.tied_copy) == (False, True)
    fill_initial([one, copy], seed=4)
    assert torch.equal(one.tensor, copy.tensor)


def test_an_untied_head_is_itself():
    table = param_table(SWIGLU.model_copy(update={"tie_embeddings": False}), MoEConfig(num_experts=4))
    found = local_parameters([Bag({"output_layer.weight": (128, 8)})], table, groups())
    (head,) = [local for local in found if local.parameter.name == "output.weight"]
    assert not head.tied_copy


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"decoder.layers.0.mlp.shared_experts.weight": (3,)},
            "the model has a parameter decoder.layers.0.mlp.shared_experts.weight that the parameter table lacks",
        ),
        (
            {"decoder.layers.0.mlp.router.bias": (4,)},
            "the model has a parameter decoder.layers.0.mlp.router.bias (layers.0.router.bias) that the parameter "
            "table lacks",
        ),
        (
            {"decoder.layers.0.mlp.linear_fc2.weight": (8, 5)},
            "layers.0.ffn.fc2.weight is (8, 5) in the model but (8, 6) in the parameter table",
        ),
    ],
)
def test_a_stranger_or_another_size_is_named(shapes, message):
    with pytest.raises(MegamoeError) as caught:
        local_parameters([Bag(shapes)], TABLE, groups())
    assert str(caught.value) == message
