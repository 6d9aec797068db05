"""Our MoE layer with a shared expert beside the layers it follows: DeepSpeed's, Qwen2-MoE's and DeepSeek-V3's own."""

import contextlib
import io
from functools import cache
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

from megamoe.config.schema import Config
from megamoe.model import cpu_bridge
from megamoe.model.transformer_config import transformer_config
from megamoe.moe.exchange import Exchange
from megamoe.moe.layer import EvaluationMode, ExpertParallel, MoEContext, MoELayer
from megamoe.moe.losses import LossScale
from megamoe.moe.shared import SharedExpert
from megamoe.moe.statistics import LoadStatistics
from tests.harness import run_ranks

SEQ, BATCH, HIDDEN, FFN, SHARED, EXPERTS = 6, 3, 8, 12, 20, 4


def our_layer(activation: str, shared: int, **moe: Any) -> MoELayer:
    """One layer in a group of one, with random weights."""
    config = Config.model_validate({
        "model": {"num_layers": 1, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 2,
                  "activation": activation, "use_bias": activation == "gelu"},
        "moe": {"num_experts": EXPERTS, "dropless": True, "balance_loss_coeff": 0.0,
                "shared_expert_ffn_hidden_size": shared, **moe},
    })  # fmt: skip
    context = MoEContext(
        config=config.moe, hidden_size=HIDDEN, expert_ffn_hidden_size=FFN, activation=activation,
        use_bias=activation == "gelu", dtype=torch.float32, device="cpu",
        parallel=ExpertParallel(Exchange(), 1, None, 1, 1, 0, False), loss_scale=LossScale(),
        statistics=LoadStatistics(), evaluation=EvaluationMode(),
    )  # fmt: skip

    def beside(core: Any) -> SharedExpert:
        return SharedExpert(
            core, ffn_hidden_size=shared, mix=config.moe.shared_expert_mix, tensor_group=dist.group.WORLD
        )

    core = transformer_config(config)
    layer = MoELayer(core, context=context, layer=0, num_experts=EXPERTS, shared_expert=beside)
    assert core.ffn_hidden_size == FFN  # the dense layers' configuration is as it was
    return random_weights(layer)


def random_weights(module: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5)
    return module


def set_weights(pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours.view_as(theirs))


def as_deepspeed() -> tuple[MoELayer, nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    """The residual MoE with one expert per token, as PR-MoE trains it; DeepSpeed's Linear, GELU, Linear experts."""
    ours = our_layer("gelu", FFN, top_k=1, normalize_gates=False, shared_expert_mix="residual")
    expert = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = MoE(HIDDEN, expert, EXPERTS, k=1, capacity_factor=float(EXPERTS), use_residual=True, use_rts=False)
        theirs.set_deepspeed_parallelism()
    shared = ours.shared_expert
    pairs = [
        (theirs.deepspeed_moe.gate.wg.weight, ours.router.weight),
        (theirs.coefficient.weight, shared.mixing.weight), (theirs.coefficient.bias, shared.mixing.bias),
        (theirs.mlp[0].weight, shared.linear_fc1.weight), (theirs.mlp[0].bias, shared.linear_fc1.bias),
        (theirs.mlp[2].weight, shared.linear_fc2.weight), (theirs.mlp[2].bias, shared.linear_fc2.bias),
    ]  # fmt: skip
    set_weights(pairs)
    for e, network in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
        fc1, fc2 = ours.experts.fc1, ours.experts.fc2
        set_weights([(network[0].weight, fc1.weight[e]), (network[0].bias, fc1.bias[e]),
                     (network[2].weight, fc2.weight[e]), (network[2].bias, fc2.bias[e])])  # fmt: skip
    return ours, theirs, pairs


def as_qwen2() -> tuple[MoELayer, nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    ours = our_layer("swiglu", SHARED, normalize_gates=False, shared_expert_mix="sigmoid_gate")
    theirs = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=FFN, shared_expert_intermediate_size=SHARED,
                       num_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=False, hidden_act="silu")
    )  # fmt: skip
    return ours, theirs, pair_up(ours, theirs, theirs.shared_expert, theirs.shared_expert_gate.weight)


def as_deepseek() -> tuple[MoELayer, nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    """Two shared experts of FFN size FFN, which are one of twice the size."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    ours = our_layer("swiglu", 2 * FFN, score_function="sigmoid", routed_scaling_factor=2.5)
    theirs = DeepseekV3MoE(
        DeepseekV3Config(hidden_size=HIDDEN, moe_intermediate_size=FFN, n_shared_experts=2, n_routed_experts=EXPERTS,
                         num_experts_per_tok=2, n_group=1, topk_group=1, norm_topk_prob=True,
                         routed_scaling_factor=2.5, hidden_act="silu")
    )  # fmt: skip
    return ours, theirs, pair_up(ours, theirs, theirs.shared_experts, None)


def pair_up(
    ours: MoELayer, theirs: nn.Module, mlp: nn.Module, gate: nn.Parameter | None
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Give a Hugging Face block our weights; return the pairs of equal shape whose gradients can be compared."""
    shared, size = ours.shared_expert, mlp.gate_proj.weight.shape[0]
    set_weights([(mlp.gate_proj.weight, shared.linear_fc1.weight[:size]),
                 (mlp.up_proj.weight, shared.linear_fc1.weight[size:])])  # fmt: skip
    pairs = [
        (theirs.gate.weight, ours.router.weight), (mlp.down_proj.weight, shared.linear_fc2.weight),
        (theirs.experts.gate_up_proj, ours.experts.fc1.weight), (theirs.experts.down_proj, ours.experts.fc2.weight),
        *([] if gate is None else [(gate, shared.mixing.weight)]),
    ]  # fmt: skip
    set_weights(pairs)
    return pairs


LAYERS = {"deepspeed residual": as_deepspeed, "qwen2-moe": as_qwen2, "deepseek-v3": as_deepseek}


def on_rank() -> dict[str, Any]:
    cpu_bridge.apply()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)  # joins what torch has begun
    torch.manual_seed(1)
    return {name: compare(*build()) for name, build in LAYERS.items()} | {"split": of_two(), "kinds": kinds()}


def compare(
    ours: MoELayer, theirs: nn.Module, pairs: list[tuple[nn.Parameter, nn.Parameter]]
) -> list[tuple[Tensor, Tensor]]:
    """(theirs, ours) of the output, the gradient of the input, and the gradients of the paired parameters."""
    x, upstream = torch.randn(SEQ, BATCH, HIDDEN), torch.randn(SEQ, BATCH, HIDDEN)
    found = []
    for layer in (theirs, ours):
        hidden = x.clone().requires_grad_()
        y = layer(hidden)
        y = y[0] if isinstance(y, tuple) else y
        (y * upstream).sum().backward()
        found.append([y.detach(), hidden.grad])
    results = list(zip(*found, strict=True))
    return results + [(a.grad.detach(), b.grad.detach().view_as(a)) for a, b in pairs]


def of_two() -> tuple[Tensor, Tensor]:
    """One shared expert of 2 FFN, and the sum of two of FFN made of its halves."""
    layer = our_layer("swiglu", 2 * FFN)
    shared, x = layer.shared_expert, torch.randn(SEQ, BATCH, HIDDEN)
    gate, up = shared.linear_fc1.weight.view(2, 2 * FFN, HIDDEN).detach()
    parts = zip(gate.split(FFN), up.split(FFN), shared.linear_fc2.weight.detach().split(FFN, dim=1), strict=True)
    return shared(x).detach(), sum(F.linear(F.silu(x @ g.T) * (x @ u.T), down) for g, u, down in parts)


def kinds() -> dict[str, bool]:
    """Whether DeepSpeed takes each parameter for an expert's."""
    layer = our_layer("gelu", SHARED, shared_expert_mix="residual")
    return {name: is_moe_param(parameter) for name, parameter in layer.named_parameters()}


@cache
def launch() -> dict[str, Any]:
    return run_ranks(on_rank, 1)[0]


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_equal_the_other_layers(name: str) -> None:
    results = launch()[name]
    assert len(results) >= 6
    for theirs, ours in results:
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_one_shared_expert_of_twice_the_size_is_two() -> None:
    torch.testing.assert_close(*launch()["split"], rtol=1e-5, atol=1e-5)


def test_only_the_routed_experts_are_expert_parameters() -> None:
    found = launch()["kinds"]
    assert {name for name, is_expert in found.items() if is_expert} == {
        f"experts.{matrix}.{leaf}" for matrix in ("fc1", "fc2") for leaf in ("weight", "bias")
    }
    assert {"shared_expert.linear_fc2.bias", "shared_expert.mixing.weight", "shared_expert.mixing.bias"} <= found.keys()
