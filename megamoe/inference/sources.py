"""What a command that computes is pointed at: a checkpoint, a run, or a Hugging Face folder."""

import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.errors import ConfigError, OutputError
from megamoe.launch.environment import rank_environment


@contextmanager
def model_checkpoint(
    path: Path, *, scratch: Path | None = None, keeps_tokenizer: bool = True
) -> Iterator[Path]:
    """The checkpoint that `path` means. A Hugging Face folder is imported, into a folder that is removed at the end.

    scratch: where that folder is made, with room for the model. keeps_tokenizer: false where another one is named, so
    that its own may be one that megamoe cannot read. Raises ConfigError where `path` is none of them, and
    where each of several ranks would import it; ConversionError for a model that megamoe cannot express; OutputError
    where there is no room for the folder.
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
    with _ends_in_order(), _scratch_folder(scratch) as folder:
        yield import_folder(path, Path(folder) / "run", keeps_tokenizer=keeps_tokenizer)


def _scratch_folder(scratch: Path | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="megamoe-imported-", dir=scratch)
    except OSError as error:
        place = "the folder for temporary files (TMPDIR)" if scratch is None else str(scratch)
        raise OutputError(
            f"the model cannot be imported into {place} ({error.strerror or error}): name a folder that is there, can "
            "be written and has room for it"
        ) from None


@contextmanager
def _ends_in_order() -> Iterator[None]:
    """Inside, SIGTERM ends this process as an exit does, so that what is temporary is removed.

    Not where somebody else has decided what it does, as the launcher of a rank, or where Python allows no handler.
    """
    alone = rank_environment().source == "single" and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one is not to end the removing
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
