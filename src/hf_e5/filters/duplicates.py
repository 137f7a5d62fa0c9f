"""Exact and near duplicates among the (query, positive) pairs of records.

Exact: equal once case and spacing are ignored. Near: an estimated Jaccard similarity of character 5-grams of at least
the threshold; characters instead of words, so that Chinese and Thai need no tokenizer. datasketch computes the MinHash
signatures. The candidate search over their bands is vectorised here: `datasketch.MinHashLSH` keeps Python sets and
takes 4 kB a record, this takes 0.3 kB, and the pass over 500k records stays within memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterator
from functools import cache
from zlib import crc32

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..errors import InputError
from ..records import fold, stable_hash


SHINGLE = 5
# 12 bands of 5 values: a pair with Jaccard 0.8 becomes a candidate with probability 0.99, one with 0.4 with 0.12;
# candidates are then compared by their whole signatures.
BANDS, BAND_SIZE = 12, 5
NUM_PERM = BANDS * BAND_SIZE


def _join_folded(query: str, positive: str) -> str:
    # The tab keeps apart what either text alone would join ("ab", "c" and "a", "bc").
    return f"{fold(query)}\t{fold(positive)}"


def exact_key(query: str, positive: str) -> int:
    """Return 64 bits that are the same for pairs that differ in case and spacing only."""
    return stable_hash(_join_folded(query, positive))


@cache
def _empty_minhash():
    try:
        from datasketch import MinHash
    except ImportError:
        raise InputError("near-duplicate search needs datasketch: pip install hf-e5[synthesis]") from None
    return MinHash(NUM_PERM, seed=1, hashfunc=crc32)


def signature(query: str, positive: str) -> np.ndarray:
    """Return the MinHash signature of a pair: uint32 [NUM_PERM], the same on every machine."""
    # UTF-32 makes every character 4 bytes, so that shingles are slices.
    data = _join_folded(query, positive).encode("utf-32-le", errors="surrogatepass")
    last = max(len(data) - 4 * SHINGLE, 0)
    minhash = _empty_minhash().copy()
    minhash.update_batch({data[start : start + 4 * SHINGLE] for start in range(0, last + 1, 4)})
    return minhash.hashvalues


class DuplicateIndex:
    """Keys and signatures of the rows of a run, those of earlier runs first; about 0.4 kB a row.

    A row is known by its number; rows of earlier runs, which are only compared with, have the number -1.
    """

    def __init__(self) -> None:
        self._rows = array("q")
        self._places: list[str] = []
        self._keys = array("Q")
        self._signatures = bytearray()

    def add(self, row: int, place: str, key: int, signature: bytes) -> None:
        """Append a row; `place` is what to call it, `signature` the bytes of its uint32 [NUM_PERM]."""
        self._rows.append(row)
        self._places.append(place)
        self._keys.append(key)
        self._signatures += signature

    def exact(self) -> Iterator[tuple[int, str]]:
        """Yield (row, place of the first row with the same key) of rows that repeat an earlier one."""
        first: dict[int, int] = {}
        for number, key in enumerate(self._keys):
            original = first.setdefault(key, number)
            if original != number and self._rows[number] >= 0:
                yield self._rows[number], self._places[original]

    def near(self, threshold: float, dropped: Container[int]) -> Iterator[tuple[int, str]]:
        """Yield (row, place of the first row of its cluster) of near duplicates; `dropped` rows are left out.

        The signatures, the bulk of the memory, are given up: this is the last question to an index.
        """
        live = [number for number, row in enumerate(self._rows) if row not in dropped]
        signatures = np.frombuffer(self._signatures, np.uint32).reshape(-1, NUM_PERM)[live]
        self._signatures = bytearray()
        for position, original in near_duplicates(signatures, threshold).items():
            row = self._rows[live[position]]
            if row >= 0:
                yield row, self._places[live[original]]


def near_duplicates(signatures: np.ndarray, threshold: float) -> dict[int, int]:
    """Find the rows that repeat an earlier row.

    Args:
        signatures: uint32 [rows, NUM_PERM], earlier rows first.
        threshold: least estimated Jaccard similarity, 0 to 1. The estimate has a standard error of at most 0.065.

    Returns:
        Row number of each near duplicate to that of the first row of its cluster, which is no key. Rows joined by a
        chain of near duplicates are one cluster.
    """
    size = len(signatures)
    pairs = np.concatenate(list(_similar_pairs(signatures, threshold))).T
    graph = coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(size, size))
    _, first, clusters = np.unique(
        connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
    )
    original = first[clusters]
    return {row: int(original[row]) for row in np.flatnonzero(original != np.arange(size)).tolist()}


def _similar_pairs(signatures: np.ndarray, threshold: float) -> Iterator[np.ndarray]:
    """Yield [pairs, 2] of (earlier row, later row) that share a band and reach the threshold."""
    for band in np.split(signatures, BANDS, axis=1):
        # A stable sort puts equal keys next to one another with rows ascending.
        hashed = _hash_rows(band)
        order = np.argsort(hashed, kind="stable")
        ordered = hashed[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        heads = np.repeat(starts, np.diff(np.r_[starts, len(ordered)]))
        positions = np.arange(len(ordered))
        # Each row is compared with the head of its bucket and with its predecessor: linear, however large a bucket.
        for others in (heads, positions - 1):
            inside = (others >= heads) & (others < positions)
            pairs = np.stack([order[others[inside]], order[positions[inside]]], axis=1)
            for chunk in np.array_split(pairs, len(pairs) // 100_000 + 1):
                similarity = (signatures[chunk[:, 0]] == signatures[chunk[:, 1]]).mean(axis=1)
                yield chunk[similarity >= threshold]


def _hash_rows(band: np.ndarray) -> np.ndarray:
    """Fold uint32 [rows, BAND_SIZE] to uint64 [rows]."""
    folded = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        folded = (folded ^ column) * np.uint64(0x9E3779B97F4A7C15)
        folded ^= folded >> np.uint64(32)
    return folded
