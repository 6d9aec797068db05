"""Whether a megamoe checkpoint and a Hugging Face folder are one function: whole, or window by window of layers."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.reshard import config_of
from megamoe.checkpoint.slices import whole_box
from megamoe.config.schema import Config
from megamoe.convert.foreign import Source, open_source
from megamoe.convert.hf_tables import from_hf_config, to_hf_config
from megamoe.errors import ConversionError
from megamoe.topology.parameters import num_parameters, param_table
from megamoe.verification.compare import Agreement, compare_logits, fixed_token_ids
from megamoe.verification.hf_logits import answered, hf_logits
from megamoe.verification.own_logits import own_logits
from megamoe.verification.windows import renamed, window_config, windows

# Weights in fp32, once more while they are read, and room for activations. The two sides run one after the other.
_BYTES_PER_PARAMETER = 10
_BYTES_APART = 1 << 30  # what an interpreter with its libraries takes
_SEQ_LENGTH = 64


def verify(
    checkpoint: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    available_bytes: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare logits of fixed token ids, drops off; returns what was compared and how far it was apart.

    dtype: "BF16" or "F16" where the folder's weights are the checkpoint's rounded to it. available_bytes: of memory;
    None asks the system. A model that does not fit is compared in windows of as many layers as do, each between the
    same embedding and output. Raises ConversionError where anything differs, or one layer alone does not fit.
    """
    with Checkpoint.open(checkpoint) as opened:
        config = config_of(opened)
    free = _available_bytes() if available_bytes is None else available_bytes
    most_parameters = max(0, free - _BYTES_APART) // _BYTES_PER_PARAMETER
    found = list(windows(config, most_parameters))
    if not found:
        smallest = _BYTES_APART + _BYTES_PER_PARAMETER * num_parameters(param_table(config.model, config.moe))
        raise ConversionError(
            f"{free / 2**30:.1f} GiB of free memory do not hold one layer of {checkpoint}, so its logits cannot be "
            f"computed here: verify on a machine with more (the whole model takes about {smallest / 2**30:.0f} GiB), "
            "or convert with --no-verify"
        )
    token_ids = _token_ids(config)
    whole = found == [(0, config.model.num_layers)]
    results = []
    for first, last in found:
        what = f"{folder}" if whole else f"layers {first} to {last - 1} of {folder}"
        say(f"verifying {what} on {token_ids.size} tokens")
        agreement = (
            _compare(checkpoint, folder, token_ids, None, dtype, what)
            if whole
            else _compare_window(checkpoint, folder, token_ids, (first, last), dtype, what)
        )
        results.append(({} if whole else {"layers": [first, last]}) | agreement.as_dict())
    return {
        "method": "logits of the whole model" if whole else "logits of windows of layers",
        "both_sides_in": "fp32", "weights_rounded_to": dtype, "tokens": list(token_ids.shape), "results": results,
    }  # fmt: skip


def _token_ids(config: Config) -> np.ndarray:
    return fixed_token_ids(config.model.vocab_size, seq_length=min(_SEQ_LENGTH, config.model.seq_length))


def _compare(
    checkpoint: Path, folder: Path, token_ids: np.ndarray, layers: tuple[int, int] | None, dtype: str | None, what: str
) -> Agreement:
    theirs = hf_logits(folder, token_ids)
    ours = own_logits(checkpoint, token_ids, layers=layers, rounded_to=dtype)
    with Checkpoint.open(checkpoint) as opened:
        is_classifier = config_of(opened).model.num_labels > 0
    if is_classifier:
        return compare_logits(ours[:, answered(token_ids.shape[1])], theirs, what)
    # A folder may have fewer rows of the vocabulary than ours, which is padded; never more.
    return compare_logits(ours[..., : theirs.shape[-1]], theirs, what)


def _compare_window(
    checkpoint: Path, folder: Path, token_ids: np.ndarray, layers: tuple[int, int], dtype: str | None, what: str
) -> Agreement:
    with tempfile.TemporaryDirectory(prefix=".megamoe-window-", dir=folder.parent) as scratch:
        write_window(folder, Path(scratch), layers)
        return _compare(checkpoint, Path(scratch), token_ids, layers, dtype, what)


def write_window(folder: Path, out: Path, layers: tuple[int, int]) -> None:
    """Layers [first, last) of a Hugging Face folder as a folder of its own: its config.json, code and tensors."""
    their_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = their_config["architectures"][0]
    config = from_hf_config(their_config)
    # Theirs, changed only in what depends on the layers: a key that megamoe misreads must not be mended here.
    trees = [
        to_hf_config(each, dtype="float32", architecture=architecture, drops_off=True)
        for each in (config, window_config(config, *layers))
    ]
    changed = {key: value for key, value in trees[1].items() if trees[0].get(key) != value}
    (out / "config.json").write_text(json.dumps(their_config | changed), encoding="utf-8")
    for path in folder.glob("*.py"):
        shutil.copyfile(path, out / path.name)
    source = open_source(folder)
    try:
        _write_tensors(source, out / "model.safetensors", renamed(*layers))
    finally:
        source.close()


def _write_tensors(source: Source, path: Path, rename: Callable[[str], str | None]) -> None:
    import torch
    from safetensors.torch import save_file

    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    tensors = {}
    for name, tensor in source.tensors.items():
        new_name = rename(name)
        if new_name is not None:
            values = source.read(name, whole_box(tensor.shape))
            tensors[new_name] = torch.from_numpy(values).view(dtypes[tensor.dtype])
    save_file(tensors, path, metadata={"format": "pt"})


def _available_bytes() -> int:
    """Memory that new processes may take without swapping, control groups apart."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
