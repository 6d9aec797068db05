"""The table of a Megatron-DeepSpeed model: every tensor of every tensor rank, and the region of ours that it is.

ColumnParallel layers are cut by rows, RowParallel ones by columns, the vocabulary by rows; norms, their biases, the
biases of RowParallel layers, gates and (unless expert tensor parallelism is on) experts are whole on each rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megamoe.checkpoint.slices import Box, whole_box
from megamoe.config.schema import Config
from megamoe.convert.deepspeed_settings import EMBEDDING, qkv_order, training_notes
from megamoe.convert.from_args import PADDING_NOTE, Settings, our_shapes, vocabulary_padding
from megamoe.convert.links import WEIGHT, Conversion, Duplicate, Link, Ours, check_names
from megamoe.errors import ConversionError
from megamoe.topology.parameters import dimensions, experts_by_layer, padded_vocab_size

Shapes = Mapping[str, tuple[int, ...]]
_ENCODER = "language_model.encoder"


@dataclass
class _Table:
    """What is built up: shapes we expect of theirs, links, duplicates."""

    config: Config
    settings: Settings
    theirs: Shapes
    tensor: int
    ours: Mapping[Ours, tuple[int, ...]]
    expected: dict[str, tuple[int, ...]] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)

    def add(
        self, ours: str, box: Box, theirs: str, shape: tuple[int, ...], view: Any = None, order: Any = None
    ) -> None:
        self.expected[theirs] = shape
        self.links.append(Link((WEIGHT, ours), box, theirs, whole_box(shape), view, order))

    def whole(self, ours: str, name: str, *, lead: Box = (), copies: bool = True) -> None:
        """A tensor that the tensor ranks hold whole; those after the first that holds it repeat it.

        `lead`: a part of our leading dimensions that it is, an expert of a stack. `copies`: it must be on every rank.
        """
        shape = self.ours[WEIGHT, ours]
        if self._is_gated(ours):  # gate and linear half, one after the other
            shape = (*shape[: len(lead)], 2 * shape[len(lead) + 1], *shape[len(lead) + 2 :])
        inner, box = shape[len(lead) :], (*lead, *whole_box(self.ours[WEIGHT, ours][len(lead) :]))
        holders = [t for t in range(self.tensor) if copies or f"tp{t}/{name}" in self.theirs] or [0]
        self.add(ours, box, f"tp{holders[0]}/{name}", inner)
        for t in holders[1:]:
            self.expected[f"tp{t}/{name}"] = inner
            self.duplicates.append(Duplicate(f"tp{t}/{name}", f"tp{holders[0]}/{name}"))

    def cut(self, ours: str, name: str, dim: int, *, lead: Box = ()) -> None:
        """A tensor cut over the tensor ranks in our dimension `dim`, counted after `lead`."""
        shape = self.ours[WEIGHT, ours][len(lead) :]
        for t in range(self.tensor):
            part = self._part(shape[dim], t, name)
            box = (*whole_box(shape[:dim]), part, *whole_box(shape[dim + 1 :]))
            theirs = tuple(stop - start for start, stop in box)
            if self._is_gated(ours):  # each rank has its rows of the gate, then of the half
                theirs = (2 * theirs[1], *theirs[2:])
            self.add(ours, (*lead, *box), f"tp{t}/{name}", theirs)

    def vocabulary(self, ours: str, name: str, num_rows: int) -> None:
        hidden = self.ours[WEIGHT, ours][1]
        for t in range(self.tensor):
            part = self._part(num_rows, t, name)
            self.add(ours, (part, (0, hidden)), f"tp{t}/{name}", (part[1] - part[0], hidden))

    def qkv(self, layer: str, name: str, ending: str) -> None:
        """The fused rows of each rank, turned from their order into ours: per query group queries, key, value."""
        sizes, order = dimensions(self.config.model, self.config.moe), qkv_order(self.settings)
        ours = f"{layer}.attention.qkv.{ending}"
        rest = self.ours[WEIGHT, ours][1:]
        per_group = sizes.heads // sizes.query_groups + 2
        for t in range(self.tensor):
            first, last = self._part(sizes.query_groups, t, name)
            rows = per_group * sizes.head_dim
            box = ((first * rows, last * rows), *whole_box(rest))
            shape = ((last - first) * rows, *rest)
            view, axes = (last - first, per_group, sizes.head_dim, *rest), tuple(range(3, 3 + len(rest)))
            turned = {"head": None, "part": (1, 0, 2, *axes), "inner": (0, 2, 1, *axes)}[order]
            self.add(ours, box, f"tp{t}/{name}.{ending}", shape, None if turned is None else view, turned)

    def _is_gated(self, ours: str) -> bool:
        return ".fc1." in ours and self.config.model.activation == "swiglu"

    def _part(self, size: int, t: int, name: str) -> tuple[int, int]:
        if size % self.tensor:
            raise ConversionError(f"{name} has {size} rows, heads or columns, which {self.tensor} ranks do not share")
        return t * size // self.tensor, (t + 1) * size // self.tensor


def conversion_of(config: Config, settings: Settings, theirs: Shapes, tensor: int) -> Conversion:
    """The conversion of tensors `theirs` ("tp{t}/{name}" -> shape) of `tensor` ranks.

    Raises ConversionError for tensors that are missing, unknown or of another shape than their cut of ours.
    """
    table = _Table(config, settings, theirs, tensor, our_shapes(config))
    num_rows = theirs[f"tp0/{EMBEDDING}"][0] * tensor
    table.vocabulary("embedding.weight", EMBEDDING, num_rows)
    for i in range(config.model.num_layers):
        _layer(table, i)
    _norm(table, "final_norm", f"{_ENCODER}.final_layernorm")
    heads = ["embedding.weight"]
    if not config.model.tie_embeddings:
        table.vocabulary("output.weight", "language_model.output_layer.weight", num_rows)
        heads.append("output.weight")
    _repeated(table)
    check_names(table.expected, theirs, settings.where.removesuffix(", args,"))
    for name, shape in table.expected.items():
        if theirs[name] != shape:
            raise ConversionError(f"{settings.where} makes {name} {list(shape)}, but it is {list(theirs[name])}")
    notes = training_notes(settings)
    if padded_vocab_size(config.model) > num_rows:
        notes.append(PADDING_NOTE.format(theirs=num_rows, ours=padded_vocab_size(config.model)))
    return Conversion(
        config=config, their_config=settings.values, ours=table.ours, theirs=dict(theirs), links=tuple(table.links),
        duplicates=tuple(table.duplicates), paddings=tuple(vocabulary_padding(heads, num_rows, table.ours)),
        notes=tuple(notes),
    )  # fmt: skip


def _norm(table: _Table, ours: str, name: str) -> None:
    table.whole(f"{ours}.weight", f"{name}.weight")
    if table.config.model.normalization == "layernorm":
        table.whole(f"{ours}.bias", f"{name}.bias")


def _layer(table: _Table, i: int) -> None:
    model, ours, name = table.config.model, f"layers.{i}", f"{_ENCODER}.layers.{i}"
    _norm(table, f"{ours}.attention_norm", f"{name}.input_layernorm")
    _norm(table, f"{ours}.ffn_norm", f"{name}.post_attention_layernorm")
    attention = _attention_name(table, name)
    table.qkv(ours, f"{attention}.query_key_value", "weight")
    table.cut(f"{ours}.attention.out.weight", f"{attention}.dense.weight", 1)
    if model.use_bias:
        table.qkv(ours, f"{attention}.query_key_value", "bias")
        table.whole(f"{ours}.attention.out.bias", f"{attention}.dense.bias")
    counts = experts_by_layer(model, table.config.moe)
    if i not in counts:
        _ffn(table, f"{ours}.ffn", f"{name}.mlp", is_cut=True)
        return
    table.whole(f"{ours}.router.weight", f"{name}.mlp.deepspeed_moe.gate.wg.weight")
    is_cut = bool(table.settings.get("enable_expert_tensor_parallelism", False))
    for e in range(counts[i]):
        expert = f"{name}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}"
        _ffn(table, f"{ours}.experts", expert, is_cut=is_cut, lead=((e, e + 1),), copies=False)
    if table.config.moe.shared_expert_ffn_hidden_size is not None:
        _ffn(table, f"{ours}.shared_expert", f"{name}.mlp.mlp", is_cut=is_cut)
        for ending in ("weight", "bias"):  # row 0 weighs the experts, row 1 the FFN, on both sides
            table.whole(f"{ours}.shared_expert_mix.{ending}", f"{name}.mlp.coefficient.{ending}")


def _attention_name(table: _Table, layer: str) -> str:
    """Megatron called self_attention only attention at first."""
    old = f"{layer}.attention"
    return old if f"tp0/{old}.dense.weight" in table.theirs else f"{layer}.self_attention"


def _ffn(table: _Table, ours: str, name: str, *, is_cut: bool, lead: Box = (), copies: bool = True) -> None:
    rows = 1 if table.config.model.activation == "swiglu" else 0
    ends = ("weight", "bias") if table.config.model.use_bias else ("weight",)
    for ending in ends:
        if is_cut:
            table.cut(f"{ours}.fc1.{ending}", f"{name}.dense_h_to_4h.{ending}", rows, lead=lead)
        else:
            table.whole(f"{ours}.fc1.{ending}", f"{name}.dense_h_to_4h.{ending}", lead=lead, copies=copies)
    if is_cut:
        table.cut(f"{ours}.fc2.weight", f"{name}.dense_4h_to_h.weight", 1, lead=lead)
    else:
        table.whole(f"{ours}.fc2.weight", f"{name}.dense_4h_to_h.weight", lead=lead, copies=copies)
    if table.config.model.use_bias:  # added once after the sum over ranks: whole on each of them
        table.whole(f"{ours}.fc2.bias", f"{name}.dense_4h_to_h.bias", lead=lead, copies=copies)


def _repeated(table: _Table) -> None:
    """Tied embeddings that a last stage stores again, and experts that the dense file repeats."""
    made = {link.theirs for link in table.links}
    for name, shape in table.theirs.items():
        rank, rest = name.split("/", 1)
        kept = rest.removeprefix("tied/").removeprefix("local/")
        originals = [f"{rank}/{kept}", *(f"tp{t}/{kept}" for t in range(table.tensor))]
        original = next((other for other in originals if other in made), None)
        if kept != rest and original is not None:
            table.expected[name] = shape
            table.duplicates.append(Duplicate(name, original))
