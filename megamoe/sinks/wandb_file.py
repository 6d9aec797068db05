"""The record that Weights & Biases keeps of a run on disk (run-ID.wandb), read back: up to which step it is whole.

A header of 7 bytes, then the framing of LevelDB's log: pieces of [crc32, length, kind] and data in blocks of 32 KiB, of
which records are made. A process that is killed loses what it had not written, so only the file says what is there.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER = struct.Struct("<4sHB")
PIECE = struct.Struct("<IHB")
BLOCK_BYTES = 32 << 10
MAGIC = (b":W&B", 0xBEE1)
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[bytes]:
    """The whole records of a file, in order, up to its end or to where a crash tore it."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
        if len(header) < HEADER.size or HEADER.unpack(header)[:2] != MAGIC:
            return
        position, parts = HEADER.size, []
        while True:
            left = BLOCK_BYTES - position % BLOCK_BYTES
            if left < PIECE.size:  # padding
                file.seek(left, 1)
                position += left
            head = file.read(PIECE.size)
            if len(head) < PIECE.size:
                return
            checksum, length, kind = PIECE.unpack(head)
            data = file.read(length)
            if kind == 0 or len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
                return
            position += PIECE.size + length
            if kind in (FULL, FIRST):
                parts = []
            parts.append(data)
            if kind in (FULL, LAST):
                yield b"".join(parts)


def last_step(path: Path) -> int:
    """The last step that a file holds; -1 where it holds none."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    step = -1
    for data in records(path):
        record = Record()
        with contextlib.suppress(DecodeError):
            record.ParseFromString(data)
            if record.HasField("history"):
                step = max(step, record.history.step.num)
    return step


def last_step_of_run(folder: Path, run_id: str) -> int:
    """Over all files of a run in the folder "wandb"."""
    return max((last_step(path) for path in folder.glob(f"*run-*-{run_id}*/run-{run_id}.wandb")), default=-1)
