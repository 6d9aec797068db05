"""Named points of a save at which tests end the process or break the disk. In a run they do nothing."""

from collections.abc import Callable

POINTS = (
    "begin-made",  # the partial folder exists
    "file-opened",  # from here on once for every tensor file of a rank
    "file-header",
    "file-block",  # once for every block
    "file-written",
    "file-synced",
    "part-written",  # the rank's part of the manifest, still under its temporary name
    "part-synced",
    "part-renamed",
    "part-folder-synced",
    "commit-started",
    "commit-gathered",  # every rank has reported
    "manifest-written",
    "manifest-synced",
    "manifest-renamed",
    "parts-removed",
    "manifest-folder-synced",
    "next-renamed",  # latest.next says which save is about to take its name
    "aside-renamed",  # an older checkpoint of the same step has stepped aside
    "folder-renamed",  # the point of no return: the checkpoint has its name
    "root-synced",
    "latest-renamed",
    "latest-synced",
    "aside-removed",
    "prune-renamed",  # once for every checkpoint that retention removes
    "prune-removed",
    "swept",
)

_callback: Callable[[str], None] | None = None


def set_callback(callback: Callable[[str], None] | None) -> None:
    """Have `callback(point)` called at every point; None: nothing again. For tests."""
    global _callback
    _callback = callback


def reach(point: str) -> None:
    """The save has come to `point`, one of `POINTS`."""
    if _callback is not None:
        _callback(point)
