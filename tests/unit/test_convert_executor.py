"""Export and import give, to the bit, what the table says in words: from any written layout, in bounded memory."""

import json
import math
import os
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megamoe.checkpoint import manifest as manifests
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import Slice, whole_box
from megamoe.config.loading import load_config
from megamoe.convert import from_hf, to_hf
from megamoe.convert.blocks import BlockReader
from megamoe.convert.casts import cast
from megamoe.convert.foreign import ForeignTensor, open_source, read_box
from megamoe.convert.from_hf import import_
from megamoe.convert.links import Conversion, Link, Padding
from megamoe.convert.regions import Fetcher, Part, Region, in_order_of_source
from megamoe.convert.to_hf import export
from megamoe.errors import ConfigError, ConversionError
from megamoe.runs.run_folder import checkpoint_at
from tests.unit.checkpoint_cases import elements, load, random_cut, random_tensors, same, save
from tests.unit.executor_cases import (
    conversion_of,
    digest_of,
    our_tensors,
    random_floats,
    read_theirs,
    same_arrays,
    save_ours,
    save_uncut,
    theirs_by_hand,
    tiny_config,
    write_theirs,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(manifests, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(to_hf, "WINDOW_BYTES", 1000)
    monkeypatch.setattr(from_hf, "_SMALLEST_FILE_BYTES", 9000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def weights(tensors):
    return {key: tensor for key, tensor in tensors.items() if key[0] != "master"}


@pytest.mark.parametrize("seed", range(6))
def test_export_is_what_the_words_say_and_import_gives_it_back(seed, tmp_path):
    config, workers, tied, biased = tiny_config(), (0, 2)[seed % 2], seed % 3 == 0, seed > 2
    dtype, name = (("F32", "fp32"), ("BF16", "bf16"), ("F16", "fp16"))[seed % 3]
    tensors = our_tensors(config, dtype=dtype, seed=100 * seed)
    source = save_ours(tmp_path / "run", config, tensors, seed=seed, num_ranks=1 + seed)
    table, before = conversion_of(config, tied=tied, biased=biased), digest_of(source)
    report = export(source, tmp_path / "out", table, dtype=name, workers=workers, shard_bytes=(9000, 10**9)[seed == 5])
    arrays, dtypes = read_theirs(tmp_path / "out")
    quarter = {"F32": np.float32(0.25), "BF16": np.uint16(0x3E80), "F16": np.uint16(0x3400)}[dtype]
    assert same_arrays(arrays, theirs_by_hand(tensors, "weight", tied=tied, biased=quarter if biased else None))
    assert {key for key, found in dtypes.items() if found != dtype} <= {"model.correction"}
    assert dtypes["model.correction"] == "F32"
    assert report == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert {key: tensor["dtype"] for key, tensor in report["tensors"].items()} == dtypes
    assert report["num_bytes_written"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    import_(tmp_path / "out", tmp_path / "back", table, workers=workers, files={"tokenizer/a.json": b"{}"})
    folder = checkpoint_at(tmp_path / "back")
    assert same(load(folder), tensors)
    assert Checkpoint.open(folder).manifest.config == config.model_dump(mode="json")
    assert load_config(str(tmp_path / "back" / "config.yaml"), []) == config
    assert (tmp_path / "back" / "tokenizer" / "a.json").read_bytes() == b"{}"
    assert digest_of(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out", "run"]


@pytest.mark.parametrize("num_files", [1, 4])
def test_import_then_export_gives_their_tensors_back(num_files, tmp_path):
    config = tiny_config()
    arrays = theirs_by_hand(our_tensors(config, dtype="BF16", seed=7), "weight", tied=True)
    dtypes = dict.fromkeys(arrays, "BF16") | {"model.correction": "F32"}
    write_theirs(tmp_path / "theirs", arrays, dtypes, num_files=num_files)
    before, table = digest_of(tmp_path / "theirs"), conversion_of(config, tied=True)
    import_(tmp_path / "theirs", tmp_path / "ours", table, workers=2)
    export(checkpoint_at(tmp_path / "ours"), tmp_path / "again", table, dtype="bf16", workers=0, shard_bytes=9000)
    assert same_arrays(read_theirs(tmp_path / "again")[0], arrays)
    assert digest_of(tmp_path / "theirs") == before


def test_exports_are_rounded_once_and_from_the_masters_where_they_are(tmp_path):
    config = tiny_config()
    table = conversion_of(config)
    tensors = our_tensors(config, dtype="BF16", masters=True, seed=3)
    source = save_ours(tmp_path / "run", config, tensors, seed=1)
    for name, torch_dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        report = export(source, tmp_path / name, table, dtype=name, workers=0)
        assert any("masters" in note for note in report["notes"])
        for key, array in theirs_by_hand(tensors, "master").items():
            found = read_theirs(tmp_path / name)[0][key]
            wanted = torch.from_numpy(array).to(torch_dtype) if key != "model.correction" else torch.from_numpy(array)
            assert found.tobytes() == wanted.numpy().tobytes(), key
    report = export(source, tmp_path / "bf16", table, dtype="bf16", workers=0)
    assert not any("masters" in note for note in report["notes"])
    assert same_arrays(read_theirs(tmp_path / "bf16")[0], theirs_by_hand(tensors, "weight"))


def test_an_import_of_several_dtypes_widens_what_meets_and_casts_as_asked(tmp_path):
    config = tiny_config()
    truth = our_tensors(config, dtype="BF16", seed=11)
    arrays = theirs_by_hand(truth, "weight")
    dtypes = dict.fromkeys(arrays, "BF16") | {"model.correction": "F32"}
    wide = "layers.0.attention.qkv.weight.k.weight"  # its fellows stay bf16
    arrays[wide], dtypes[wide] = (arrays[wide].astype(np.uint32) << 16).view(np.float32), "F32"
    write_theirs(tmp_path / "theirs", arrays, dtypes, num_files=1)
    import_(tmp_path / "theirs", tmp_path / "mixed", conversion_of(config), workers=0)
    mixed = load(checkpoint_at(tmp_path / "mixed"))
    key = ("weight", "layers.0.attention.qkv.weight")
    assert mixed[key][0] == "F32" and mixed["weight", "final_norm.weight"][0] == "BF16"
    assert (mixed[key][1] == (truth[key][1].astype(np.uint32) << 16).view(np.float32)).all()
    import_(tmp_path / "theirs", tmp_path / "one", conversion_of(config), dtype="bf16", workers=0)
    assert same(load(checkpoint_at(tmp_path / "one")), truth)


def every_kind_of_float(dtype: str) -> np.ndarray:
    if dtype != "F32":
        return np.arange(1 << 16, dtype=np.uint16)
    bits = np.random.default_rng(5).integers(0, 1 << 32, 1 << 20, np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    near = np.concatenate([ties, ties - 1, ties + 1, np.arange(0x33000000, 0x39000000, 997, dtype=np.uint32)])
    return np.concatenate([bits, near]).view(np.float32)


@pytest.mark.parametrize("target", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
def test_casts_are_those_of_torch(source, target):
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    values = every_kind_of_float(source)
    theirs = torch.from_numpy(values.view(np.int16) if source != "F32" else values).view(names[source])
    wanted = theirs.to(names[target])
    overflown = (torch.isinf(wanted) & torch.isfinite(theirs)).numpy()
    if overflown.any():
        with pytest.raises(ConversionError, match=rf"^the one at {int(np.argmax(overflown))} is .* {target} cannot"):
            cast(values, source, target, lambda number: f"the one at {number}")
    found = cast(values[~overflown], source, target, str)
    wanted = wanted[torch.from_numpy(~overflown)]
    nans = torch.isnan(wanted).numpy()
    mine = torch.from_numpy(found.view(np.int16) if target != "F32" else found.copy()).view(names[target])
    assert (torch.isnan(mine).numpy() == nans).all()
    assert mine[torch.from_numpy(~nans)].view(torch.uint8).numpy().tobytes() == wanted[
        torch.from_numpy(~nans)
    ].view(torch.uint8).numpy().tobytes()  # fmt: skip


def test_an_overflow_is_refused_with_the_element(tmp_path):
    config = tiny_config()
    tensors = our_tensors(config)
    tensors["weight", "layers.1.experts.fc2.weight"][1][2, 3, 4] = 70000.0
    source = save_ours(tmp_path / "run", config, tensors, seed=1)
    with pytest.raises(ConversionError, match=r"layers\.1\.experts\.fc2\.weight\.2\[3, 4\] is 70000, which F16 cannot"):
        export(source, tmp_path / "out", conversion_of(config), dtype="fp16", workers=2)
    assert not (tmp_path / "out").exists()


def test_blocks_give_any_region_of_any_layout(tmp_path):
    for seed in range(8):
        rng = random.Random(seed)
        tensors = random_tensors(rng)
        folder = save(tmp_path / str(seed), 1, tensors, seed=seed)
        with Checkpoint.open(folder) as checkpoint:
            reader = BlockReader(checkpoint, rng.choice([1, 2048]))
            for (kind, name), (dtype, array) in tensors.items():
                for piece in random_cut(rng, array.shape, rng.randrange(9)):
                    found = reader.read(Slice(kind, name, dtype, array.shape, *piece))
                    assert found.tobytes() == elements(array, piece).tobytes()
            reader.close()


def test_what_was_read_stays_as_it_was_while_other_blocks_come(tmp_path):
    tensors = {("weight", "a"): ("F32", random_floats(0, (4096,), "F32"))}
    with Checkpoint.open(save_uncut(tmp_path, tensors)) as checkpoint:
        reader = BlockReader(checkpoint, 1024)
        whole = checkpoint.entry("weight", "a").whole
        found = [reader.read(whole.part(first, first + 256)) for first in range(0, 4096, 256)]
        assert np.concatenate(found).tobytes() == tensors["weight", "a"][1].tobytes()
        reader.close()


def test_a_box_is_read_whole_whatever_its_shape(monkeypatch):
    rng = random.Random(1)
    for number in range(3000):
        monkeypatch.setattr("megamoe.convert.foreign._GAP_BYTES", (0, 1 << 16)[number % 2])
        monkeypatch.setattr("megamoe.convert.foreign._SPAN_BYTES", 64)
        shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(5)))
        array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        box = tuple(tuple(sorted(rng.sample(range(size + 1), 2))) for size in shape)

        def fill(out, first, array=array):
            assert out.flags.c_contiguous and first + out.size <= array.size
            out.reshape(-1)[...] = array.reshape(-1)[first : first + out.size]

        found = read_box(shape, box, np.dtype(np.int32), fill)
        assert (found == array[tuple(slice(*pair) for pair in box)]).all() and found.shape == tuple(
            b - a for a, b in box
        )


def test_windows_come_in_order_of_the_source_and_turn_what_a_view_turns():
    rng = random.Random(2)
    for _ in range(200):
        sizes = tuple(rng.randrange(1, 7) for _ in range(rng.randrange(1, 4)))
        order = tuple(rng.sample(range(len(sizes)), len(sizes)))
        values = np.random.default_rng(1).integers(0, 99, math.prod(sizes)).astype(np.float32)
        turned = values.reshape(sizes).transpose(order).reshape(-1)
        box = ((0, values.size),)
        link = Link(("weight", "a"), box, "b", box, view=sizes, order=order)
        for to_theirs, stored, wanted in ((True, values, turned), (False, turned, values)):
            fetch = Fetcher(
                lambda _, first, last, stored=stored: stored[first:last], to_theirs=to_theirs,
                window_elements=rng.randrange(1, 9),
            )  # fmt: skip
            region = Region("b", (values.size,), "F32", (Part(box, link),))
            windows = list(in_order_of_source([region], fetch, 4 * rng.randrange(1, 9)))
            assert (np.concatenate([window.values for window in windows]) == wanted).all()


def test_each_block_is_read_once_where_tensors_of_theirs_share_it(tmp_path, monkeypatch):
    """Query, key and value of one layer are three tensors of theirs; read one after the other they cost three reads."""
    monkeypatch.setattr(manifests, "BLOCK_BYTES", 16384)  # 64 rows: of query and key, or of value and query
    monkeypatch.setattr(to_hf, "CACHE_BYTES", 3 * 16384)
    config = tiny_config(**{"model.hidden_size": 64, "model.head_dim": 16, "model.num_attention_heads": 16,
                            "model.num_query_groups": 8})  # fmt: skip
    ours = {("weight", "a"): (736, 64)}
    links, theirs = [], {}
    for which, place, count in (("q", 0, 2), ("k", 2, 1), ("v", 3, 1)):
        theirs[which] = (8 * count * 23, 64)
        for group in range(8):
            rows = ((group * 92 + place * 23, group * 92 + (place + count) * 23), (0, 64))
            links.append(Link(("weight", "a"), rows, which, ((group * count * 23, (group + 1) * count * 23), (0, 64))))
    table = Conversion(config, {}, ours, theirs, tuple(links))
    tensors = {("weight", "a"): ("F32", random_floats(0, (736, 64), "F32"))}
    source = save_uncut(tmp_path / "run", tensors)
    report = export(source, tmp_path / "out", table, dtype="fp32", workers=0)
    whole = sum(array.nbytes for _, array in tensors.values())
    assert report["num_bytes_read"] <= 1.02 * whole
    grouped = tensors["weight", "a"][1].reshape(8, 4, 23, 64)
    wanted = {"q": grouped[:, :2], "k": grouped[:, 2], "v": grouped[:, 3]}
    assert same_arrays(read_theirs(tmp_path / "out")[0], {n: a.reshape(-1, 64) for n, a in wanted.items()})


@pytest.mark.parametrize("what", ["constant", "duplicate", "unknown", "missing", "shape", "padding"])
def test_what_does_not_fit_is_refused_by_name(what, tmp_path):
    config = tiny_config()
    arrays = theirs_by_hand(our_tensors(config), "weight", tied=True, biased=np.float32(0.25))
    message = {
        "constant": r"model\.zero_bias\[4, 1\] is not what it must be: 0\.25 in every element",
        "duplicate": r"lm_head\.weight\[39, 2\] is not what it must be: equal to embed\.weight",
        "unknown": r"theirs has the unknown model\.strange",
        "missing": r"theirs lacks layers\.1\.experts\.fc2\.weight\.3",
        "shape": r"model\.final_norm\.weight of shape \[4, 4\], the table of \[16\]",
        "padding": r"embedding\.weight",
    }[what]
    table = conversion_of(config, tied=True, biased=True)
    if what == "constant":
        arrays["model.zero_bias"][4, 1] = 0.5
    elif what == "duplicate":
        arrays["lm_head.weight"] = arrays["lm_head.weight"].copy()
        arrays["lm_head.weight"][39, 2] += 1
    elif what == "unknown":
        arrays["model.strange"] = np.zeros(3, np.float32)
    elif what == "missing":
        del arrays["layers.1.experts.fc2.weight.3"]
    elif what == "shape":
        arrays["model.final_norm.weight"] = arrays["model.final_norm.weight"].reshape(4, 4)
    else:  # one row of ours has no source
        short = Padding(("weight", "embedding.weight"), ((41, 48), (0, 16)), "x")
        table = Conversion(**{**vars(table), "paddings": (short,)})
    write_theirs(tmp_path / "theirs", arrays, dict.fromkeys(arrays, "F32"), num_files=2)
    with pytest.raises(ConversionError, match=message) as error:
        import_(tmp_path / "theirs", tmp_path / "ours", table, workers=2)
    assert "\n" not in str(error.value) and not (tmp_path / "ours").exists()


def test_an_export_names_what_the_checkpoint_lacks_or_has_besides(tmp_path):
    config = tiny_config()
    tensors = our_tensors(config)
    bias = tensors.pop(("balance_bias", "layers.1.router"))
    source = save_ours(tmp_path / "run", config, tensors, seed=1)
    with pytest.raises(ConversionError, match=r"lacks balance_bias layers\.1\.router"):
        export(source, tmp_path / "out", conversion_of(config), dtype="fp32", workers=0)
    tensors["balance_bias", "layers.0.router"] = tensors["balance_bias", "layers.1.router"] = bias
    source = save_ours(tmp_path / "run2", config, tensors, seed=1)
    with pytest.raises(ConversionError, match=r"has the unknown balance_bias layers\.0\.router"):
        export(source, tmp_path / "out", conversion_of(config), dtype="fp32", workers=0)
    table = conversion_of(config)
    for links, message in (
        (table.links[1:], r"element .* of weight embedding.weight is missing"),
        ((*table.links, table.links[1]), r"held 2 times"),
    ):
        with pytest.raises(ConversionError, match=message):
            export(source, tmp_path / "out", Conversion(**{**vars(table), "links": links}), dtype="fp32", workers=0)
    with pytest.raises(ConfigError, match="exists already"):
        export(source, source.parent, conversion_of(config), dtype="fp32", workers=0)
    with pytest.raises(ConfigError, match="write the output beside it"):
        export(source, source / "out", conversion_of(config), dtype="fp32", workers=0)
    for name in ("../x", "/x", "conversion.json", "model.safetensors"):
        with pytest.raises(ConversionError, match="cannot be one of the small files"):
            export(source, tmp_path / "out", conversion_of(config), dtype="fp32", workers=0, files={name: b""})


def test_bin_files_are_read_like_safetensors(tmp_path):
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(4, 6).to(torch.bfloat16).t(), "c": torch.randn(3).half()}
    (tmp_path / "one").mkdir(), (tmp_path / "other").mkdir()
    torch.save(tensors, tmp_path / "one" / "pytorch_model.bin")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "other" / "model.safetensors")
    one, other = open_source(tmp_path / "one"), open_source(tmp_path / "other")
    assert dict(one.tensors) == dict(other.tensors) and one.tensors["b"] == ForeignTensor("BF16", (6, 4))
    for name, tensor in one.tensors.items():
        for box in (whole_box(tensor.shape), tuple((size - 1, size) for size in tensor.shape)):
            assert one.read(name, box).tobytes() == other.read(name, box).tobytes()
    one.close(), other.close()
