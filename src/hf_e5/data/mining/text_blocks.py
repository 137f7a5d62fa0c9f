"""Texts on disk in blocks, so that mining holds no corpus in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...files import whole_file


BLOCK = 8192
_SCHEMA = pa.schema([("text", pa.large_string())])


class TextWriter:
    """Numbers distinct texts in order of appearance and writes them to an Arrow file, one record batch per block."""

    def __init__(self, writer: pa.RecordBatchFileWriter) -> None:
        self.numbers: dict[Any, int] = {}
        self._writer = writer
        self._buffer: list[str] = []
        self._digest = hashlib.blake2b(digest_size=16)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[TextWriter]:
        """Yield a writer of a file that appears when the block ends without an error."""
        with whole_file(path) as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            texts = cls(writer)
            yield texts
            texts._flush()

    def add(self, key: Any, text: str) -> int:
        """Return the number of the text known as `key`; a new key is written down."""
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.numbers)
            self._buffer.append(text)
            self._digest.update(text.encode() + b"\0")
            if len(self._buffer) == BLOCK:
                self._flush()
        return number

    def digest(self) -> str:
        """Return a digest of all texts in their order."""
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if self._buffer:
            self._writer.write_batch(pa.record_batch([pa.array(self._buffer, pa.large_string())], schema=_SCHEMA))
            self._buffer = []


class TextReader:
    """Reads what `TextWriter` wrote, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self.num_blocks = self._file.num_record_batches

    def block(self, number: int) -> list[str]:
        return self._file.get_batch(number).column(0).to_pylist()

    def text(self, number: int) -> str:
        return self._file.get_batch(number // BLOCK).column(0)[number % BLOCK].as_py()
