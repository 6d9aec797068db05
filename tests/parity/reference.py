"""The whole of training in plain PyTorch, in one process: what every layout must reproduce.

Nothing here knows a process group, a shard or a stage; nothing is imported from the stack but its configuration.
Weights are full fp32 tensors under the names of the parameter table, gradients come from autograd alone, and the
only trace of a layout is that a capacity drops tokens per rank. Loops are chosen over speed where they read better.

Shapes: b sequences, s positions, d hidden, T = s * b tokens with the position slowest, E experts, k choices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.config.schema import Config, ModelConfig, MoEConfig
from tests.parity.mixture_reference import Mixed, mixture, next_bias

MicroBatch = tuple[Tensor, Tensor]  # tokens [b, s], labels [b, s]
Weights = dict[str, Tensor]


def global_batch(samples: Tensor, micro_batch_size: int, data_parallel_size: int) -> list[list[MicroBatch]]:
    """Deal samples [G, s + 1] out: micro-batch m of data rank r takes rows (m * ranks + r) * b + [0, b)."""
    dealt: list[list[MicroBatch]] = [[] for _ in range(data_parallel_size)]
    for i, rows in enumerate(samples.split(micro_batch_size)):
        dealt[i % data_parallel_size].append((rows[:, :-1], rows[:, 1:]))
    return dealt


def merged(batch: Sequence[Sequence[MicroBatch]]) -> list[MicroBatch]:
    """The m-th micro-batches of all data ranks as one: the loss whose choices are counted over them together."""
    return [
        (torch.cat([tokens for tokens, _ in ranks]), torch.cat([labels for _, labels in ranks]))
        for ranks in zip(*batch, strict=True)
    ]


def norm(x: Tensor, weights: Weights, name: str, model: ModelConfig) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, by `model.normalization`."""
    if model.normalization == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], model.norm_epsilon)
    return rms_norm(x, weights[f"{name}.weight"], model.norm_epsilon)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def sinusoids(seq_length: int, hidden_size: int) -> Tensor:
    """fairseq's table [s, d]: sines in the first half, cosines in the second, positions counted from 2."""
    half = hidden_size // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10_000.0) / (half - 1)))
    angle = torch.arange(2, seq_length + 2, dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of x [b, heads, s, head_dim]; feature i turns with feature i + head_dim / 2."""
    s, head_dim = x.shape[-2:]
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = (torch.arange(s, dtype=torch.float32)[:, None] * frequency).repeat(1, 2)
    left, right = x.chunk(2, dim=-1)
    return x * angle.cos().to(x.dtype) + torch.cat([-right, left], dim=-1) * angle.sin().to(x.dtype)


def attention(x: Tensor, weights: Weights, layer: str, model: ModelConfig) -> Tensor:
    """Causal self-attention of x [b, s, d] from the fused rows: per group its queries, then its key, its value."""
    b, s, _ = x.shape
    num_heads = model.num_attention_heads
    num_groups = model.num_query_groups or num_heads
    head_dim = model.head_dim or model.hidden_size // num_heads
    per_group = num_heads // num_groups
    qkv = linear(x, weights, f"{layer}.attention.qkv").view(b, s, num_groups, per_group + 2, head_dim)
    q = qkv[:, :, :, :per_group].reshape(b, s, num_heads, head_dim)
    k, v = qkv[:, :, :, per_group], qkv[:, :, :, per_group + 1]
    if model.qk_norm == "full":  # one mean square over all heads together
        q, k = q.reshape(b, s, -1), k.reshape(b, s, -1)
    if model.qk_norm != "none":
        q = rms_norm(q, weights[f"{layer}.attention.q_norm.weight"], model.norm_epsilon).view(b, s, -1, head_dim)
        k = rms_norm(k, weights[f"{layer}.attention.k_norm.weight"], model.norm_epsilon).view(b, s, -1, head_dim)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if model.position_embedding == "rope":
        q, k = rotate(q, model.rope_base), rotate(k, model.rope_base)
    k, v = k.repeat_interleave(per_group, dim=1), v.repeat_interleave(per_group, dim=1)
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) * head_dim**-0.5).float().masked_fill(future, -math.inf)
    mixed = scores.softmax(-1).to(v.dtype) @ v
    return linear(mixed.transpose(1, 2).reshape(b, s, num_heads * head_dim), weights, f"{layer}.attention.out")


def feed_forward(x: Tensor, weights: Weights, name: str, activation: str, expert: int | None = None) -> Tensor:
    """fc2(act(fc1(x))) of a dense layer, or of one expert of a stack."""
    tensors = [weights.get(f"{name}.{part}") for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")]
    w1, b1, w2, b2 = (t if t is None or expert is None else t[expert] for t in tensors)
    if activation == "swiglu":
        gate, up = (F.linear(x, w1[i], None if b1 is None else b1[i]) for i in (0, 1))
        return F.linear(F.silu(gate) * up, w2, b2)
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh" if activation == "gelu_tanh" else "none"), w2, b2)


def is_moe(layer: int, moe: MoEConfig) -> bool:
    if isinstance(moe.layer_pattern, int):
        return moe.num_experts > 0 and (layer + 1) % moe.layer_pattern == 0
    return moe.num_experts > 0 and layer in moe.layer_pattern


def forward(
    config: Config, weights: Weights, tokens: Tensor, num_slices: int = 1, biases: dict[int, Tensor] | None = None
) -> tuple[Tensor, dict[int, Mixed]]:
    """Logits [b, s, V], of a classifier [b, s, labels], in fp32, and what each MoE layer made, for tokens [b, s];
    `biases` [E] by layer."""
    model, (b, s) = config.model, tokens.shape
    x = weights["embedding.weight"][tokens]
    if model.scale_embeddings:
        x = x * math.sqrt(model.hidden_size)
    if model.position_embedding == "sinusoidal":
        x = x + sinusoids(s, model.hidden_size).to(x.dtype)
    mixed: dict[int, Mixed] = {}
    for i in range(model.num_layers):
        layer = f"layers.{i}"
        x = x + attention(norm(x, weights, f"{layer}.attention_norm", model), weights, layer, model)
        h = norm(x, weights, f"{layer}.ffn_norm", model)
        if is_moe(i, config.moe):
            flat = h.transpose(0, 1).reshape(s * b, -1)
            bias = biases.get(i) if biases else None
            mixed[i] = mixture(
                flat, weights, layer, config.moe, partial(feed_forward, activation=model.activation),
                num_slices=num_slices, num_sequences=b, bias=bias,
            )  # fmt: skip
            x = x + mixed[i].output.view(s, b, -1).transpose(0, 1)
        else:
            x = x + feed_forward(h, weights, f"{layer}.ffn", model.activation)
    tied = "embedding.weight" if model.tie_embeddings else "output.weight"
    head = weights["score.weight" if model.num_labels else tied]
    return F.linear(norm(x, weights, "final_norm", model), head).float(), mixed


def learning_rate(config: Config, step: int) -> float:
    """Rate of optimizer step `step`, counted from 1: linear from 0 over the warm-up, then by the schedule."""
    o = config.optimizer
    if step < o.warmup_steps:
        return o.lr * step / o.warmup_steps
    end = o.decay_steps if o.decay_steps and o.schedule != "wsd" else config.run.num_steps
    start = o.warmup_steps
    if o.schedule == "wsd":
        start = max(start, end - (o.wsd_decay_steps or max(1, end // 10)))
    progress = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    if o.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return o.lr if o.schedule == "constant" else o.lr + (o.min_lr - o.lr) * progress


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; losses are means over micro-batches and data ranks, the norm is before clipping."""

    lm_loss: float
    balance_loss: float  # summed over layers, without its coefficient
    loss: float
    grad_norm: float
    num_dropped: int  # choices without room, over all layers and micro-batches
    lr: float
    biases: dict[int, Tensor]  # layer -> [E], where the load is balanced by bias


class ReferenceRun:
    """Trains `weights` (copied) by `config`; `dtype` bf16 computes in bf16 over fp32 master weights."""

    def __init__(self, config: Config, weights: Weights, *, dtype: torch.dtype = torch.float32) -> None:
        parallel = config.parallel  # experts cut like the rest route whole sequences; whole experts, a slice per rank
        self.num_slices = 1 if parallel.expert_tensor_parallel_size > 1 else parallel.tensor_parallel_size
        self.config, self.dtype, self.num_steps = config, dtype, 0
        self.weights = {name: w.detach().clone().float().requires_grad_() for name, w in weights.items()}
        self.optimizer = self._optimizer()
        layers = range(config.model.num_layers if config.moe.balance_bias_update_rate else 0)
        routers = {i: f"layers.{i}.router.weight" for i in layers if is_moe(i, config.moe)}
        self.biases = {i: torch.zeros(len(self.weights[name])) for i, name in routers.items()}

    def _optimizer(self) -> torch.optim.Optimizer:
        o, groups = self.config.optimizer, []
        for name, weight in self.weights.items():
            scale = o.expert_lr_scale
            if scale == "inverse_sqrt_experts":  # the first dimension of an expert's tensors numbers the experts
                scale = len(weight) ** -0.5 if ".experts." in name else 1.0
            exempt = not o.decay_norms_and_biases and (name.endswith(".bias") or "norm." in name)
            decay = 0.0 if exempt else o.weight_decay
            groups.append({"params": [weight], "weight_decay": decay, "scale": scale if ".experts." in name else 1.0})
        if o.name == "sgd":
            return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)
        return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)

    def step(self, batch: Sequence[Sequence[MicroBatch]]) -> StepResult:
        """One optimizer step on batch[data rank][micro-batch]; every micro-batch counts the same."""
        o, moe, micro_batches = self.config.optimizer, self.config.moe, [m for rank in batch for m in rank]
        if moe.balance_loss_scope == "global_batch":
            micro_batches = merged(batch)
            assert moe.dropless, "capacity is each rank's own, and these are all ranks' tokens at once"
        loads = {i: torch.zeros_like(bias) for i, bias in self.biases.items()}
        lm_sum, balance_sum, num_dropped = 0.0, 0.0, 0
        self.optimizer.zero_grad()
        for tokens, labels in micro_batches:
            cast = {name: w.to(self.dtype) for name, w in self.weights.items()}
            logits, mixed = forward(self.config, cast, tokens, self.num_slices, self.biases)
            balance_loss, routing_loss = (sum((f(m) for m in mixed.values()), torch.zeros(())) for f in (
                lambda m: m.balance_loss,
                lambda m: moe.balance_loss_coeff * m.balance_loss + moe.z_loss_coeff * m.z_loss,
            ))  # fmt: skip
            lm_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            ((lm_loss + routing_loss) / len(micro_batches)).backward()
            lm_sum, balance_sum = lm_sum + lm_loss.item(), balance_sum + balance_loss.item()
            num_dropped += sum(m.num_dropped for m in mixed.values())
            loads = {i: load + mixed[i].load for i, load in loads.items()}
        if o.expert_grad_scaling == "sqrt_world_size":
            sharing = o.expert_grad_world_size or self.config.parallel.expert_parallel_size
            for name, weight in self.weights.items():
                if ".experts." in name:
                    weight.grad *= math.sqrt(sharing)
        grads = [w.grad for w in self.weights.values()]
        grad_norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        if 0 < o.clip_grad < grad_norm:
            for g in grads:
                g *= o.clip_grad / (grad_norm + 1e-6)
        self.num_steps += 1
        lr = learning_rate(self.config, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        rate = moe.balance_bias_update_rate
        self.biases = {i: next_bias(bias, loads[i], rate) for i, bias in self.biases.items()}
        lm_mean, balance_mean = lm_sum / len(micro_batches), balance_sum / len(micro_batches)
        total = lm_mean + moe.balance_loss_coeff * balance_mean
        return StepResult(lm_mean, balance_mean, total, grad_norm, num_dropped, lr, self.biases)
