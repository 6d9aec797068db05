"""Logits of a Hugging Face folder, by transformers alone, in a process of its own.

    python -m megamoe.verification.hf_logits FOLDER ids.npy logits.npy trust

The process takes no model code from megamoe: what it computes is what a user of the folder will compute.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.convert.custom_code import custom_files
from megamoe.errors import ConversionError

MISSING_TRANSFORMERS = 4  # exit codes of the process
NOT_LOADED_WHOLE = 5


def hf_logits(folder: Path, token_ids: np.ndarray, *, timeout_seconds: float = 3600.0) -> np.ndarray:
    """fp32 logits [n, s, V] of token ids int64 [n, s]; weights of another type are widened first.

    Of a classifier, whose class answers at the last token alone, [n, 2, labels] at `answered` positions.

    Code in the folder is run only where it is megamoe's own, byte for byte. Raises ConversionError where transformers
    is not installed, cannot load the folder, or would fill in a weight.
    """
    trust = "trust" if _code_is_ours(folder) else "distrust"
    with tempfile.TemporaryDirectory(prefix="megamoe-verify-") as scratch:
        np.save(f"{scratch}/ids.npy", token_ids.astype(np.int64))
        command = [sys.executable, "-m", __name__, str(folder), f"{scratch}/ids.npy", f"{scratch}/logits.npy", trust]
        # Code that a folder brings along is copied by transformers before it is run: not into the user's cache.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        try:
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout_seconds,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ConversionError(f"transformers did not finish with {folder} within {timeout_seconds:g} s") from None
        if run.returncode == MISSING_TRANSFORMERS:
            raise ConversionError(
                "verification needs transformers, which is not installed: pip install 'megamoe[hf]', or --no-verify"
            )
        if run.returncode:
            lines = run.stderr.strip().splitlines() or ["it gave no reason"]
            raise ConversionError(f"transformers cannot run {folder}: {lines[-1][:500]}")
        return np.load(f"{scratch}/logits.npy")


def _code_is_ours(folder: Path) -> bool:
    found = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    return found == custom_files()


def main(folder: str, ids_path: str, out_path: str, trust: str) -> int:
    """The process's side."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    except ImportError:
        return MISSING_TRANSFORMERS
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust == "trust", local_files_only=True)
    is_classifier = config.architectures[0].endswith("ForSequenceClassification")
    auto = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust == "trust", output_loading_info=True, local_files_only=True
    )
    problems = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    problems = {key: names for key, names in problems.items() if names}
    if problems:
        print(f"it does not load whole: {problems}", file=sys.stderr)
        return NOT_LOADED_WHOLE
    model.eval()
    token_ids = torch.from_numpy(np.load(ids_path))
    with torch.no_grad():
        answers = _answers if is_classifier else _logits
        logits = [answers(model, row).float().numpy() for row in token_ids]
    np.save(out_path, np.stack(logits))
    return 0


def answered(seq_length: int) -> list[int]:
    """The 0-based positions at which a classifier is asked: the last of half a sequence and of a whole one."""
    return [max(seq_length // 2 - 1, 0), seq_length - 1]


def _logits(model: Any, row: Any) -> Any:
    return model(row[None], use_cache=False).logits[0]


def _answers(model: Any, row: Any) -> Any:
    import torch

    model.config.pad_token_id = None  # the ids are drawn at random: none of them is padding
    return torch.cat([model(row[None, : last + 1], use_cache=False).logits for last in answered(len(row))])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
