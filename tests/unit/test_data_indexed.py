"""The indexed dataset: Megatron's own reader gets back what we wrote, and damage is named with its place."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from megamoe.data import indexed
from megamoe.data.indexed import IndexedDataset, IndexedWriter, bin_path, idx_path, token_dtype
from megamoe.errors import DataError

DOCUMENTS = [[5, 6, 7, 8], [9], [1, 2, 3], [4, 4, 4, 4, 4]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 300) -> Path:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_documents(np.array(document, dtype=writer.dtype), np.array([len(document)]))
    return prefix


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (65_499, "uint16"), (65_500, "int32")])
def test_megatron_reads_what_we_wrote(tmp_path, vocab_size, dtype):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    assert megatron.DType.optimal_dtype(vocab_size) == token_dtype(vocab_size)
    prefix = write(tmp_path / "deep" / "corpus", DOCUMENTS, vocab_size)
    theirs = megatron.IndexedDataset(str(prefix))
    assert theirs.index.dtype == np.dtype(dtype)
    assert [theirs[number].tolist() for number in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs.get(0, offset=1, length=2).tolist() == [6, 7]


def test_bytes_equal_megatrons_own_builder(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", DOCUMENTS)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_our_reader(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "corpus", DOCUMENTS))
    assert (dataset.num_documents, dataset.num_tokens, dataset.dtype.name) == (4, 13, "uint16")
    assert [dataset.document(number).tolist() for number in range(4)] == DOCUMENTS
    across = dataset.tokens(2, 8, vocab_size=300)
    assert across.dtype == np.int64
    assert across.tolist() == [7, 8, 9, 1, 2, 3]
    for span in ((-1, 3), (3, 3), (10, 14)):
        with pytest.raises(IndexError):
            dataset.tokens(*span, vocab_size=300)


def test_index_is_written_in_pieces(tmp_path, monkeypatch):
    write(tmp_path / "whole", DOCUMENTS)
    monkeypatch.setattr(indexed, "COPY_ITEMS", 3)
    write(tmp_path / "pieces", DOCUMENTS)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "pieces.idx").read_bytes()


def test_an_interrupted_write_leaves_the_old_dataset(tmp_path):
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    before = bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_and_stop(prefix)
    assert (bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]


def write_and_stop(prefix: Path) -> None:
    with IndexedWriter(prefix, 300) as writer:
        writer.add_documents(np.array([1], dtype=writer.dtype), np.array([1]))
        raise KeyboardInterrupt


def test_the_index_appears_last(tmp_path):
    seen = []
    prefix = tmp_path / "corpus"
    with IndexedWriter(prefix, 300, before_index=lambda: seen.append(sorted(tmp_path.glob("corpus.???")))) as writer:
        writer.add_documents(np.array([1, 2], dtype=writer.dtype), np.array([2]))
    assert seen == [[bin_path(prefix)]]
    assert idx_path(prefix).exists()


def test_writer_refuses_arrays_that_do_not_agree(tmp_path):
    with IndexedWriter(tmp_path / "corpus", 300) as writer:
        with pytest.raises(ValueError, match="do not fit"):
            writer.add_documents(np.array([1, 2], dtype=writer.dtype), np.array([3]))
        with pytest.raises(ValueError, match="do not fit"):
            writer.add_documents(np.array([1, 2], dtype=np.int64), np.array([2]))


def error_of(prefix: Path) -> str:
    with pytest.raises(DataError) as caught:
        IndexedDataset(prefix)
    return str(caught.value)


def test_missing_files(tmp_path):
    prefix = tmp_path / "corpus"
    assert error_of(prefix) == (
        f"cannot open {prefix}.idx: No such file or directory; give the path of a .bin/.idx pair without the ending"
    )
    write(prefix, DOCUMENTS)
    idx_path(prefix).rename(tmp_path / "away")
    assert error_of(prefix) == (
        f"cannot open {prefix}.idx: No such file or directory; {prefix}.bin is there, so the dataset is incomplete: "
        f"run tools/preprocess_data.py again"
    )
    (tmp_path / "away").rename(idx_path(prefix))
    bin_path(prefix).unlink()
    assert error_of(prefix).startswith(f"cannot open {prefix}.bin: No such file or directory; {prefix}.idx is there")


def test_truncated_bin(tmp_path):
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(content[:11])
    assert error_of(prefix) == (
        f"{prefix}.bin is truncated: {prefix}.idx describes 13 tokens (26 bytes), but the file ends at byte 11, token 5"
    )
    bin_path(prefix).write_bytes(content + b"xx")
    assert "is too long" in error_of(prefix)


def test_truncated_idx_at_every_byte(tmp_path):
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    content = idx_path(prefix).read_bytes()
    assert len(content) == 34 + 4 * 12 + 5 * 8
    for size in range(len(content)):
        idx_path(prefix).write_bytes(content[:size])
        message = error_of(prefix)
        assert message.startswith(f"{prefix}.idx is truncated: ")
        assert re.search(rf"ends at byte {size}$", message)


def test_wrong_magic_version_and_dtype(tmp_path):
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    content = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(b"TNTIDX\x00\x00\x01" + content[9:])
    assert error_of(prefix) == (
        f"{prefix}.idx is no indexed dataset: byte 0 starts b'TNTIDX\\x00\\x00\\x01', not b'MMIDIDX\\x00\\x00'"
    )
    idx_path(prefix).write_bytes(content[:9] + struct.pack("<Q", 2) + content[17:])
    assert error_of(prefix) == f"{prefix}.idx has version 2 at byte 9; only version 1 is known"
    idx_path(prefix).write_bytes(content[:17] + b"\x06" + content[18:])
    assert error_of(prefix).startswith(f"{prefix}.idx has dtype code 6 at byte 17; valid for token ids: 1 (uint8)")


def patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


def test_damaged_tables(tmp_path):
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    content = idx_path(prefix).read_bytes()
    offsets_at, bounds_at = 34 + 16, 34 + 16 + 32
    idx_path(prefix).write_bytes(patched(content, 34 + 4, struct.pack("<i", 2)))
    assert error_of(prefix) == (
        f"{prefix}.idx is damaged: sequence 2 of 4 (length 3 tokens, offset 10 bytes) does not follow the one before it"
    )
    idx_path(prefix).write_bytes(patched(content, offsets_at, struct.pack("<q", 2)))
    assert "sequence 0 of 4" in error_of(prefix)
    idx_path(prefix).write_bytes(patched(content, 34, struct.pack("<i", -4)))
    assert "sequence 0 of 4" in error_of(prefix)
    idx_path(prefix).write_bytes(patched(content, bounds_at + 16, struct.pack("<q", 0)))
    assert error_of(prefix) == f"{prefix}.idx is damaged: document bound 2 is smaller than the one before it"
    idx_path(prefix).write_bytes(patched(content, bounds_at + 32, struct.pack("<q", 9)))
    assert error_of(prefix) == f"{prefix}.idx is damaged: document bounds do not run from 0 to 4 sequences"


def test_large_indexes_are_checked_at_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "FULL_CHECK_SEQUENCES", 3)
    monkeypatch.setattr(indexed, "COPY_ITEMS", 2)
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    assert IndexedDataset(prefix).num_tokens == 13
    content = idx_path(prefix).read_bytes()
    idx_path(prefix).write_bytes(patched(content, 34 + 8, struct.pack("<i", 2)))
    assert "sequence 3 of 4" in error_of(prefix)


def test_empty_corpus(tmp_path):
    prefix = write(tmp_path / "corpus", [])
    assert error_of(prefix) == f"{prefix} is an empty corpus: {prefix}.idx lists 0 documents, 0 tokens"


def test_id_beyond_the_vocabulary(tmp_path):
    prefix = write(tmp_path / "corpus", DOCUMENTS)
    dataset = IndexedDataset(prefix)
    assert dataset.tokens(0, 4, vocab_size=9).tolist() == [5, 6, 7, 8]
    with pytest.raises(DataError) as caught:
        dataset.tokens(1, 7, vocab_size=9)
    assert str(caught.value) == (f"{prefix}.bin, token 4: id 9 is outside the vocabulary of 9 (valid: 0 to 8)")
    signed = IndexedDataset(write(tmp_path / "signed", [[3, -1, 2]], vocab_size=70_000))
    with pytest.raises(DataError, match=re.escape("token 1: id -1 is outside the vocabulary of 70000")):
        signed.tokens(0, 3, vocab_size=70_000)
