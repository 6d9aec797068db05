"""The links between a megamoe model and a Hugging Face class, from the parameter table and the class's names."""

from collections.abc import Collection
from dataclasses import dataclass, field

from megamoe.checkpoint.slices import Box, whole_box
from megamoe.config.schema import Config
from megamoe.convert.hf_families.names import FfnNames, Names
from megamoe.convert.links import WEIGHT, Constant, Duplicate, Link, Ours, Padding
from megamoe.errors import ConversionError
from megamoe.topology.parameters import HEAD, dimensions, experts_by_layer, padded_vocab_size, param_table

BALANCE_BIAS = "balance_bias"


@dataclass
class Tables:
    """Both sides' tensors by shape, and what joins them; grows as the model is walked through."""

    ours: dict[Ours, tuple[int, ...]] = field(default_factory=dict)
    theirs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    paddings: list[Padding] = field(default_factory=list)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.ours[WEIGHT, name]

    def join(self, name: str, index: tuple[int, ...], theirs: str) -> None:
        """Our tensor, or its part at `index` of the first dimensions, is the whole of theirs."""
        shape = self.shape(name)
        box = (*((i, i + 1) for i in index), *whole_box(shape[len(index) :]))
        self.theirs[theirs] = shape[len(index) :]
        self.links.append(Link((WEIGHT, name), box, theirs, whole_box(self.theirs[theirs])))

    def join_linear(self, name: str, index: tuple[int, ...], theirs: str) -> None:
        """As `join`, for the weight and, where there is one, the bias."""
        for ending in ("weight", "bias"):
            if (WEIGHT, f"{name}.{ending}") in self.ours:
                self.join(f"{name}.{ending}", index, f"{theirs}.{ending}")


def build_tables(config: Config, names: Names, their_vocab: int, stored: Collection[str] | None = None) -> Tables:
    """Names and shapes of both sides, and the links.

    `stored` are the names found in a folder, where there is one: they say whether experts are stacked and whether
    tied weights are stored twice. Raises ConversionError where the vocabularies do not go together.
    """
    tables, stored = Tables(), frozenset(stored or ())
    tables.ours = {(WEIGHT, p.name): p.shape for p in param_table(config.model, config.moe)}
    stacked = names.stacked is not None and any(name.endswith(names.stacked.gate_up) for name in stored)
    _vocabulary(tables, config, names, their_vocab, stored)
    num_experts = experts_by_layer(config.model, config.moe)
    for layer in range(config.model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}."
        tables.join_linear(f"{ours}.attention_norm", (), theirs + names.attention_norm)
        _attention(tables, config, names, ours, theirs)
        tables.join_linear(f"{ours}.ffn_norm", (), theirs + names.ffn_norm)
        if layer not in num_experts:
            _ffn(tables, f"{ours}.ffn", (), names.ffn.under(theirs))
        elif stacked:
            _stacked_experts(tables, names, ours, theirs)
        else:
            _experts(tables, names, ours, theirs)
        if layer in num_experts:
            _beside_experts(tables, config, names, ours, theirs)
    tables.join_linear("final_norm", (), names.final_norm)
    return tables


def _vocabulary(tables: Tables, config: Config, names: Names, their_vocab: int, stored: Collection[str]) -> None:
    rows, size = padded_vocab_size(config.model), config.model.hidden_size
    if not config.model.vocab_size <= their_vocab <= rows:
        raise ConversionError(
            f"the model has {config.model.vocab_size} token ids in {rows} rows, but vocab_size of the other format is "
            f"{their_vocab}: give one between the two"
        )
    pairs = [("embedding.weight", names.embedding)]
    if config.model.num_labels:
        tables.join(HEAD, (), names.head)
    elif not config.model.tie_embeddings:
        pairs.append(("output.weight", names.output))
    elif names.output in stored:
        tables.theirs[names.output] = (their_vocab, size)
        tables.duplicates.append(Duplicate(names.output, names.embedding))
    for ours, theirs in pairs:
        tables.theirs[theirs] = (their_vocab, size)
        box: Box = ((0, their_vocab), (0, size))
        tables.links.append(Link((WEIGHT, ours), box, theirs, box))
        if their_vocab < rows:
            reason = f"no token has the ids {their_vocab} to {rows - 1}"
            tables.paddings.append(Padding((WEIGHT, ours), ((their_vocab, rows), (0, size)), reason))


def _attention(tables: Tables, config: Config, names: Names, ours: str, theirs: str) -> None:
    sizes = dimensions(config.model, config.moe)
    head, per_group = sizes.head_dim, sizes.heads // sizes.query_groups
    for ending in ("weight", "bias"):
        fused = f"{ours}.attention.qkv.{ending}"
        if (WEIGHT, fused) not in tables.ours:
            continue
        inner = tables.shape(fused)[1:]
        # a group of ours: its query heads, its key head, its value head
        for part, heads, before in (("q", per_group, 0), ("k", 1, per_group), ("v", 1, per_group + 1)):
            name = f"{theirs}self_attn.{part}_proj.{ending}"
            tables.theirs[name] = (sizes.query_groups * heads * head, *inner)
            view = order = None
            if names.interleaved_rope and part != "v":
                # (head, half, pair) -> (head, pair, half): their neighbours are our halves
                view = (heads, 2, head // 2, *inner)
                order = (0, 2, 1, *range(3, len(view)))
            for group in range(sizes.query_groups):
                first = (group * (per_group + 2) + before) * head
                our_box = ((first, first + heads * head), *whole_box(inner))
                their_box = ((group * heads * head, (group + 1) * heads * head), *whole_box(inner))
                tables.links.append(Link((WEIGHT, fused), our_box, name, their_box, view, order))
    for norm in ("q_norm", "k_norm"):
        tables.join_linear(f"{ours}.attention.{norm}", (), f"{theirs}self_attn.{norm}")
    tables.join_linear(f"{ours}.attention.out", (), theirs + names.attention_out)


def _ffn(tables: Tables, ours: str, index: tuple[int, ...], names: FfnNames) -> None:
    """A dense FFN, or the expert number `index` of a stack; SwiGLU keeps the gate at 0 and the linear half at 1."""
    if names.gate is None:
        tables.join_linear(f"{ours}.fc1", index, names.up)
    else:
        tables.join_linear(f"{ours}.fc1", (*index, 0), names.gate)
        tables.join_linear(f"{ours}.fc1", (*index, 1), names.up)
    tables.join_linear(f"{ours}.fc2", index, names.down)


def _experts(tables: Tables, names: Names, ours: str, theirs: str) -> None:
    tables.join(f"{ours}.router.weight", (), f"{theirs}{names.router}.weight")
    num_experts = tables.shape(f"{ours}.router.weight")[0]
    for expert in range(num_experts):
        prefix = names.experts.under(theirs)
        numbered = (part and part.format(expert=expert) for part in (prefix.gate, prefix.up, prefix.down))
        _ffn(tables, f"{ours}.experts", (expert,), FfnNames(*numbered))
    _zero_bias(tables, names.zero_bias, theirs, num_experts)


def _stacked_experts(tables: Tables, names: Names, ours: str, theirs: str) -> None:
    stacked = names.stacked
    tables.join(f"{ours}.router.weight", (), f"{theirs}{stacked.router}.weight")
    num_experts, _, ffn, hidden = tables.shape(f"{ours}.experts.fc1.weight")
    for part, name, shape in (
        ("fc1", stacked.gate_up, (num_experts, 2 * ffn, hidden)),
        ("fc2", stacked.down, (num_experts, hidden, ffn)),
    ):
        ours_key = (WEIGHT, f"{ours}.experts.{part}.weight")
        tables.theirs[theirs + name] = shape
        tables.links.append(Link(ours_key, whole_box(tables.ours[ours_key]), theirs + name, whole_box(shape)))
    _zero_bias(tables, stacked.zero_bias, theirs, num_experts)


def _zero_bias(tables: Tables, name: str | None, theirs: str, num_experts: int) -> None:
    if name is not None:
        tables.theirs[theirs + name] = (1, num_experts)
        tables.constants.append(Constant(theirs + name, 0.0))


def _beside_experts(tables: Tables, config: Config, names: Names, ours: str, theirs: str) -> None:
    """The shared expert, what weighs it, and the bias that balances the load."""
    if config.moe.shared_expert_ffn_hidden_size is not None:
        _ffn(tables, f"{ours}.shared_expert", (), names.shared.under(theirs))
        if config.moe.shared_expert_mix != "add":
            tables.join_linear(f"{ours}.shared_expert_mix", (), theirs + names.shared_mix)
    if config.moe.balance_bias_update_rate > 0:
        key, shape = (BALANCE_BIAS, f"{ours}.router"), tables.shape(f"{ours}.router.weight")[:1]
        tables.ours[key] = tables.theirs[theirs + names.balance_bias] = shape
        tables.links.append(Link(key, whole_box(shape), theirs + names.balance_bias, whole_box(shape)))
