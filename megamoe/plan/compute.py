"""What a rank computes in one micro-batch: FLOPs by layer, bytes that pass through memory, and the time of both.

    b micro-batch   s sequence   T = b s tokens   t tensor ranks   h hidden   f ffn   E experts   k choices of a token

Attention is counted causally where it is executed, half of s x s, if it is fused; an unfused one computes the whole
square and takes its scores through memory. Model FLOPs (`megamoe.topology.flops`) count either way, as asked.
A product takes the longer of its FLOPs and its operands' way through memory, so that an expert with few rows costs
what reading its weights costs.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megamoe.config.schema import Config
from megamoe.plan.cluster import Cluster
from megamoe.plan.quantities import Load
from megamoe.plan.rows import ExpertRows, expert_rows
from megamoe.plan.states import ELEMENT_BYTES
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import dimensions, experts_by_layer

ATTENTION_BACKWARD = 2.5  # of its forward FLOPs: scores are made again beside four products (FlashAttention, 2022)
SCORE_PASSES = 6  # of unfused attention's scores: written, read and written by softmax and by dropout, read
MASK_BYTES = 40  # moved for each entry of a one-hot [S, E, C] mask in one forward pass (5.5 GB for 134 M of them)
MOE_OVERHEADS = 2.0  # layer overheads that routing and dispatch add


@dataclass(frozen=True)
class Product:
    """`batch` products [rows, inner] x [inner, columns]."""

    rows: float
    columns: float
    inner: float
    batch: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.batch * self.rows * self.columns * self.inner

    def operand_bytes(self, size: int) -> float:
        """Both operands and the result, once each."""
        matrices = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        return self.batch * matrices * size

    @property
    def weight_elements(self) -> float:
        return self.batch * self.inner * self.columns


@dataclass(frozen=True)
class Work:
    """Forward pass of one layer, or of the loss, on one rank: one micro-batch."""

    products: tuple[Product, ...]
    attention_flops: float = 0.0
    score_bytes: float = 0.0  # of unfused attention
    memory_bytes: float = 0.0  # of everything else that is no product
    overheads: float = 1.0
    expert_products: tuple[Product, ...] = ()

    @property
    def flops(self) -> float:
        return sum(p.flops for p in (*self.products, *self.expert_products)) + self.attention_flops


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of one layer's passes in one micro-batch; `expert` is the part of forward in the experts' products."""

    forward: float
    backward: float
    attention: float  # of the forward pass, what selective recompute does again
    expert: float


class Compute:
    """Work and time of one rank of a layout. `fused_attention` and `one_hot_dispatch` say how it is implemented."""

    def __init__(
        self, config: Config, grid: Grid, load: Load, *, fused_attention: bool = True, one_hot_dispatch: bool = False,
        fused_elementwise: bool = True, routed_slices: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.grid, self.load = config, grid, load
        self.sizes = dimensions(config.model, config.moe)
        self.tokens = config.run.micro_batch_size * config.model.seq_length
        self.size = ELEMENT_BYTES[config.run.precision]
        self._fused_attention, self._one_hot = fused_attention, one_hot_dispatch
        self._fused, self._routed_slices = fused_elementwise, routed_slices
        self._layers: dict[int, Work] = {}

    @cached_property
    def experts_by_layer(self) -> dict[int, int]:
        return experts_by_layer(self.config.model, self.config.moe)

    @property
    def routed_tokens(self) -> float:
        """Tokens that one rank routes: its slice of the sequence, or, with expert tensor parallelism, all."""
        routes_all = self.grid.expert_tensor > 1 and not self._routed_slices
        return self.tokens if routes_all else self.tokens / self.grid.tensor

    def rows(self, num_experts: int) -> ExpertRows:
        """Of the fullest expert rank, in one layer, by an engine that is ours."""
        return expert_rows(self.config, self.grid, num_experts, self.load)

    @cached_property
    def most_rows(self) -> ExpertRows:
        """In the layer with the most experts."""
        num_experts = max(self.experts_by_layer.values(), default=0)
        return self.rows(num_experts) if num_experts else ExpertRows(0, 0)

    def layer(self, num_experts: int) -> Work:
        """A layer of `num_experts` experts; 0: a dense one."""
        if num_experts not in self._layers:
            attention = self._attention()
            ffn = self._moe(num_experts) if num_experts else self._dense_ffn(self.sizes.ffn)
            self._layers[num_experts] = replace(
                attention,
                products=(*attention.products, *ffn.products),
                memory_bytes=attention.memory_bytes + ffn.memory_bytes,
                overheads=attention.overheads + ffn.overheads,
                expert_products=ffn.expert_products,
            )
        return self._layers[num_experts]

    @cached_property
    def logits(self) -> Work:
        """Output product and the loss, whose logits are read and written in fp32."""
        columns = self.config.model.num_labels or self.sizes.vocab / self.grid.tensor  # labels are not cut
        product = Product(self.tokens, columns, self.sizes.hidden)
        moved = product.rows * product.columns * (self.size + 4 * 4)
        return Work((product,), memory_bytes=moved)

    def _attention(self) -> Work:
        """Of attention, with the layer's norms and residual sums."""
        sizes, tensor, config = self.sizes, self.grid.tensor, self.config
        queries = sizes.heads * sizes.head_dim / tensor
        keys = 2 * sizes.query_groups * sizes.head_dim / tensor
        qkv = Product(self.tokens, queries + keys, sizes.hidden)
        out = Product(self.tokens, sizes.hidden, queries)
        core = 4.0 * self.tokens * config.model.seq_length * queries
        own = self.tokens / tensor if config.parallel.sequence_parallel else self.tokens
        # Two norms read and write, two residual sums read twice and write; else biases and dropouts pass as well.
        passes = 10 if self._fused else 22
        moved = passes * own * sizes.hidden * self.size
        moved += 2 * self.tokens * (queries + keys) * self.size
        if self._fused_attention:
            return Work((qkv, out), core / 2, memory_bytes=moved)
        scores = self.tokens * config.model.seq_length * sizes.heads / tensor
        return Work((qkv, out), core, SCORE_PASSES * scores * self.size, moved)

    def _dense_ffn(self, ffn: int) -> Work:
        gated = 2 if self.config.model.activation == "swiglu" else 1
        width = ffn / self.grid.tensor
        first = Product(self.tokens, gated * width, self.sizes.hidden)
        second = Product(self.tokens, self.sizes.hidden, width)
        moved = (gated + 1) * self.tokens * width * self.size * (1 if self._fused else 2)
        return Work((first, second), memory_bytes=moved, overheads=0.0)

    def _moe(self, num_experts: int) -> Work:
        sizes, grid, moe = self.sizes, self.grid, self.config.moe
        gated = 2 if self.config.model.activation == "swiglu" else 1
        local, width = num_experts // grid.expert, sizes.expert_ffn / grid.expert_tensor
        rows = self.rows(num_experts).received
        first = Product(rows / local, gated * width, sizes.hidden, local)
        second = Product(rows / local, sizes.hidden, width, local)
        products = [Product(self.routed_tokens, num_experts, sizes.hidden)]
        routed = self.routed_tokens
        moved = (gated + 1) * rows * width * self.size
        moved += 6 * routed * num_experts * 4  # logits, softmax, choice
        # Rows are gathered, put in order of experts, back in that of ranks, and summed: read and written each.
        moved += (7 * routed * moe.top_k + routed) * sizes.hidden * self.size
        if self._one_hot:
            capacity = moe.top_k * routed * moe.capacity_factor / num_experts
            products += [Product(num_experts * capacity, sizes.hidden, routed)] * 2
            moved += MASK_BYTES * routed * num_experts * capacity
        shared = self._dense_ffn(sizes.shared_expert_ffn) if sizes.shared_expert_ffn else Work((), overheads=0.0)
        return Work(
            (*products, *shared.products), memory_bytes=moved + shared.memory_bytes, overheads=MOE_OVERHEADS,
            expert_products=(first, second),
        )  # fmt: skip


def product_seconds(product: Product, cluster: Cluster, config: Config, extra_bytes: float = 0.0) -> float:
    """The longer of computing and of moving operands, result and `extra_bytes`."""
    efficiency = cluster.efficiency
    rate = cluster.peak(config.run.precision) * efficiency.product
    slow = 1 + efficiency.product_half_size * (1 / product.rows + 1 / product.columns + 1 / product.inner)
    moved = product.operand_bytes(ELEMENT_BYTES[config.run.precision]) + extra_bytes
    return max(product.flops * slow / rate, moved / (cluster.memory_bytes_per_second * efficiency.memory))


def pass_seconds(work: Work, cluster: Cluster, config: Config) -> PassSeconds:
    """Forward and backward pass. The backward pass has two products for each, and adds to fp32 gradients of weights."""
    efficiency = cluster.efficiency
    memory_rate = cluster.memory_bytes_per_second * efficiency.memory
    dense = sum(product_seconds(p, cluster, config) for p in work.products)
    expert = sum(product_seconds(p, cluster, config) for p in work.expert_products)
    back = 0.0
    for p in (*work.products, *work.expert_products):
        weight = Product(p.inner, p.columns, p.rows, p.batch)
        back += product_seconds(p, cluster, config)
        back += product_seconds(weight, cluster, config, extra_bytes=8 * p.weight_elements)
    core = work.attention_flops / (cluster.peak(config.run.precision) * efficiency.attention)
    scores = work.score_bytes / memory_rate
    moved = work.memory_bytes / memory_rate
    overhead = work.overheads * efficiency.layer_overhead_seconds
    return PassSeconds(
        forward=dense + expert + core + scores + moved + overhead,
        backward=back + ATTENTION_BACKWARD * core + 2 * (scores + moved + overhead),
        attention=core + scores,
        expert=expert,
    )
