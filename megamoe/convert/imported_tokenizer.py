"""The tokenizer of a Hugging Face folder as files of the run that goes on from it."""

import tempfile
from pathlib import Path

from megamoe.config.schema import Config
from megamoe.convert.hf_tokenizer_import import import_tokenizer


def with_tokenizer(config: Config, folder: Path, out: Path) -> tuple[Config, dict[str, bytes]]:
    """`config` of a run in `out` that uses the folder's tokenizer, and the files to lie in `out` for it.

    Raises ConversionError where the folder has none that megamoe reads; DataError for a damaged one.
    """
    with tempfile.TemporaryDirectory(prefix="megamoe-tokenizer-") as scratch:
        tokenizer = import_tokenizer(folder, Path(scratch))
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    if tokenizer.path is not None:
        name = Path(tokenizer.path).relative_to(scratch)
        tokenizer = tokenizer.model_copy(update={"path": str(out / name)})
    data = config.data.model_copy(update={"tokenizer": tokenizer})
    return config.model_copy(update={"data": data}), files
