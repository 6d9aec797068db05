"""Runs in, files out: the page, and PNGs where matplotlib is there to draw them."""

from collections.abc import Sequence
from pathlib import Path

from megamoe.checkpoint.files import replace_file
from megamoe.errors import OutputError
from megamoe.report.html import html_report
from megamoe.report.record import Record, read_record

PAGE = "report.html"


def write_report(
    runs: Sequence[Path], output: Path | None, *, smoothing_lines: int = 1, with_images: bool = True
) -> list[Path]:
    """Write everything into `output`, by default report/ of the first run; returns what was written.

    Raises ConfigError for what is no run, OutputError where nothing can be written.
    """
    records = [read_record(run, smoothing_lines=smoothing_lines) for run in runs]
    _name_apart(records)
    folder = output if output is not None else runs[0] / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / PAGE]
        replace_file(written[0], html_report(records, smoothing_lines=smoothing_lines).encode())
        if with_images:
            from megamoe.report.images import png_images

            for name, png in png_images(records):
                replace_file(folder / name, png)
                written.append(folder / name)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}): name another folder with --output"
        ) from None
    return written


def _name_apart(records: Sequence[Record]) -> None:
    """Runs whose folders have one name get as much of their paths as tells them apart, or a number."""
    for length in range(2, 6):
        names = [record.name for record in records]
        for record in records:
            if names.count(record.name) > 1:
                record.name = "/".join(record.path.resolve().parts[-length:])
    names = [record.name for record in records]
    for number, record in enumerate(records, 1):
        if names.count(record.name) > 1:
            record.name = f"{record.name} ({number})"
