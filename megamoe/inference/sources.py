"""What a command that computes is pointed at: a checkpoint, a run, or a Hugging Face folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.errors import ConfigError
from megamoe.launch.environment import rank_environment


@contextmanager
def model_checkpoint(
    path: Path, *, scratch: Path | None = None, keeps_tokenizer: bool = True
) -> Iterator[Path]:
    """The checkpoint that `path` means. A Hugging Face folder is imported, into a folder that is removed at the end.

    scratch: where that folder is made, with room for the model. keeps_tokenizer: false where another one is named, so
    that its own may be one that megamoe cannot read. Raises ConfigError where `path` is none of them, and
    where each of several ranks would import it; ConversionError for a model that megamoe cannot express.
    """
    from megamoe.convert.hf_folders import import_folder, is_hf_folder

    if not is_hf_folder(path):
        yield resolve_checkpoint(path)
        return
    if rank_environment().world_size > 1:
        raise ConfigError(
            f"{path} is a Hugging Face folder, which every rank would import: import it once, with megamoe convert "
            f"from-hf {path} RUN, and name RUN here"
        )
    with tempfile.TemporaryDirectory(prefix="megamoe-imported-", dir=scratch) as folder:
        yield import_folder(path, Path(folder) / "run", keeps_tokenizer=keeps_tokenizer)
