"""Bytes saved for the backward pass: by layer and micro-batch, and of all micro-batches in flight. No torch.

What is counted are the tensors that autograd keeps, each storage once: our own modules (megamoe/model, megamoe/moe) and
Megatron-core's as `megamoe.model.gpt` uses them, not a formula from a paper. `device` "cuda" is torch's fused kernels;
"cpu" is what runs where there is no GPU: RMSNorm in several steps, and 16-bit products in the MoE layer widened to fp32
(on processors without 16-bit instructions). Attention with dropout on a CPU, which saves [s, s] matrices, is not
planned for.

    N rows of a micro-batch, s * b   n rows on this rank between layers: N, or N / t under sequence parallelism
    S rows that this rank routes   T rows it sends to experts   R rows that arrive at its experts
    h hidden   q, v of this rank's query and key heads   e bytes of an element   t tensor parallel size
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megamoe.config.schema import Config
from megamoe.plan.quantities import Load
from megamoe.plan.roles import Chunk, chunks_of
from megamoe.plan.rows import ExpertRows, expert_rows, routed_rows
from megamoe.plan.schedules import in_flight
from megamoe.plan.states import ELEMENT_BYTES, num_micro_batches
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import Dimensions, dimensions

Device = Literal["cuda", "cpu"]


def layer_bytes(
    config: Config,
    world_size: int,
    num_experts: int,
    *,
    load: Load | None = None,
    rows: ExpertRows | None = None,
    device: Device = "cuda",
    with_indices: bool = True,
) -> int:
    """Saved by one transformer layer (num_experts 0: a dense one) for one micro-batch, as parallel.recompute says.

    `rows` overrides what `load` comes to. `with_indices`: the integers that say where rows lie, which our own autograd
    functions hold on to beside what they save. Raises TopologyError or ConfigError where the layout does not fit.
    """
    sizes = _Sizes(config, Grid.from_config(config.parallel, world_size), device)
    if config.parallel.recompute == "full":
        return sizes.boundary
    rows = rows or expert_rows(config, sizes.grid, num_experts, load) if num_experts else None
    return _layer(sizes, num_experts, rows, with_indices=with_indices)


def chunk_bytes(
    config: Config, world_size: int, chunk: Chunk, *, load: Load | None = None, device: Device = "cuda"
) -> int:
    """Saved by a chunk of layers, with embedding, head and loss where it has them, for one micro-batch."""
    sizes = _Sizes(config, Grid.from_config(config.parallel, world_size), device)
    by_kind = {
        num_experts: layer_bytes(config, world_size, num_experts, load=load, device=device)
        for num_experts in set(chunk.num_experts)
    }
    total = sum(by_kind[num_experts] for num_experts in chunk.num_experts)
    return total + (sizes.embedding if chunk.has_embedding else 0) + (sizes.head if chunk.has_head else 0)


def activation_bytes(
    config: Config, world_size: int, pipeline_rank: int, *, load: Load | None = None, device: Device = "cuda"
) -> int:
    """Saved on a rank of a stage when most is, of all micro-batches in flight. Raises as `layer_bytes` does."""
    by_chunk = [
        chunk_bytes(config, world_size, chunk, load=load, device=device) for chunk in chunks_of(config, pipeline_rank)
    ]
    counts = in_flight(
        pipeline=config.parallel.pipeline_parallel_size,
        pipeline_rank=pipeline_rank,
        num_micro_batches=num_micro_batches(config, world_size),
        weights=by_chunk,
    )
    return sum(count * size for count, size in zip(counts, by_chunk, strict=True))


def working_bytes(
    config: Config, world_size: int, pipeline_rank: int, *, load: Load | None = None, device: Device = "cuda"
) -> int:
    """The largest set of tensors that live only inside one layer's backward pass, or in the loss: an estimate."""
    return max(
        loss_working_bytes(config, world_size, pipeline_rank, device=device),
        layer_working_bytes(config, world_size, pipeline_rank, load=load, device=device),
    )


def loss_working_bytes(config: Config, world_size: int, pipeline_rank: int, *, device: Device = "cuda") -> int:
    """The logits in the model's precision and their gradient, on the last stage."""
    sizes = _Sizes(config, Grid.from_config(config.parallel, world_size), device)
    has_head = any(chunk.has_head for chunk in chunks_of(config, pipeline_rank))
    return 2 * sizes.logits * sizes.element if has_head else 0


def layer_working_bytes(
    config: Config, world_size: int, pipeline_rank: int, *, load: Load | None = None, device: Device = "cuda"
) -> int:
    """The gradients around the widest pair of products; under full recompute a layer's saved tensors once more.

    Layers below the head come after it, when what it saved is gone: that is taken off, and the result may be negative.
    """
    sizes = _Sizes(config, Grid.from_config(config.parallel, world_size), device)
    found = []
    for chunk in chunks_of(config, pipeline_rank):
        released = sizes.head if chunk.has_head else 0
        for num_experts in set(chunk.num_experts):
            rows = expert_rows(config, sizes.grid, num_experts, load) if num_experts else None
            again = 0
            if config.parallel.recompute == "full":
                again = _layer(sizes, num_experts, rows, with_indices=True)
            found.append(again + sizes.passing(rows) - released)
    return max(found)


@dataclass(frozen=True)
class _Sizes:
    """Sizes on one rank, and the bytes saved by the parts that are the same in every layer."""

    config: Config
    grid: Grid
    device: Device

    @cached_property
    def dims(self) -> Dimensions:
        return dimensions(self.config.model, self.config.moe)

    @cached_property
    def element(self) -> int:
        return ELEMENT_BYTES[self.config.run.precision]

    @cached_property
    def widened(self) -> int:
        """Bytes of an element where a CPU computes in fp32 instead."""
        return 4 if self.device == "cpu" else self.element

    @cached_property
    def whole_rows(self) -> int:  # N
        return self.config.model.seq_length * self.config.run.micro_batch_size

    @cached_property
    def rows(self) -> int:  # n
        return self.whole_rows // self.grid.tensor if self.config.parallel.sequence_parallel else self.whole_rows

    @cached_property
    def routed_rows(self) -> int:  # S
        return routed_rows(self.config, self.grid)

    @property
    def boundary(self) -> int:
        """What passes between layers."""
        return self.rows * self.dims.hidden * self.element

    @property
    def is_gated(self) -> bool:
        return self.config.model.activation == "swiglu"

    @property
    def logits(self) -> int:
        return self.whole_rows * (self.config.model.num_labels or self.dims.vocab // self.grid.tensor)

    @property
    def dropout_mask(self) -> int:
        if self.config.model.hidden_dropout == 0.0:
            return 0
        return self.rows * self.dims.hidden * (1 if self.device == "cuda" else self.element)

    @property
    def embedding(self) -> int:
        """Token ids, and which of them are another rank's."""
        return self.whole_rows * (8 if self.grid.tensor == 1 else 9) + self.dropout_mask

    @property
    def head(self) -> int:
        """Final norm, output matrix, and the loss: probabilities in fp32, labels and which are another rank's."""
        return self.norm(self.rows, self.dims.hidden) + self.boundary + self.logits * 4 + self.whole_rows * 9

    def norm(self, num_rows: int, width: int) -> int:
        """Input and statistics; RMSNorm in steps widens its input to fp32 and keeps it normalised, too."""
        if self.config.model.normalization == "layernorm":
            return num_rows * width * self.element + num_rows * 2 * (4 if self.device == "cuda" else self.element)
        return self.rms_norm(num_rows, width, is_input_saved=False)

    def rms_norm(self, num_rows: int, width: int, *, is_input_saved: bool) -> int:
        size = num_rows * width
        if self.device == "cuda":
            return num_rows * 4 + (0 if is_input_saved else size * self.element)
        return num_rows * 4 + size * 4 + (0 if is_input_saved and self.element == 4 else size * 4)

    def two_linears(self, num_rows: int, ffn: int) -> int:
        """What a dense FFN saves after its input. Gated: both halves, silu of one, a copy of the other, the product."""
        return num_rows * ffn * self.element * (5 if self.is_gated else 2)

    def passing(self, rows: ExpertRows | None) -> int:
        """Gradients alive together in the backward pass of a layer's FFN: of its output and around the activation."""
        halves = 2 if self.is_gated else 1
        if rows is None:
            widest = self.whole_rows * self.dims.ffn // self.grid.tensor
            return 2 * self.whole_rows * self.dims.hidden * self.element + (1 + halves) * widest * self.element
        widest = rows.received * self.dims.expert_ffn // self.grid.expert_tensor
        moved = (rows.sent + 2 * rows.received) * self.dims.hidden
        return (moved + (1 + halves) * widest) * self.element


def _layer(sizes: _Sizes, num_experts: int, rows: ExpertRows | None, *, with_indices: bool) -> int:
    total = _attention(sizes) + sizes.norm(sizes.rows, sizes.dims.hidden) + 2 * sizes.dropout_mask
    if rows is None:
        return total + sizes.boundary + sizes.two_linears(sizes.whole_rows, sizes.dims.ffn // sizes.grid.tensor)
    total += _moe_input(sizes, num_experts) + _router(sizes, num_experts) + _experts(sizes, num_experts, rows)
    if sizes.dims.shared_expert_ffn is not None:
        total += sizes.two_linears(sizes.whole_rows, sizes.dims.shared_expert_ffn // sizes.grid.tensor) + _mix(sizes)
    if with_indices:  # megamoe.moe.rows.Places
        total += 2 * 8 * sizes.config.moe.top_k * sizes.routed_rows
    return total


def _attention(sizes: _Sizes) -> int:
    model, dims, e = sizes.config.model, sizes.dims, sizes.element
    heads, groups = dims.heads // sizes.grid.tensor, dims.query_groups // sizes.grid.tensor
    big = sizes.whole_rows
    q, v = heads * dims.head_dim, groups * dims.head_dim
    total = sizes.norm(sizes.rows, dims.hidden) + sizes.boundary  # the input of the product for q, k, v
    total += big * (q + 2 * v) * e  # its output, through the values
    # Several queries to a key, and several keys: no view of the product's output.
    copied_queries = big * q * e if heads != groups and groups > 1 else 0
    if model.qk_norm == "full":
        is_view = groups == 1 and e == 4  # of the product's output
        total += big * (e + (0 if is_view else 4)) * (q + v) + 2 * 4 * big
    elif model.qk_norm == "head":
        keeps_input = sizes.element == 4 or sizes.device == "cuda"
        total += copied_queries if keeps_input else 0
        for count in (heads, groups):
            total += sizes.rms_norm(big * count, dims.head_dim, is_input_saved=True)
    if model.position_embedding == "rope":
        total += 4 * model.seq_length * dims.head_dim * e  # cosines and sines, for queries and for keys
    if model.qk_norm != "none" or model.position_embedding == "rope":
        total += big * (q + v) * e  # what attention is handed
    else:
        total += copied_queries
    total += big * q * e  # attention's output
    return total + (4 if sizes.config.parallel.recompute == "selective" else big * heads * 4)  # log of sums


def _moe_input(sizes: _Sizes, num_experts: int) -> int:
    """The layer's normalised input, as whole as its readers need it."""
    moe, hidden, e = sizes.config.moe, sizes.dims.hidden, sizes.element
    has_shared = sizes.dims.shared_expert_ffn is not None
    own = sizes.routed_rows * hidden
    if sizes.widened != e:  # a CPU's router reads its input and weights in fp32
        total = (own + num_experts * hidden) * sizes.widened
        is_same = False
    elif sizes.routed_rows > sizes.rows:  # slices of all tensor ranks, together
        total, is_same = own * e, False
    else:  # the input itself, or a slice of it, which keeps all of it
        total, is_same = sizes.boundary, True
    if moe.input_jitter > 0.0:
        total, is_same = own * (sizes.widened + 4) + (num_experts * hidden * 4 if sizes.widened != e else 0), False
    return total + (sizes.boundary if has_shared and not is_same else 0)


def _router(sizes: _Sizes, num_experts: int) -> int:
    """All in fp32; indices are int64. What only the balance loss needs is let go where it does not count."""
    moe, tokens = sizes.config.moe, sizes.routed_rows
    total = tokens * moe.top_k * (8 + 4)  # choices, and gates as rows are weighed
    total += tokens * num_experts * 4  # what gates are gathered from: probabilities, scores or logits
    is_normalized_first = moe.normalize_gates and (moe.dropless or moe.normalize_when == "before_drops")
    if moe.gate_order == "select_then_softmax" and not is_normalized_first:
        total += tokens * moe.top_k * 4
    if not moe.dropless:
        total += tokens * moe.top_k  # which choices are kept
    if moe.normalize_gates:
        total += tokens * (moe.top_k * 4 + 5)
    if moe.balance_loss_coeff > 0.0:
        total += _balance_loss(sizes, num_experts)
    if moe.z_loss_coeff > 0.0:
        total += tokens * (1 if moe.gate_order == "select_then_softmax" else num_experts + 1) * 4
    return total


def _balance_loss(sizes: _Sizes, num_experts: int) -> int:
    moe, tokens = sizes.config.moe, sizes.routed_rows
    sets = sizes.config.run.micro_batch_size if moe.balance_loss_scope == "sequence" else 1
    shares = num_experts * sets * 4
    if moe.score_function == "sigmoid":
        return shares + 2 * tokens * 4
    return shares + (tokens * num_experts * 4 if moe.gate_order == "select_then_softmax" else 0)


def _experts(sizes: _Sizes, num_experts: int, rows: ExpertRows) -> int:
    """Rows that arrive, what enters the activation, perhaps what leaves it, and the rows that come home."""
    moe, e = sizes.config.moe, sizes.element
    ffn = sizes.dims.expert_ffn // sizes.grid.expert_tensor
    total = (rows.received + rows.sent) * sizes.dims.hidden * e
    total += rows.received * ffn * (2 if sizes.is_gated else 1) * e
    if not moe.recompute_activation and sizes.widened == e:
        is_grouped = sizes.device == "cuda" and sizes.config.run.precision == "bf16"
        total += rows.received * ffn * e * (2 if is_grouped and sizes.is_gated else 1)
    of_chunk = num_experts // sizes.grid.expert // sizes.config.parallel.all_to_all_chunks
    if sizes.grid.expert > 1 and of_chunk > 1:
        total += 2 * 8 * rows.received  # the order of rows by expert, there and back
    return total


def _mix(sizes: _Sizes) -> int:
    """How a shared expert joins: outputs that are weighed, and their weights in fp32 and, if that differs, again."""
    mix, rows = sizes.config.moe.shared_expert_mix, sizes.rows
    if mix == "add":
        return 0
    num_weights = 2 if mix == "residual" else 1
    weight_bytes = 4 if sizes.element == 4 else 4 + sizes.element
    return num_weights * (sizes.boundary + rows * weight_bytes)
