"""A Hugging Face folder as a whole: what it says it is, and how it becomes a run's folder that anything can load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import read_small
from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.checkpoint.strict_json import loads
from megamoe.convert.foreign import open_source
from megamoe.convert.from_hf import import_
from megamoe.convert.hf_tables import conversion, from_hf_config
from megamoe.convert.imported_tokenizer import with_tokenizer
from megamoe.convert.workers import BytesDone
from megamoe.errors import ConversionError, DataError

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 24


def is_hf_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_hf_config(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says. Raises ConversionError where it has none."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConversionError(f"{folder} has no config.json: it is no Hugging Face folder")
    tree = loads(read_small(path, MAX_CONFIG_BYTES), str(path))
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} is no JSON object")
    return tree


def import_folder(
    folder: Path, out: Path, *, keeps_tokenizer: bool = True, progress: Callable[[BytesDone], None] | None = None
) -> Path:
    """Write the folder's model, as it is stored, and its tokenizer as the run `out`; returns the checkpoint.

    Nothing is compared with transformers: `megamoe convert from-hf` does. Raises ConversionError for what cannot be.
    """
    their_config = read_hf_config(folder)
    config, files = from_hf_config(their_config), {}
    if keeps_tokenizer:
        try:
            config, files = with_tokenizer(config, folder, out)
        except (ConversionError, DataError) as error:
            raise type(error)(
                f"{error}; one can be named, as in data.tokenizer.kind=… data.tokenizer.path=…"
            ) from None
    source = open_source(folder)
    try:
        table = conversion(config, their_config, stored=source.tensors)
        import_(folder, out, table, source=source, files=files, progress=progress)
    finally:
        source.close()
    return resolve_checkpoint(out)
