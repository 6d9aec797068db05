"""The contestants of moe_layer.py: ours, the floors, DeepSpeed, Hugging Face and Megatron-core, on the same weights.

    S tokens   E experts   d hidden   f ffn   k choices   T = at most S * k kept assignments

Every contestant reads the same storage: no weight is copied, so 512 experts are in memory once. Gradients are thrown
away after each step (or, with `accumulate`, added to what is there, as in every micro-batch but the first).
"""

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.config.schema import MoEConfig

COEFFICIENT = 0.01  # of the balance loss, where the other side has one


class CannotRun(Exception):
    """This contestant cannot run this problem; the message says what stops it."""


@dataclass(frozen=True)
class Shape:
    """One MoE layer and its load: S, E, d, f, k."""

    tokens: int
    experts: int
    hidden: int
    ffn: int
    top_k: int

    def __str__(self) -> str:
        return f"S={self.tokens} E={self.experts} d={self.hidden} ffn={self.ffn} k={self.top_k}"


@dataclass
class Problem:
    """Tokens, output gradient and weights; `gated` is SwiGLU without biases, otherwise GELU with them."""

    shape: Shape
    gated: bool
    x: Tensor  # [S, d]; column 0 is constant, so that column 0 of the router is a bias per expert
    grad: Tensor  # [S, d] of the output
    router: Tensor  # [E, d]
    fc1: Tensor  # [E, f, d], or [E, 2, f, d]
    fc2: Tensor  # [E, d, f]
    bias1: Tensor | None  # [E, f]
    bias2: Tensor | None  # [E, d]

    @property
    def family(self) -> str:
        return "swiglu" if self.gated else "gelu+bias"

    @property
    def coefficient(self) -> float:
        return 0.0 if self.gated else COEFFICIENT


def make_problem(shape: Shape, dtype: torch.dtype, *, gated: bool, seed: int = 0) -> Problem:
    """Random tokens and weights under `seed`. The random router loads experts nearly, not exactly, evenly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.empty(size).normal_(0.0, std, generator=generator).to(dtype)

    e, d, f = shape.experts, shape.hidden, shape.ffn
    x, router = normal(2 * shape.tokens, d, std=1.0), normal(e, d, std=d**-0.5)
    x[:, 0], router[:, 0] = 1.0, 0.0
    # The half whose choices are clearest: layers that round the scores in different places still choose alike.
    best = F.linear(x.float(), router.float()).topk(min(e, shape.top_k + 1), dim=-1).values
    gaps = torch.minimum(best[:, 0] - best[:, 1], best[:, -2] - best[:, -1])
    x = x[gaps.argsort(descending=True, stable=True)[: shape.tokens].sort().values]
    return Problem(
        shape=shape, gated=gated, x=x, grad=normal(shape.tokens, d, std=1.0), router=router,
        fc1=normal(*((e, 2, f, d) if gated else (e, f, d)), std=d**-0.5), fc2=normal(e, d, f, std=f**-0.5),
        bias1=None if gated else normal(e, f, std=0.1), bias2=None if gated else normal(e, d, std=0.1),
    )  # fmt: skip


def choices(problem: Problem) -> Tensor:
    """[S, k] experts of each token, best first; the lower index wins a tie, as in our layer."""
    scores = F.linear(problem.x, problem.router).float()
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, : problem.shape.top_k]


def demand(problem: Problem) -> Tensor:
    """[E] how many choices fall on each expert."""
    return choices(problem).flatten().bincount(minlength=problem.shape.experts)


def impose_load(problem: Problem, *, zipf: bool) -> None:
    """Set the router's biases so that expert e gets a share ~ 1 / (e + 1) of the choices, or all the same share.

    No expert can be chosen twice by a token: no share exceeds 1 / k.
    """
    experts = problem.shape.experts
    share = 1.0 / torch.arange(1, experts + 1) if zipf else torch.ones(experts)
    share /= share.sum()
    for _ in range(experts if zipf else 0):
        share = share.clamp(max=0.98 / problem.shape.top_k)
        share /= share.sum()
    logits = F.linear(problem.x[:, 1:].float(), problem.router[:, 1:].float())
    bias = torch.zeros(experts)
    for step in range(80):
        chosen = (logits + bias).topk(problem.shape.top_k, dim=-1, sorted=False).indices.flatten()
        got = (chosen.bincount(minlength=experts) + 0.1) / chosen.numel()
        bias += (0.5 if step < 40 else 0.2) * (share / got).log()
    problem.router[:, 0] = (bias - bias.mean()).to(problem.router.dtype)


@dataclass
class Contestant:
    """`step` is one forward and backward pass; `leaves` are the tensors whose gradients it makes."""

    name: str
    step: Callable[[], Any]
    leaves: list[Tensor]
    results: Callable[[Any], dict[str, Tensor]] | None = None  # of what `step` returned: to compare with ours
    note: str = ""
    layer: Any = None
    accumulates: bool = field(default=False)

    def prepare(self) -> None:
        """Put gradients in the state a step starts from; not timed."""
        for leaf in self.leaves:
            if self.accumulates:
                leaf.grad = torch.zeros_like(leaf)
            else:
                leaf.grad = None

    def clean(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def _layer_contestant(
    name: str, problem: Problem, layer: nn.Module, forward: Callable[[Tensor], Any], fc1_grad: Callable[[], Tensor],
    router: Tensor, note: str = "",
) -> Contestant:  # fmt: skip
    x = problem.x.detach().clone().requires_grad_()

    def step() -> Tensor:
        y, loss = forward(x)
        if loss is None:
            y.backward(problem.grad.view_as(y))
        else:
            torch.autograd.backward([y, loss], [problem.grad.view_as(y), torch.tensor(problem.coefficient)])
        return y.detach()

    def results(y: Tensor) -> dict[str, Tensor]:
        return {"y": y.view_as(x), "dx": x.grad, "d router": router.grad, "d fc1": fc1_grad()}

    return Contestant(name, step, [x, *layer.parameters()], results, note, layer)


# ---------------------------------------------------------------- ours


def ours(problem: Problem, *, dropless: bool) -> Contestant:
    """megamoe's MoELayer without process groups."""
    from megamoe.moe.exchange import Exchange
    from megamoe.moe.layer import EvaluationMode, ExpertParallel, MoEContext, MoELayer
    from megamoe.moe.losses import LossScale
    from megamoe.moe.statistics import LoadStatistics

    s = problem.shape
    config = MoEConfig(
        num_experts=s.experts, top_k=s.top_k, dropless=dropless, capacity_factor=1.0,
        balance_loss="first_choice" if s.top_k <= 2 else "all_choices", balance_loss_coeff=problem.coefficient,
    )  # fmt: skip
    context = MoEContext(
        config=config, hidden_size=s.hidden, expert_ffn_hidden_size=s.ffn,
        activation="swiglu" if problem.gated else "gelu", use_bias=problem.bias1 is not None,
        dtype=problem.x.dtype, device="meta", parallel=ExpertParallel(Exchange(), 1, None, 1, 1, 0, False),
        loss_scale=LossScale(), statistics=LoadStatistics(), evaluation=EvaluationMode(),
    )  # fmt: skip
    layer = MoELayer(None, context=context, layer=0, num_experts=s.experts)
    weights = {
        "router.weight": problem.router, "experts.fc1.weight": problem.fc1, "experts.fc2.weight": problem.fc2,
        "experts.fc1.bias": problem.bias1, "experts.fc2.bias": problem.bias2,
    }  # fmt: skip
    for name, _ in list(layer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, nn.Parameter(weights[name]))
    return _layer_contestant(
        f"ours, {'dropless' if dropless else 'capacity'}", problem, layer, lambda x: layer(x.unsqueeze(1)),
        lambda: layer.experts.fc1.weight.grad, layer.router.weight,
    )  # fmt: skip


# ---------------------------------------------------------------- competitors


def join_world() -> None:
    """One gloo rank, DeepSpeed and Megatron-core on it, their start-up messages swallowed."""
    import tempfile

    from megamoe.launch.environment import rank_environment
    from megamoe.training.distributed import initialize_distributed

    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    rendezvous = os.path.join(tempfile.mkdtemp(), "rendezvous")
    initialize_distributed(rank_environment({**single, "MEGAMOE_INIT_METHOD": f"file://{rendezvous}"}), 60.0)
    from megamoe.model import cpu_bridge

    cpu_bridge.apply()
    import deepspeed

    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def _stack_grads(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def available_bytes() -> int:
    """Memory this machine can still give."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_above(needed_bytes: float, what: str) -> None:
    """Raise CannotRun where `needed_bytes` is more than half of what the machine has left."""
    if needed_bytes > 0.5 * available_bytes():
        raise CannotRun(f"{what} would need {needed_bytes / 2**30:.0f} GiB")


def deepspeed(problem: Problem, *, dropless: bool) -> Contestant:
    """deepspeed.moe.layer.MoE, one rank; experts are Linear, GELU, Linear as its users write them."""
    if problem.gated:
        raise CannotRun("compared with the GELU family only")
    from deepspeed.moe.layer import MoE

    s = problem.shape
    if dropless:
        rows = s.experts * int(demand(problem).max())
        refuse_above(3 * rows * (2 * s.hidden + 2 * s.ffn) * problem.x.element_size(), f"{rows:,} padded rows")
    with torch.device("meta"):
        expert = nn.Sequential(nn.Linear(s.hidden, s.ffn), nn.GELU(), nn.Linear(s.ffn, s.hidden))
    with contextlib.redirect_stdout(io.StringIO()):
        layer = MoE(
            s.hidden, expert, s.experts, ep_size=1, k=s.top_k, capacity_factor=1.0, min_capacity=1,
            drop_tokens=not dropless, use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        layer.set_deepspeed_parallelism()
    layer.deepspeed_moe.gate.wg.weight = nn.Parameter(problem.router)
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    for e, network in enumerate(experts):
        network[0].weight, network[0].bias = nn.Parameter(problem.fc1[e]), nn.Parameter(problem.bias1[e])
        network[2].weight, network[2].bias = nn.Parameter(problem.fc2[e]), nn.Parameter(problem.bias2[e])
    note = "padded to the fullest expert" if dropless else "padded to capacity"
    if not dropless and s.top_k > 2:
        note += "; drops by probability: as many rows, not the same"
    return _layer_contestant(
        f"deepspeed, {'dropless' if dropless else 'capacity'}", problem, layer, lambda x: layer(x)[:2],
        lambda: _stack_grads([network[0].weight for network in experts]), layer.deepspeed_moe.gate.wg.weight, note,
    )  # fmt: skip


def hugging_face(problem: Problem, *, implementation: str) -> Contestant:
    """transformers' MixtralSparseMoeBlock with one of its implementations of the experts."""
    if not problem.gated:
        raise CannotRun("has no GELU experts with biases")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    s = problem.shape
    if implementation == "batched_mm":
        copied = s.tokens * s.top_k * 3 * s.ffn * s.hidden * problem.x.element_size()
        refuse_above(2 * copied, "its copy of the weights for every assignment, and their gradients,")
    config = MixtralConfig(
        hidden_size=s.hidden, intermediate_size=s.ffn, num_local_experts=s.experts, num_experts_per_tok=s.top_k,
        hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        layer = MixtralSparseMoeBlock(config)
    layer.gate.weight = nn.Parameter(problem.router)
    layer.experts.gate_up_proj = nn.Parameter(problem.fc1.flatten(1, 2))
    layer.experts.down_proj = nn.Parameter(problem.fc2)
    return _layer_contestant(
        f"transformers, {implementation}", problem, layer, lambda x: (layer(x.unsqueeze(0)), None),
        lambda: layer.experts.gate_up_proj.grad.view_as(problem.fc1), layer.gate.weight,
    )  # fmt: skip


def megatron(problem: Problem) -> Contestant:
    """Megatron-core's MoELayer with its sequential experts and its all-gather dispatcher, dropless.

    Its grouped experts need the CUDA extension grouped_gemm or Transformer Engine; its all-to-all dispatcher, the only
    one with capacity, makes CUDA streams.
    """
    if not problem.gated:
        raise CannotRun("compared with the SwiGLU family only")
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    s = problem.shape
    config = TransformerConfig(
        num_layers=1, hidden_size=s.hidden, num_attention_heads=4, ffn_hidden_size=s.ffn, num_moe_experts=s.experts,
        moe_ffn_hidden_size=s.ffn, moe_router_topk=s.top_k, moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather", gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, bias_activation_fusion=False, gradient_accumulation_fusion=False,
        perform_initialization=False, use_cpu_initialization=True, params_dtype=problem.x.dtype,
        bf16=problem.x.dtype is torch.bfloat16, moe_router_dtype="fp32",
    )  # fmt: skip
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 defines it only where Transformer Engine is, and reads it always
    with contextlib.redirect_stdout(io.StringIO()):
        spec = get_moe_module_spec(use_te=False, num_experts=s.experts, moe_grouped_gemm=False)
        layer = build_module(spec, config=config)
    layer.router.weight = nn.Parameter(problem.router)
    for e, network in enumerate(layer.experts.local_experts):
        network.linear_fc1.weight = nn.Parameter(problem.fc1[e].flatten(0, 1))
        network.linear_fc2.weight = nn.Parameter(problem.fc2[e])
    return _layer_contestant(
        "megatron-core, sequential", problem, layer, lambda x: (layer(x.unsqueeze(1))[0], None),
        lambda: _stack_grads([n.linear_fc1.weight for n in layer.experts.local_experts]).view_as(problem.fc1),
        layer.router.weight, "no grouped experts without CUDA",
    )  # fmt: skip


def tutel(problem: Problem) -> Contestant:
    """Tutel's layer, where it is installed."""
    try:
        from tutel import moe
    except ImportError as error:
        raise CannotRun("not installed") from error
    if problem.gated:
        raise CannotRun("compared with the GELU family only")
    s = problem.shape
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": s.top_k, "capacity_factor": 1.0}, model_dim=s.hidden,
        experts=SimpleNamespace(type="ffn", count_per_node=s.experts, hidden_size_per_expert=s.ffn).__dict__,
    ).to(problem.x.dtype)  # fmt: skip
    x = problem.x.detach().clone().requires_grad_()

    def step() -> None:
        layer(x).backward(problem.grad)

    return Contestant("tutel, capacity", step, [x, *layer.parameters()], note="its own weights and routing")
