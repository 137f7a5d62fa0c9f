"""Packs: texts of any length laid flat, one after the other, so that linear layers compute hardly any padding.

A pack is one micro-batch. Only attention needs to know where a text ends; for it the pack describes *groups* of texts
of like length. Texts that begin with the same instruction can share it: its tokens then stand there once,
ahead of what follows them in each text (exact for causal attention, where a prefix never sees what comes after it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor


# Matrix libraries compile or tune a kernel for every shape they meet, which costs as much time as the products, and
# memory. So packs come in few sizes, with at most this share of filler, and texts in few lengths (in attention alone).
FILLER_SHARE = 1 / 16
LENGTH_STEP = 32
# Queries of a text per block of attention: keys after a block's last query are never multiplied.
BLOCK = 128
# Pairs of query and key, per head, in a group: larger groups exceed a core's cache.
MAX_PAIRS = BLOCK * 1024
# An instruction is shared if that saves at least so many tokens; below, another group costs more than it saves.
MIN_SHARED_TOKENS = 32


@dataclass(frozen=True)
class Group:
    """Texts of a pack that attention handles together: flat rows `start` to `stop`, each text after the other."""

    start: int
    stop: int
    num_texts: int
    length: int  # of each text for attention, without the prefix: a multiple of LENGTH_STEP
    padded: Tensor | None  # [stop - start] place of each row among num_texts x length; None if all texts fill it
    prefix: tuple[int, int] = (0, 0)  # flat rows of the shared prefix, which every text of the group attends to


@dataclass(frozen=True)
class Segment:
    """One text of a pack (without its shared prefix), or one shared prefix: `length` rows that attend as one."""

    length: int
    prefix: tuple[int, int]  # flat rows of the prefix that stands before it


@dataclass(frozen=True)
class Pack:
    """T flat tokens: those of n texts, shared prefixes, and a filler that stands last (`FILLER_SHARE`)."""

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, from 0 in each text
    segments: tuple[Segment, ...]  # cover the T rows in order
    texts: Tensor  # [n] int64, which of the caller's texts these are
    last_rows: Tensor  # [n] int64, row of the last token of each text

    @property
    def num_tokens(self) -> int:
        """What the linear layers compute, filler included."""
        return len(self.input_ids)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass."""
        return {"pack": self}

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The segments as batched matrix products want them."""
        return tuple(_groups(self.segments, self.input_ids.device))

    @cached_property
    def flash_layout(self) -> FlashLayout:
        return _flash_layout(self)


@dataclass(frozen=True)
class FlashLayout:
    """The segments as variable-length attention kernels want them."""

    query_offsets: Tensor  # [segments + 1] int32
    key_offsets: Tensor  # [segments + 1] int32, with the prefix in front of each segment
    longest_query: int
    longest_key: int
    key_rows: Tensor | None  # flat rows in the order of `key_offsets`; None without shared prefixes: as they stand


def make_packs(
    input_ids: Tensor,
    lengths: Tensor,
    *,
    max_tokens: int,
    prefix_lengths: Tensor | None = None,
    device: torch.device | None = None,
    texts: Sequence[int] | None = None,
) -> list[Pack]:
    """Sort texts by length and cut them into packs of at most `max_tokens` tokens (a longer text has a pack alone).

    Args:
        input_ids: [T] int64, the tokens of all texts, one text after the other.
        lengths: [U] int64, at least 1 each.
        max_tokens: token budget of a pack, shared prefixes counted once, filler included.
        prefix_lengths: [U] int64, leading tokens that may be shared by texts in which they are equal; less than
            `lengths`. None or 0: nothing is shared. For causal backbones with last-token pooling only.
        device: of the packs; that of `input_ids` by default.
        texts: take only these of the U texts.
    """
    device = device or input_ids.device
    ids = input_ids.cpu().split(lengths.tolist())
    prefixes = [()] * len(ids) if prefix_lengths is None else _shared_prefixes(ids, prefix_lengths.tolist())
    # Longest first, so that a budget that is too large shows at once; equal prefixes stay together.
    order = sorted(range(len(ids)) if texts is None else texts, key=lambda i: (prefixes[i], -len(ids[i])))
    return [_pack(ids, prefixes, chosen, max_tokens, device) for chosen in _cut(ids, prefixes, order, max_tokens)]


def _shared_prefixes(texts: Sequence[Tensor], prefix_lengths: list[int]) -> list[tuple[int, ...]]:
    """The prefix of each text if it is worth sharing, else ()."""
    prefixes = [tuple(text[:length].tolist()) for text, length in zip(texts, prefix_lengths, strict=True)]
    counts: dict[tuple[int, ...], int] = {}
    for prefix in prefixes:
        counts[prefix] = counts.get(prefix, 0) + 1
    return [prefix if (counts[prefix] - 1) * len(prefix) >= MIN_SHARED_TOKENS else () for prefix in prefixes]


def _cut(
    texts: Sequence[Tensor], prefixes: Sequence[tuple[int, ...]], order: list[int], max_tokens: int
) -> Iterator[list[int]]:
    chosen: list[int] = []
    num_tokens = 0
    if not order:
        return
    for text in order:
        is_new = not chosen or prefixes[chosen[-1]] != prefixes[text]
        added = len(texts[text]) - (0 if is_new else len(prefixes[text]))
        if chosen and num_tokens + added > max_tokens:
            yield chosen
            chosen, num_tokens, added = [], 0, len(texts[text])
        chosen.append(text)
        num_tokens += added
    yield chosen


def _pack(
    texts: Sequence[Tensor],
    prefixes: Sequence[tuple[int, ...]],
    chosen: list[int],
    max_tokens: int,
    device: torch.device,
) -> Pack:
    """Lay the `chosen` texts flat, each shared prefix once, ahead of the texts that begin with it.

    Texts "abX", "abYZ" and "Q", of which the first two share the prefix "ab":
        rows 0-5: a b | X | Y Z | Q, positions 0 1 | 2 | 2 3 | 0, last rows 2, 4 and 5;
        segments of 2, 1, 2 and 1 rows, of which the second and third attend to rows 0-2 as well.
    """
    pieces: list[tuple[Tensor, tuple[int, int]]] = []  # tokens of a segment, rows of its prefix
    last_rows: list[int] = []
    num_tokens = 0
    shared: tuple[int, ...] = ()
    rows = (0, 0)
    for text in chosen:
        prefix = prefixes[text]
        if prefix != shared:
            shared, rows = prefix, (num_tokens, num_tokens + len(prefix)) if prefix else (0, 0)
            if prefix:
                pieces.append((texts[text][: len(prefix)], (0, 0)))
                num_tokens += len(prefix)
        pieces.append((texts[text][len(prefix) :], rows))
        num_tokens += len(texts[text]) - len(prefix)
        last_rows.append(num_tokens - 1)
    size = _round_up(num_tokens, 2 ** max(int(FILLER_SHARE * num_tokens).bit_length() - 1, 0))
    num_filler = min(size, max(max_tokens, num_tokens)) - num_tokens
    if num_filler:
        pieces.append((torch.zeros(num_filler, dtype=torch.int64), (0, 0)))
    return Pack(
        torch.cat([tokens for tokens, _ in pieces]).to(device),
        torch.cat([torch.arange(len(tokens)) + (stop - start) for tokens, (start, stop) in pieces]).to(device),
        tuple(Segment(len(tokens), prefix) for tokens, prefix in pieces),
        torch.tensor(chosen, device=device),
        torch.tensor(last_rows, device=device),
    )


def _groups(segments: Sequence[Segment], device: torch.device) -> Iterator[Group]:
    """Neighbours with one prefix and one padded length, as many as `MAX_PAIRS` allows."""
    stop = 0
    for (prefix, length), run in groupby(
        segments, key=lambda segment: (segment.prefix, _round_up(segment.length, LENGTH_STEP))
    ):
        pairs = min(length, BLOCK) * (prefix[1] - prefix[0] + length)
        lengths = [segment.length for segment in run]
        first = 0
        while first < len(lengths):
            # A power of two, so that there are few sizes.
            size = 2 ** (max(1, min(len(lengths) - first, MAX_PAIRS // pairs)).bit_length() - 1)
            members = lengths[first : first + size]
            first += size
            start, stop = stop, stop + sum(members)
            places = None
            if sum(members) < len(members) * length:
                is_token = torch.arange(length) < torch.tensor(members)[:, None]
                places = is_token.flatten().nonzero().flatten().to(device)
            yield Group(start, stop, len(members), length, places, prefix)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _flash_layout(pack: Pack) -> FlashLayout:
    device = pack.input_ids.device
    query_lengths = [segment.length for segment in pack.segments]
    key_lengths = [segment.prefix[1] - segment.prefix[0] + segment.length for segment in pack.segments]
    query_offsets, key_offsets = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (query_lengths, key_lengths)
    )
    key_rows = None
    if key_lengths != query_lengths:
        starts = [0, *accumulate(query_lengths)]
        rows = [
            row
            for start, segment in zip(starts, pack.segments, strict=False)
            for row in (*range(*segment.prefix), *range(start, start + segment.length))
        ]
        key_rows = torch.tensor(rows, device=device)
    return FlashLayout(query_offsets, key_offsets, max(query_lengths), max(key_lengths), key_rows)
