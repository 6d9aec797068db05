"""How moe_layer.py measures, and what it holds layers against: floors, memory that activations must take, routing.

    S tokens   E experts   d hidden   f ffn   k choices   T kept assignments, sorted by expert
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from moe_layer_competitors import Contestant, Problem, Shape, choices, make_problem, ours
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# A token counts as different where its output differs by more than this share of its length.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

# ---------------------------------------------------------------- time


@dataclass
class Row:
    """One contestant of one race."""

    name: str
    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # share of the machine's cores that other processes took
    differing_tokens: float | None = None  # share of tokens whose output is not that of ours
    gradient_difference: float | None = None  # largest relative difference of dx, router and expert gradients
    note: str = ""

    def ratio(self, other: "Row") -> float:
        """Median over rounds of this row's time over the other's."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=False))

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def best_milliseconds(self) -> float:
        return 1e3 * min(self.seconds)


def busy_core_seconds() -> float:
    """Of all processes on this machine since it started (0 where the kernel does not tell)."""
    try:
        ticks = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks


def timed(contestant: Contestant, clock: str = "wall") -> tuple[float, float, Any]:
    """Seconds of a step by the "wall" or by this process's "cpu" time, others' share of the cores, the step's value."""
    contestant.prepare()
    busy, own, start = busy_core_seconds(), time.process_time(), time.perf_counter()
    out = contestant.step()
    seconds = time.perf_counter() - start
    own = time.process_time() - own
    others = max(0.0, busy_core_seconds() - busy - own) / (seconds * os.cpu_count())
    return own if clock == "cpu" else seconds, others, out


class Patience:
    """Seconds left for steps that other processes disturbed."""

    def __init__(self, seconds: float, clock: str) -> None:
        self.left, self.clock = seconds, clock

    def undisturbed(self, contestant: Contestant) -> tuple[float, float]:
        """Seconds of a step and the others' share: the calmest of up to five tries."""
        tries: list[tuple[float, float]] = []
        while not tries or (tries[-1][0] > 0.05 and self.left > 0.0 and len(tries) < 5):
            seconds, others, _ = timed(contestant, self.clock)
            contestant.clean()
            if tries:
                self.left -= seconds
            tries.append((others, seconds))
        others, seconds = min(tries)
        return seconds, others


def compare(row: Row, results: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Fill in how far `results` are from those of ours."""
    if "y" in results:
        ours, theirs = reference["y"].float(), results["y"].float()
        tolerance = TOLERANCE[reference["y"].dtype]
        differs = (ours - theirs).norm(dim=-1) > tolerance * ours.norm(dim=-1).clamp(min=1e-6)
        row.differing_tokens = differs.float().mean().item()
    row.gradient_difference = max(
        ((results[key].float() - reference[key].float()).norm() / reference[key].float().norm()).item()
        for key in results
        if key != "y"
    )


# ---------------------------------------------------------------- floors


def kept_assignments(problem: Problem, *, dropless: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Token and choice [T] of each kept assignment sorted by expert, and the rows of each expert."""
    s = problem.shape
    expert = choices(problem).t().flatten()  # choice-major
    order = expert.argsort(stable=True)
    counts = expert.bincount(minlength=s.experts)
    if not dropless:
        capacity = s.top_k * -(-s.tokens // s.experts)
        place = torch.arange(expert.numel()) - (counts.cumsum(0) - counts)[expert[order]]
        order, counts = order[place < capacity], counts.clamp(max=capacity)
    return order % s.tokens, order // s.tokens, counts.tolist()


def _gradient(weight: Tensor, *, accumulate: bool) -> Tensor:
    if accumulate:
        return weight.grad
    weight.grad = torch.empty_like(weight)
    return weight.grad


def _hidden(fc1: Tensor) -> Tensor:
    """[E, f, d] or [E, 2 f, d]."""
    return fc1.flatten(1, -2)


def _weighted_gradient(problem: Problem, token: Tensor, choice: Tensor, grad: Tensor) -> Tensor:
    """Gradient of each kept row [T, d] behind the gates, as the layer's combine hands it to the experts."""
    probability = torch.nn.functional.linear(problem.x, problem.router).float().softmax(-1)
    gate = probability.gather(1, choices(problem))
    kept = torch.zeros_like(gate)
    kept[token, choice] = 1.0
    gate = gate * kept
    gate = gate / gate.sum(-1, keepdim=True).clamp(min=1e-30)
    return (grad * gate[token, choice].unsqueeze(-1)).to(grad.dtype)


def _products(widen: bool) -> tuple[Callable[[Tensor], Tensor], Callable[..., None]]:
    """How operands are read, and a product written (`add`: added) into `out`."""

    def operand(tensor: Tensor) -> Tensor:
        return tensor.float() if widen else tensor

    def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        if widen:
            out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
        elif add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)

    return operand, product


def floor_per_expert(problem: Problem, *, dropless: bool, activation: bool, accumulate: bool) -> Contestant:
    """The six products of each expert on its own rows, results and gradients written where they belong.

    No router, no gather, no autograd; each expert's weights are read once forward and once backward. In bf16, where
    the processor has no bf16 instructions, an expert's operands are widened to fp32 first: faster by far than torch's
    bf16 products there. `activation` adds bias, GELU or SwiGLU and its gradient: what no layer can leave out.
    """
    token, choice, counts = kept_assignments(problem, dropless=dropless)
    fc1, fc2 = problem.fc1.detach().view(problem.fc1.shape), problem.fc2.detach().view(problem.fc2.shape)
    x, grad = problem.x[token], problem.grad[token]
    if activation:  # then the gradients of the weights are the layer's own, and can be compared
        grad = _weighted_gradient(problem, token, choice, grad)
    ffn = problem.shape.ffn
    widen = x.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()

    operand, product = _products(widen)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        h, y = x.new_empty((x.shape[0], _hidden(fc1).shape[1])), torch.empty_like(x)
        a = x.new_empty((x.shape[0], ffn)) if activation else h[:, :ffn]
        start = 0
        for e, rows in enumerate(counts):
            if rows:
                part = slice(start, start := start + rows)
                product(operand(x[part]), operand(_hidden(fc1)[e]).t(), h[part])
                if activation:
                    _activate(h[part], a[part], None if problem.bias1 is None else problem.bias1[e], ffn)
                product(operand(a[part]), operand(fc2[e]).t(), y[part])
                if activation and problem.bias2 is not None:
                    y[part] += problem.bias2[e]
        return h, a, y

    def step() -> None:
        h, a, _ = forward()
        d_fc1, d_fc2 = _hidden(_gradient(fc1, accumulate=accumulate)), _gradient(fc2, accumulate=accumulate)
        dx = torch.empty_like(x)
        start = 0
        for e, rows in enumerate(counts):
            if not rows:
                d_fc1[e].zero_() if not accumulate else None
                d_fc2[e].zero_() if not accumulate else None
                continue
            part = slice(start, start := start + rows)
            g = operand(grad[part])
            da = g @ operand(fc2[e])
            product(g.t(), operand(a[part]), d_fc2[e], accumulate)
            dh = _activation_gradient(da, operand(h[part]), ffn) if activation else operand(h[part])
            if not activation and not problem.gated:
                dh = da
            product(dh, operand(_hidden(fc1)[e]), dx[part])
            product(dh.t(), operand(x[part]), d_fc1[e], accumulate)

    name = f"floor: per expert{' + activation' if activation else ''}, {'dropless' if dropless else 'capacity'}"
    results = (lambda _: {"d fc1": fc1.grad}) if activation else None
    return Contestant(name, step, [fc1, fc2], results, "widened to fp32" if widen else "", accumulates=accumulate)


def _activate(h: Tensor, a: Tensor, bias: Tensor | None, ffn: int) -> None:
    if bias is not None:
        h += bias
    if h.shape[1] == ffn:
        torch._C._nn.gelu(h, out=a)
    else:
        torch.mul(torch.nn.functional.silu(h[:, :ffn]), h[:, ffn:], out=a)


def _activation_gradient(da: Tensor, h: Tensor, ffn: int) -> Tensor:
    if h.shape[1] == ffn:
        return torch.ops.aten.gelu_backward(da, h)
    gate, linear = h[:, :ffn], h[:, ffn:]
    dh = torch.empty_like(h)
    torch.mul(da, torch.nn.functional.silu(gate), out=dh[:, ffn:])
    dh[:, :ffn] = torch.ops.aten.silu_backward(da * linear, gate)
    return dh


def floor_batched(problem: Problem, *, dropless: bool, accumulate: bool) -> Contestant:
    """The six products as batched products over all experts, on as many rows as ours but the same for each expert."""
    rows = -(-sum(kept_assignments(problem, dropless=dropless)[2]) // problem.shape.experts)
    experts, hidden, ffn = problem.shape.experts, problem.shape.hidden, problem.shape.ffn
    fc1, fc2 = problem.fc1.detach().view(problem.fc1.shape), problem.fc2.detach().view(problem.fc2.shape)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(experts, rows, hidden, generator=generator).to(problem.x.dtype) for _ in range(2))

    def weight_gradient(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.baddbmm(out, a, b, out=out) if accumulate else torch.bmm(a, b, out=out)

    def step() -> None:
        w1 = _hidden(fc1)
        h = torch.bmm(x, w1.transpose(1, 2))
        a = h[..., :ffn]
        torch.bmm(a, fc2.transpose(1, 2))
        da = torch.bmm(grad, fc2)
        weight_gradient(grad.transpose(1, 2), a, _gradient(fc2, accumulate=accumulate))
        dh = h if problem.gated else da
        torch.bmm(dh, w1)
        weight_gradient(dh.transpose(1, 2), x, _hidden(_gradient(fc1, accumulate=accumulate)))

    name = f"floor: batched, {'dropless' if dropless else 'capacity'}"
    return Contestant(name, step, [fc1, fc2], accumulates=accumulate, note=f"{rows} rows for each expert")


# ---------------------------------------------------------------- share of routing


class _Passed(nn.Module):
    """Experts that return what they are given."""

    def cut(self, num_chunks: int) -> list[None]:
        return [None] * num_chunks

    def forward(self, buffer: Tensor, *_: Any, **__: Any) -> Tensor:
        return buffer


def without_experts(problem: Problem, *, dropless: bool) -> Contestant:
    """Our layer with the experts taken out: router, dispatch and combine, forward and backward."""
    contestant = ours(problem, dropless=dropless)
    contestant.layer.experts = _Passed()
    kept = {id(p) for p in contestant.layer.parameters()}
    leaves = [leaf for leaf in contestant.leaves if leaf.shape == problem.x.shape or id(leaf) in kept]
    return replace(contestant, name=contestant.name + ", without experts", leaves=leaves, results=None)


# ---------------------------------------------------------------- memory


def _events(tree: list[Any]) -> Iterator[Any]:
    stack = list(tree)
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children)


def peak_bytes(contestant: Contestant) -> int:
    """Most bytes allocated at once during a step beyond what was there before, final gradients not counted.

    From the allocator's own record, so that buffers inside operators count as well.
    """
    contestant.prepare()
    contestant.step()  # what is made once is not extra
    contestant.prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = contestant.step()
    gradients = {leaf.grad.untyped_storage().data_ptr() for leaf in contestant.leaves if leaf.grad is not None}
    del kept
    blocks = [
        (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in _events(record.profiler.kineto_results.experimental_event_tree())
        if str(event.tag).endswith("Allocation")
    ]
    blocks.sort()
    last = {ptr: index for index, (_, ptr, size) in enumerate(blocks) if size > 0 and ptr in gradients}
    live = most = 0
    born: set[int] = set()
    for index, (_, ptr, size) in enumerate(blocks):
        if size > 0:
            if last.get(ptr) == index:
                continue
            born.add(ptr)
        elif ptr in born:
            born.discard(ptr)
        else:
            continue  # something older than the step
        live += size
        most = max(most, live)
    contestant.clean()
    return most


def activation_bytes(problem: Problem, *, dropless: bool) -> int:
    """Dispatched tokens and expert activations: T * (d in + f or 2 f before + f after the activation + d out)."""
    s = problem.shape
    rows = sum(kept_assignments(problem, dropless=dropless)[2])
    width = 2 * s.hidden + s.ffn * (3 if problem.gated else 2)
    return rows * width * problem.x.element_size()


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor any operator returned, and which operator it was."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.where = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() > self.elements:
                self.elements, self.where = tensor.numel(), f"{func} {list(tensor.shape)}"
        return out


def largest_tensor(*, dropless: bool) -> tuple[int, int, str]:
    """Elements of our layer's largest tensor on a probe, S * E * C there, and the operator that made the largest.

    The probe is chosen so that S * E * C is far above all that a layer needs: k * S * f, S * E, the weights.
    """
    shape = Shape(tokens=1031, experts=61, hidden=8, ffn=16, top_k=2)
    capacity = shape.top_k * -(-shape.tokens // shape.experts)
    contestant = ours(make_problem(shape, torch.float32, gated=False), dropless=dropless)
    contestant.prepare()
    with _Largest() as largest:
        contestant.step()
    return largest.elements, shape.tokens * shape.experts * capacity, largest.where
