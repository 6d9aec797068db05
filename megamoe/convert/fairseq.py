"""fairseq's language models: the dense model.pt, and the mixtures of experts in X-shared.pt and X-rank-N.pt.

Names and shapes are those of fairseq's `moe` branch (transformer_lm, modules/moe): separate q, k and v, fc1 and fc2
with biases, a gate without, pre-LayerNorm, sinusoidal positions. File r of the experts holds the local experts j, which
are the global ones r * n_local + j; with more ranks than experts, rank r holds a copy of expert r mod E.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.slices import whole_box
from megamoe.config.schema import Config
from megamoe.convert.fairseq_settings import (
    SHARED_ONLY,
    config_of,
    refuse_inexpressible,
    settings_of,
    training_notes,
)
from megamoe.convert.from_args import (
    PADDING_NOTE,
    Settings,
    head_links,
    our_shapes,
    vocabulary_padding,
    whole,
)
from megamoe.convert.links import WEIGHT, Constant, Conversion, Duplicate, Link, check_names
from megamoe.convert.pickles import Stored, StoredSource, flat_tensors, open_file
from megamoe.errors import ConversionError
from megamoe.topology.parameters import experts_by_layer, padded_vocab_size

_FILE = re.compile(r"(?P<stem>.+)-(?P<part>shared|rank-(?P<rank>\d+))(?:-shard(?P<shard>\d+))?\.pt")
_EXPERT = re.compile(r"(layers\.\d+\.moe_layer\.experts\.)(\d+)(\..+)")
_LAYER = re.compile(r"layers\.(\d+)\.")
_DECODER = "decoder."  # every tensor of a language model belongs to its decoder


@dataclass(frozen=True)
class _Files:
    """The files of one checkpoint; `ranks` is empty for a dense one. `copies` repeat the shared file."""

    shared: Path
    copies: tuple[Path, ...] = ()
    ranks: tuple[Path, ...] = ()


def open_fairseq(
    path: Path, *, vocab_multiple: int | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[StoredSource, Conversion]:
    """Open a checkpoint of fairseq and find the megamoe model it is.

    path: the folder, the dense file, or any one of the files of a mixture of experts. overrides: settings of the model
    that the file lacks or states wrongly, by fairseq's names, as --model-overrides gives them. The table is proved.

    Raises ConversionError naming the file, tensor or setting that is missing, doubled, damaged or cannot be expressed.
    """
    files = _find(Path(path))
    first = open_file(files.shared)
    settings = settings_of(first.content, str(files.shared), overrides)
    refuse_inexpressible(settings)
    stored, version = _model_of(first.content, files.shared)
    duplicates = [_copy(stored, copy) for copy in files.copies]
    experts, replicas = _experts(files, settings)
    if files.ranks and (doubled := [name for name in stored if SHARED_ONLY.search(name)]):
        raise ConversionError(f"{files.shared} should hold no expert, but has {doubled[0]}")
    stored |= experts
    config = config_of(settings, {name: place.shape for name, place in stored.items()}, vocab_multiple)
    _check_dictionary(files.shared.parent / "dict.txt", stored["embed_tokens.weight"].shape[0])
    expected = _their_shapes(config, stored["embed_tokens.weight"].shape[0])
    _check_shapes(expected, stored, str(files.shared.parent))
    repeated = [pair for pairs in (*(d for _, d in duplicates), replicas[1]) for pair in pairs]
    if "output_projection.weight" in stored and config.model.tie_embeddings:
        original = {"output_projection.weight": "embed_tokens.weight"}
        repeated = [Duplicate(pair.theirs, original.get(pair.original, pair.original)) for pair in repeated]
        repeated.append(Duplicate("output_projection.weight", "embed_tokens.weight"))
    for extra in (*(s for s, _ in duplicates), replicas[0]):
        stored |= extra
    conversion = _conversion(config, settings, stored, expected, repeated, version)
    conversion.prove()
    return StoredSource(stored), conversion


def _find(path: Path) -> _Files:
    """The files that belong to `path`. Raises ConversionError for none, several checkpoints, or gaps."""
    if path.is_dir():
        shared = sorted({m["stem"] for m in map(_FILE.fullmatch, _names(path)) if m})
        if len(shared) == 1:
            return _moe_files(path, shared[0])
        alone = [name for name in _names(path) if name.endswith(".pt")]
        if shared or len(alone) != 1:
            found = [f"{stem}-shared.pt" for stem in shared] or alone or ["no .pt file"]
            raise ConversionError(f"{path} holds {', '.join(found[:5])}: name the one file to convert")
        return _Files(path / alone[0])
    if not path.is_file():
        raise ConversionError(f"{path} does not exist")
    match = _FILE.fullmatch(path.name)
    return _moe_files(path.parent, match["stem"]) if match else _Files(path)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _moe_files(folder: Path, stem: str) -> _Files:
    """X-shared.pt and X-rank-0.pt to X-rank-(n - 1).pt, also under the names with -shardN that fairseq gives by fault.

    In those, every rank has written the shared tensors again.
    """
    parts: dict[int | None, list[Path]] = defaultdict(list)
    for name in _names(folder):
        match = _FILE.fullmatch(name)
        if match and match["stem"] == stem:
            parts[None if match["rank"] is None else int(match["rank"])].append(folder / name)
    shared = sorted(parts.pop(None, []), key=lambda path: int(_FILE.fullmatch(path.name)["shard"] or 0))
    if not shared:
        raise ConversionError(f"{folder / f'{stem}-shared.pt'} is missing: it holds all but the experts")
    for rank, paths in parts.items():
        if len(paths) > 1:
            raise ConversionError(f"rank {rank} is there twice: {paths[0]} and {paths[1].name}; remove one")
    missing = sorted(set(range(max(parts, default=-1) + 1)) - set(parts))
    if missing or not parts:
        number = missing[0] if missing else 0
        raise ConversionError(f"{folder / f'{stem}-rank-{number}.pt'} is missing: its experts are nowhere else")
    return _Files(shared[0], tuple(shared[1:]), tuple(parts[rank][0] for rank in sorted(parts)))


def _model_of(content: Any, path: Path) -> tuple[dict[str, Stored], Stored | None]:
    """The tensors of the decoder by name without `decoder.`, and its version; buffers without a meaning are left out.

    `_float_tensor` holds one uninitialised number by which fairseq knows a device: it is no weight.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ConversionError(f"{path} is no checkpoint of fairseq: it has no dict `model`")
    found = {}
    for name, place in flat_tensors(content["model"], str(path)).items():
        if "flat_param" in name:
            raise ConversionError(
                f"{path} holds {name}, a shard that FSDP flattened: join the shards with fairseq's own "
                "consolidate_fsdp_shards.py first"
            )
        if not name.startswith(_DECODER):
            raise ConversionError(f"{path} holds {name}: a language model of fairseq has a decoder and nothing else")
        found[name.removeprefix(_DECODER)] = place
    found.pop("embed_positions._float_tensor", None)
    return found, found.get("version")


def _copy(stored: Mapping[str, Stored], path: Path) -> tuple[dict[str, Stored], list[Duplicate]]:
    """The tensors of another copy of the shared file, under names of their own, and what each must be equal to."""
    again, _ = _model_of(open_file(path).content, path)
    check_names(stored, again, str(path))
    _check_shapes({name: place.shape for name, place in stored.items()}, again, str(path))
    names = [name for name in again if name != "version"]
    return {f"{path.name}/{n}": again[n] for n in names}, [Duplicate(f"{path.name}/{n}", n) for n in names]


def _experts(files: _Files, settings: Settings) -> tuple[dict[str, Stored], tuple[dict[str, Stored], list[Duplicate]]]:
    """The experts by global number, and the copies that further ranks hold of them."""
    if not files.ranks:
        return {}, ({}, [])
    num_experts, num_ranks = settings.need("moe_expert_count", int), len(files.ranks)
    if max(num_experts, num_ranks) % min(num_experts, num_ranks):
        raise ConversionError(
            f"{files.ranks[0].parent} has {num_ranks} files of experts, which do not share {num_experts} experts evenly"
        )
    num_local = max(num_experts // num_ranks, 1)
    found: dict[str, Stored] = {}
    copies: tuple[dict[str, Stored], list[Duplicate]] = ({}, [])
    seen: dict[tuple, Path] = {}
    for rank, path in enumerate(files.ranks):
        local, _ = _model_of(open_file(path).content, path)
        _check_local(local, num_local, path, num_experts, num_ranks)
        content = tuple(sorted((name, place.crc) for name, place in local.items()))
        if num_ranks <= num_experts and content in seen:
            raise ConversionError(f"{path} holds the same experts as {seen[content].name}: one of them is a copy")
        seen[content] = path
        for name, place in local.items():
            head, number, tail = _EXPERT.fullmatch(name).groups()
            here = f"{head}{(rank * num_local + int(number)) % num_experts}{tail}"
            if rank >= num_experts:
                copies[0][f"{path.name}/{here}"] = place
                copies[1].append(Duplicate(f"{path.name}/{here}", here))
            else:
                found[here] = place
    return found, copies


def _check_local(local: Mapping[str, Stored], num_local: int, path: Path, num_experts: int, num_ranks: int) -> None:
    by_layer: dict[str, set[int]] = defaultdict(set)
    for name in local:
        match = _EXPERT.fullmatch(name)
        if match is None:
            raise ConversionError(f"{path} should hold experts only, but has {name}")
        by_layer[match[1]].add(int(match[2]))
    for head, numbers in by_layer.items():
        if numbers != set(range(num_local)):
            raise ConversionError(
                f"{path} has {len(numbers)} experts in {head.removesuffix('.experts.')}, but moe_expert_count "
                f"{num_experts} over {num_ranks} files makes {num_local}: is a file missing?"
            )


def _check_dictionary(path: Path, num_rows: int) -> None:
    """fairseq's dict.txt names one token a line, besides bos, pad, eos and unk, which come first."""
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as lines:
            count = sum(1 for _ in lines) + 4
        if count > num_rows:
            raise ConversionError(f"{path} has {count} tokens with the four special ones, the embedding {num_rows}")


def _their_shapes(config: Config, num_rows: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model by name without `decoder.`, but its version and a tied head."""
    d, ours = config.model.hidden_size, our_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (num_rows, d)}
    counts = experts_by_layer(config.model, config.moe)
    for i in range(config.model.num_layers):
        layer = f"layers.{i}"
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{norm}.weight": (d,), f"{layer}.{norm}.bias": (d,)}
        for part in "qkv":
            shapes |= {f"{layer}.self_attn.{part}_proj.weight": (d, d), f"{layer}.self_attn.{part}_proj.bias": (d,)}
        shapes |= {f"{layer}.self_attn.out_proj.weight": (d, d), f"{layer}.self_attn.out_proj.bias": (d,)}
        ends = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        if i in counts:
            shapes[f"{layer}.moe_layer.gate.wg.weight"] = (counts[i], d)
            heads = {f"{layer}.moe_layer.experts.{e}": (f"{layer}.experts", 1) for e in range(counts[i])}
        else:
            heads = {layer: (f"{layer}.ffn", 0)}
        for head, (name, skip) in heads.items():
            shapes |= {f"{head}.{end}": ours[WEIGHT, f"{name}.{end}"][skip:] for end in ends}
    shapes |= {"layer_norm.weight": (d,), "layer_norm.bias": (d,)}
    if not config.model.tie_embeddings:
        shapes["output_projection.weight"] = (num_rows, d)
    return shapes


def _check_shapes(expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored], where: str) -> None:
    """Raises ConversionError for names that are missing or unknown and for shapes that are others."""
    optional = {"version", "output_projection.weight"}
    check_names(set(expected) - optional, set(stored) - optional, where)
    if "output_projection.weight" in expected and "output_projection.weight" not in stored:
        raise ConversionError(f"{where} lacks output_projection.weight, though the embeddings are not shared")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ConversionError(f"{where}: {name} has shape {list(stored[name].shape)}, not {list(shape)}")


def _conversion(
    config: Config, settings: Settings, stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]],
    duplicates: list[Duplicate], version: Stored | None,
) -> Conversion:  # fmt: skip
    shapes, num_rows = our_shapes(config), expected["embed_tokens.weight"][0]
    links: list[Link] = []
    for name, shape in expected.items():
        links += _links(config, name, shape)
    heads = ["embedding.weight"] if config.model.tie_embeddings else ["embedding.weight", "output.weight"]
    notes = training_notes(settings)
    if padded_vocab_size(config.model) > num_rows:
        notes.append(PADDING_NOTE.format(theirs=num_rows, ours=padded_vocab_size(config.model)))
    return Conversion(
        config=config,
        their_config=settings.values,
        ours=shapes,
        theirs={name: place.shape for name, place in stored.items()},
        links=tuple(links),
        constants=() if version is None else (Constant("version", _version(version)),),
        duplicates=tuple(duplicates),
        paddings=tuple(vocabulary_padding(heads, num_rows, shapes)),
        notes=tuple(notes),
    )


def _version(place: Stored) -> float:
    """The decoder's version: below 2 it had no norm after the last layer. Raises ConversionError for what we do not
    know."""
    source = StoredSource({"version": place})
    values = source.read("version", whole_box(place.shape))
    if place.dtype in ("F16", "BF16"):
        values = (values.astype("uint32") << 16).view("float32") if place.dtype == "BF16" else values.view("float16")
    if values.shape != (1,) or float(values[0]) not in (2.0, 3.0):
        raise ConversionError(f"{place.path} has a decoder of version {values.tolist()}: 2 and 3 are known")
    return float(values[0])


_SINGLE = {
    "embed_tokens.weight": "embedding.weight",
    "output_projection.weight": "output.weight",
    "layer_norm.weight": "final_norm.weight",
    "layer_norm.bias": "final_norm.bias",
}
_IN_LAYER = {
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "ffn_norm",  # fairseq's name for the second norm of a layer
    "fc1": "ffn.fc1",
    "fc2": "ffn.fc2",
    "moe_layer.gate.wg": "router",
}


def _links(config: Config, name: str, shape: tuple[int, ...]) -> list[Link]:
    """The links of one of their tensors."""
    if name in _SINGLE:
        return [whole(_SINGLE[name], name, shape)]
    layer = _LAYER.match(name)[0].rstrip(".")
    inner, ending = name.removeprefix(f"{layer}.").rsplit(".", 1)
    expert = _EXPERT.fullmatch(name)
    if expert:
        number, tail = int(expert[2]), expert[3]
        box = whole_box(shape)
        return [Link((WEIGHT, f"{layer}.experts{tail}"), ((number, number + 1), *box), name, box)]
    if inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        names = {part: f"{layer}.self_attn.{part}_proj.{ending}" for part in "qkv"}
        part_links = head_links(config.model, layer, names, bias=ending == "bias")
        return [link for link in part_links if link.theirs == name]
    return [whole(f"{layer}.{_IN_LAYER[inner]}.{ending}", name, shape)]
