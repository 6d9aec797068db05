"""Small models in two formats: a hand-made table between them, and what it must give, by plain indexing."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from megamoe.checkpoint import commit as committing
from megamoe.checkpoint.slices import STORAGE, Slice, whole_box
from megamoe.checkpoint.writer import write_rank
from megamoe.config.loading import load_config
from megamoe.config.schema import Config
from megamoe.convert.links import Constant, Conversion, Duplicate, Link, Padding
from megamoe.topology.parameters import param_table
from tests.unit.checkpoint_cases import Tensors, save

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN, EXPERTS, VOCAB, ROWS = 2, 16, 4, 2, 4, 24, 4, 40, 48
PER_GROUP = HEADS // GROUPS
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
Arrays = dict[str, np.ndarray]


def tiny_config(**overrides: Any) -> Config:
    sizes = {
        "model.num_layers": LAYERS, "model.hidden_size": HIDDEN, "model.num_attention_heads": HEADS,
        "model.num_query_groups": GROUPS, "model.head_dim": HEAD_DIM, "moe.num_experts": EXPERTS,
        "model.vocab_size": VOCAB, "model.vocab_size_multiple": 16, "model.activation": "swiglu",
        "model.ffn_hidden_size": FFN,
    } | overrides  # fmt: skip
    return load_config("laptop-moe", [f"{key}={value}" for key, value in sizes.items()])


def random_floats(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Bits of numbers of moderate size, so that every cast is possible."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def our_tensors(config: Config, *, dtype: str = "F32", masters: bool = False, seed: int = 0) -> Tensors:
    """Weights, a balance bias, and masters where asked."""
    tensors: Tensors = {}
    for number, parameter in enumerate(param_table(config.model, config.moe)):
        tensors["weight", parameter.name] = (dtype, random_floats(seed + number, parameter.shape, dtype))
        if masters:
            tensors["master", parameter.name] = ("F32", random_floats(seed + 500 + number, parameter.shape, "F32"))
    tensors["balance_bias", "layers.1.router"] = ("F32", random_floats(seed + 900, (EXPERTS,), "F32"))
    rows = tensors["weight", "embedding.weight"][1]
    rows[VOCAB:] = 0
    return tensors


def save_ours(root: Path, config: Config, tensors: Tensors, *, seed: int, num_ranks: int = 3) -> Path:
    """A checkpoint whose slices are cut at random."""
    return save(root, 7, tensors, seed=seed, num_ranks=num_ranks, save_id=f"seed{seed}",
                config=config.model_dump(mode="json"))  # fmt: skip


def save_uncut(root: Path, tensors: Tensors) -> Path:
    """A checkpoint of one rank: every tensor in one slice."""
    partial = committing.begin(root, 1, "uncut")
    slices = [
        (Slice(*key, dtype, array.shape, whole_box(array.shape), 0, array.size), array)
        for key, (dtype, array) in tensors.items()
    ]
    write_rank(partial, rank=0, save_id="uncut", step=1, slices=slices)
    return committing.commit(
        root, partial, num_ranks=1, step=1, save_id="uncut", state={}, config={}, layout={}, keep_last=9,
        keep_every_steps=None, timeout_seconds=5.0,
    )  # fmt: skip


def conversion_of(config: Config, *, tied: bool = False, biased: bool = False) -> Conversion:
    """Everything that a table can say: names, boxes, turned matrices, a constant, a tied copy, padding."""
    links: list[Link] = []
    ours = {("weight", p.name): p.shape for p in param_table(config.model, config.moe)}
    ours["balance_bias", "layers.1.router"] = (EXPERTS,)
    theirs: dict[str, tuple[int, ...]] = {}

    def link(name: str, our_box, their: str, shape, their_box=None, kind: str = "weight", **turn: Any) -> None:
        theirs[their] = shape
        links.append(Link((kind, name), our_box, their, their_box or whole_box(shape), **turn))

    link("embedding.weight", ((0, VOCAB), (0, HIDDEN)), "embed.weight", (VOCAB, HIDDEN))
    for _, name in [key for key in ours if key[0] == "weight"]:
        shape, their = ours["weight", name], f"model.{name}"
        if name == "embedding.weight":
            continue
        if ".qkv." in name:
            _attention(name, shape, link)
        elif ".experts." in name:
            for e in range(EXPERTS):
                _expert(name, shape, e, link)
        elif name.endswith("fc2.weight"):  # a transposed matrix, as some have it
            link(name, whole_box(shape), their, shape[::-1], view=shape, order=(1, 0))
        elif ".fc1." in name:  # gate and linear half by turns: row 2 i of theirs is the gate's row i
            rest = shape[2:]
            turned = {"view": shape, "order": (1, 0, *range(2, len(shape)))}
            link(name, whole_box(shape), their, (2 * shape[1], *rest), **turned)
        elif name.endswith("out.weight"):  # in two halves of its columns
            half = shape[1] // 2
            for part, (a, b) in enumerate(((0, half), (half, shape[1]))):
                link(name, ((0, shape[0]), (a, b)), f"{their}.{part}", (shape[0], half))
        else:
            link(name, whole_box(shape), their, shape)
    link("layers.1.router", ((0, EXPERTS),), "model.correction", (EXPERTS,), kind="balance_bias")
    constants, duplicates = (), ()
    if biased:
        theirs["model.zero_bias"] = (5, 3)
        constants = (Constant("model.zero_bias", 0.25),)
    if tied:
        theirs["lm_head.weight"] = (VOCAB, HIDDEN)
        duplicates = (Duplicate("lm_head.weight", "embed.weight"),)
    padding = Padding(("weight", "embedding.weight"), ((VOCAB, ROWS), (0, HIDDEN)), "no token id uses these rows")
    return Conversion(config, {}, ours, theirs, tuple(links), constants, duplicates, (padding,))


def _attention(name: str, shape: tuple[int, ...], link: Any) -> None:
    """q, k and v of theirs; rows of a query's head interleaved (2 i and 2 i + 1 are ours i and i + 2)."""
    end, rest = name.partition("qkv.")[2], tuple((0, size) for size in shape[1:])
    per_group = (PER_GROUP + 2) * HEAD_DIM
    for group in range(GROUPS):
        start = group * per_group
        rows = ((group * PER_GROUP * HEAD_DIM, (group + 1) * PER_GROUP * HEAD_DIM), *rest)
        view = (PER_GROUP, 2, HEAD_DIM // 2, *shape[1:])
        link(name, ((start, start + PER_GROUP * HEAD_DIM), *rest), f"{name}.q.{end}", (HEADS * HEAD_DIM, *shape[1:]),
             rows, view=view, order=(0, 2, 1, *range(3, len(view))))  # fmt: skip
        for place, which in ((PER_GROUP, "k"), (PER_GROUP + 1, "v")):
            first = start + place * HEAD_DIM
            link(name, ((first, first + HEAD_DIM), *rest), f"{name}.{which}.{end}", (GROUPS * HEAD_DIM, *shape[1:]),
                 ((group * HEAD_DIM, (group + 1) * HEAD_DIM), *rest))  # fmt: skip


def _expert(name: str, shape: tuple[int, ...], e: int, link: Any) -> None:
    one, rest = f"{name}.{e}", whole_box(shape[1:])
    if ".fc1." in name:
        for half, which in enumerate(("gate", "up")):
            link(name, ((e, e + 1), (half, half + 1), *rest[1:]), f"{one}.{which}", shape[2:])
    else:
        link(name, ((e, e + 1), *rest), one, shape[1:])


def theirs_by_hand(tensors: Tensors, kind: str, *, tied: bool = False, biased: Any = None) -> Arrays:
    """What the table of `conversion_of` must give, element by element from the description in words."""
    ours = {name: array for (k, name), (_, array) in tensors.items() if k == kind}
    out: Arrays = {"embed.weight": ours["embedding.weight"][:VOCAB]}
    for name, array in ours.items():
        if ".qkv." in name:
            end = name.partition("qkv.")[2]
            grouped = array.reshape(GROUPS, PER_GROUP + 2, HEAD_DIM, *array.shape[1:])
            queries = np.empty((GROUPS, PER_GROUP, HEAD_DIM, *array.shape[1:]), array.dtype)
            queries[:, :, 0::2], queries[:, :, 1::2] = grouped[:, :PER_GROUP, :2], grouped[:, :PER_GROUP, 2:]
            out[f"{name}.q.{end}"] = queries.reshape(-1, *array.shape[1:])
            out[f"{name}.k.{end}"] = grouped[:, PER_GROUP].reshape(-1, *array.shape[1:])
            out[f"{name}.v.{end}"] = grouped[:, PER_GROUP + 1].reshape(-1, *array.shape[1:])
        elif ".experts.fc1" in name:
            for e in range(EXPERTS):
                out[f"{name}.{e}.gate"], out[f"{name}.{e}.up"] = array[e, 0], array[e, 1]
        elif ".experts." in name:
            for e in range(EXPERTS):
                out[f"{name}.{e}"] = array[e]
        elif name.endswith("fc2.weight"):
            out[f"model.{name}"] = array.T
        elif ".fc1." in name:
            out[f"model.{name}"] = np.stack([array[half, row] for row in range(FFN) for half in (0, 1)])
        elif name.endswith("out.weight"):
            out[f"model.{name}.0"], out[f"model.{name}.1"] = array[:, : HIDDEN // 2], array[:, HIDDEN // 2 :]
        elif name != "embedding.weight":
            out[f"model.{name}"] = array
    out["model.correction"] = tensors["balance_bias", "layers.1.router"][1]
    if biased is not None:
        out["model.zero_bias"] = np.full((5, 3), biased)
    if tied:
        out["lm_head.weight"] = out["embed.weight"]
    return {name: np.ascontiguousarray(array) for name, array in out.items()}


def read_theirs(folder: Path) -> tuple[Arrays, dict[str, str]]:
    """Bits and dtypes of a folder's tensors, headers by hand; and that the safetensors library opens every file."""
    arrays, dtypes = {}, {}
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, "np") as opened:
            names, metadata = set(opened.keys()), opened.metadata()
        assert metadata == {"format": "pt"}
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        tree = json.loads(data[8 : 8 + length])
        tree.pop("__metadata__")
        assert names == set(tree)
        for name, item in tree.items():
            first, last = (8 + length + offset for offset in item["data_offsets"])
            assert name not in arrays
            arrays[name] = np.frombuffer(data[first:last], STORAGE[item["dtype"]]).reshape(item["shape"])
            dtypes[name] = item["dtype"]
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(arrays)
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    return arrays, dtypes


def write_theirs(folder: Path, arrays: Arrays, dtypes: dict[str, str], *, num_files: int, seed: int = 0) -> None:
    """A Hugging Face folder, written by hand; tensors dealt to files at random."""
    folder.mkdir(parents=True)
    names = sorted(arrays)
    random.Random(seed).shuffle(names)
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors" if num_files > 1 else "model.safetensors"
        tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        body = b""
        for name in names[number::num_files]:
            data = arrays[name].tobytes()
            tree[name] = {
                "dtype": dtypes[name],
                "shape": list(arrays[name].shape),
                "data_offsets": [len(body), len(body) + len(data)],
            }
            body += data
            weight_map[name] = file
        header = json.dumps(tree).encode()
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + body)
    if num_files > 1:
        index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same_arrays(one: Arrays, other: Arrays) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and one[name].tobytes() == other[name].tobytes() for name in one
    )


def digest_of(folder: Path) -> dict[str, bytes]:
    """Every byte under a folder, by path: inputs must stay as they are."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
