"""Small models for surgery: random checkpoints in both families, and what they compute in plain PyTorch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.surgery.execute import apply
from megamoe.surgery.recipes import Plan
from megamoe.surgery.sources import Sources
from megamoe.topology.parameters import param_table
from tests.parity.reference import forward
from tests.unit.checkpoint_cases import Tensors, load, save

SMALL = ["model.num_layers=4", "model.hidden_size=16", "model.vocab_size=40", "model.vocab_size_multiple=8",
         "model.num_attention_heads=4", "model.seq_length=12"]  # fmt: skip
FAMILIES = {
    "paper": ["model.ffn_hidden_size=24"],
    "modern": ["model.normalization=rmsnorm", "model.activation=swiglu", "model.position_embedding=rope",
               "model.use_bias=false", "model.tie_embeddings=false", "model.scale_embeddings=false",
               "model.num_query_groups=2", "model.ffn_hidden_size=24"],
}  # fmt: skip


def small_config(family: str, *settings: str) -> Config:
    """laptop-moe made small; dense unless the settings say otherwise."""
    return load_config("laptop-moe", [*SMALL, *FAMILIES[family], "moe.num_experts=0", "moe.dropless=true", *settings])


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 -> as stored, cut off to 16 bits: enough to make up a model."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16).view(np.uint16) if dtype == "F16" else values


def model_tensors(config: Config, seed: int = 0, *, dtype: str = "F32", masters: bool = False) -> Tensors:
    """Random weights by the parameter table; balance biases where the run has them.

    masters: beside them optimizer state, too, which surgery is to leave behind.
    """
    generator = np.random.default_rng(seed)
    tensors: Tensors = {}
    for parameter in param_table(config.model, config.moe):
        values = generator.standard_normal(parameter.shape).astype(np.float32) * np.float32(0.3)
        tensors["weight", parameter.name] = (dtype, to_bits(values, dtype))
        if masters:
            tensors["master", parameter.name] = ("F32", values)
            tensors["exp_avg", parameter.name] = ("F32", values + 1)
        if parameter.kind == "router" and config.moe.balance_bias_update_rate:
            bias = generator.standard_normal(parameter.shape[0]).astype(np.float32) * np.float32(0.1)
            tensors["balance_bias", parameter.name.removesuffix(".weight")] = ("F32", bias)
    return tensors


def make(root: Path, config: Config, seed: int = 0, *, dtype: str = "F32", masters: bool = False) -> Path:
    """A checkpoint of step 100 of such a model, cut into random slices."""
    tensors = model_tensors(config, seed, dtype=dtype, masters=masters)
    return save(root / "checkpoints", 100, tensors, seed=seed, config=config.model_dump(mode="json"))


def operate(folders: Sequence[Path], plan_of, out: Path) -> tuple[Plan, Path]:
    """Plan, apply; the plan and the new checkpoint's folder."""
    with Sources(folders) as sources:
        plan = plan_of(sources)
        apply(sources, plan, out)
    return plan, out / "checkpoints" / "step_00000000"


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """Weights as fp32, of a checkpoint whose weights are F32 or BF16; masters where it has them."""
    found = {}
    for (kind, name), (dtype, array) in load(folder).items():
        if kind not in ("weight", "master") or (name in found and kind == "weight"):
            continue
        found[name] = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array
    return found


def logits(folder: Path, **replaced: np.ndarray) -> torch.Tensor:
    """What the plain PyTorch reference computes from a checkpoint on fixed tokens; no token is dropped."""
    config = config_of(Checkpoint.open(folder))
    weights = {name: torch.from_numpy(array.copy()) for name, array in (weights_of(folder) | replaced).items()}
    biases = {
        int(name.split(".")[1]): torch.from_numpy(array.copy())
        for (kind, name), (_, array) in load(folder).items() if kind == "balance_bias"
    }  # fmt: skip
    tokens = torch.randint(0, config.model.vocab_size, (4, 12), generator=torch.Generator().manual_seed(3))
    assert config.moe.dropless
    return forward(config, weights, tokens, biases=biases)[0]
