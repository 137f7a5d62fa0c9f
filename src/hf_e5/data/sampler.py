"""Which rows meet in a batch: one task per global step, no text twice, the same plan on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from ..errors import InputError
from ..records import stable_hash
from .tokenization import as_texts


# Duplicates are repaired by swapping rows between batches, in rounds. The bounds only matter for data where duplicates
# cannot be avoided (a classification set with five labels in batches of 2048).
_REPAIR_ROUNDS = 12
_REPAIRS_PER_ROUND = 100_000
_PROPOSALS_PER_ROUND = 800_000


def group_rows(dataset: Dataset, columns: Sequence[str] = ("dataset", "task_type")) -> tuple[np.ndarray, list[str]]:
    """Number the tasks of a mixture.

    Returns:
        The group of every row (`int64`, shape `[rows]`) and the name of every group, such as `synthetic/sts`.
    """
    names: dict[tuple, int] = {}
    groups = np.empty(len(dataset), dtype=np.int64)
    start = 0
    for table in dataset.select_columns(list(columns)).with_format("arrow").iter(batch_size=100_000):
        keys = zip(*(table.column(column).to_pylist() for column in columns), strict=True)
        ids = [names.setdefault(key, len(names)) for key in keys]
        groups[start : start + len(ids)] = ids
        start += len(ids)
    return groups, ["/".join(str(part) for part in key if part is not None) for key in names]


def hash_texts(dataset: Dataset) -> np.ndarray:
    """Hash the texts of every row, so that equal texts can be kept apart without holding the texts.

    Returns:
        `int64` of shape `[rows, 2 + largest number of negatives]`: 63-bit hashes of query, positive and negatives;
        -1 stands for "no text". Equal on every rank and in every run.
    """
    batches = []
    columns = [column for column in ("query", "positive", "negative") if column in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=20_000):
        batch = table.to_pydict()
        negatives = batch.get("negative") or [[]] * table.num_rows
        rows = [[q, p, *as_texts(n)] for q, p, n in zip(batch["query"], batch["positive"], negatives, strict=True)]
        hashes = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
        for i, row in enumerate(rows):
            hashes[i, : len(row)] = [stable_hash(text) >> 1 for text in row]
        batches.append(hashes)
    width = max((batch.shape[1] for batch in batches), default=2)
    return np.concatenate(
        [np.pad(batch, ((0, 0), (0, width - batch.shape[1])), constant_values=-1) for batch in batches]
        or [np.empty((0, width), dtype=np.int64)]
    )


class TaskBatchSampler(Sampler[list[int]]):
    """Deal rows into global batches of one group, and every global batch evenly to the ranks.

    The plan of an epoch is drawn from `(seed, epoch)` alone. Every rank computes the same plan and takes its own slice
    of each global batch, so all ranks have the same number of batches, see the same group at each step, and never the
    same row (but for the last batch of a group, see `drop_last`). It is a batch sampler that is already aware of
    ranks: it must not be dealt out a second time, as `accelerator.prepare` would do.

    To resume in the middle of an epoch, `set_epoch` and skip (`accelerate.skip_first_batches`, which the `Trainer`
    does by itself): skipping only walks over lists of row numbers, no row is read.

    Args:
        groups: group of each row (integers, shape `[rows]`), see `group_rows`.
        batch_size: rows of one rank in one batch.
        texts: hashes of each row's texts (`[rows, k]`, -1 for none), see `hash_texts`. Rows that share a text are put
            into different batches wherever the group's other batches allow it.
        world_size, rank: number of processes and the number of this one.
        seed: of the shuffle.
        homogeneous: one group per global batch; `False` mixes all groups.
        drop_last: drop what is left of a group after its full batches (other rows each epoch). By default it becomes a
            smaller batch, filled with further rows of the group to a multiple of `world_size`, so that no row is lost.

    Raises:
        InputError: no batch at all, or an impossible `batch_size`, `world_size` or `rank`.
    """

    def __init__(
        self,
        groups: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        texts: np.ndarray | None = None,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        homogeneous: bool = True,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"sampler: batch_size {batch_size}, rank {rank} of {world_size}: batch_size must be >= 1, rank < size"
            )
        self.batch_size, self.world_size, self.rank = batch_size, world_size, rank
        self.seed, self.epoch, self.drop_last = seed, 0, drop_last
        groups = np.asarray(groups)
        _, self._groups, sizes = np.unique(
            groups if homogeneous else np.zeros_like(groups), return_inverse=True, return_counts=True
        )
        self._texts = None if texts is None else _shared_texts(texts)
        if self._texts is not None and len(self._texts) != len(groups):
            raise InputError(f"sampler: {len(self._texts)} rows of text hashes for {len(groups)} rows")
        global_size = batch_size * world_size
        self._batches_per_group = sizes // global_size if drop_last else -(-sizes // global_size)
        if not self._batches_per_group.sum():
            raise InputError(
                f"no training batch: the largest group has {sizes.max(initial=0)} rows, a global batch needs "
                f"{global_size}; lower per_device_train_batch_size or turn dataloader_drop_last off"
            )

    def __len__(self) -> int:
        """Batches of one epoch: the same on every rank and in every epoch."""
        return int(self._batches_per_group.sum())

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.plan(self.epoch):
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle; takes effect at the next `iter`."""
        self.epoch = epoch

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the global batches of an epoch in their order, each an array of row numbers."""
        rng = np.random.default_rng((self.seed, epoch))
        rows = rng.permutation(len(self._groups))
        rows = rows[np.argsort(self._groups[rows], kind="stable")]  # groups one after the other, shuffled inside
        group_starts = np.searchsorted(self._groups[rows], np.arange(len(self._batches_per_group) + 1))

        global_size = self.batch_size * self.world_size
        within = np.arange(len(rows)) - group_starts[self._groups[rows]]
        first_batch = np.cumsum(self._batches_per_group) - self._batches_per_group
        batch_of = first_batch[self._groups[rows]] + within // global_size
        if self.drop_last:
            kept = within < (self._batches_per_group * global_size)[self._groups[rows]]
            rows, batch_of = rows[kept], batch_of[kept]
        if self._texts is not None:
            _separate(rows, batch_of, self._groups, self._texts, rng)

        # After the swaps `batch_of` is still sorted: a batch is a slice.
        batches = np.split(rows, np.flatnonzero(np.diff(batch_of)) + 1)
        for i, batch in enumerate(batches):
            if missing := -len(batch) % self.world_size:
                group = self._groups[batch[0]]
                batches[i] = self._fill(batch, missing, rows[group_starts[group] : group_starts[group + 1]], rng)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _fill(self, batch: np.ndarray, missing: int, group_rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Add `missing` rows of the same group, new to the batch in row and text while there are any."""
        others = rng.permutation(np.setdiff1d(group_rows, batch))
        fill: list[int] = []
        if self._texts is not None:
            taken = set(self._texts[batch].ravel())
            for row in others:
                new = {text for text in self._texts[row] if text >= 0}
                if taken.isdisjoint(new):
                    taken |= new
                    fill.append(row)
                if len(fill) == missing:
                    break
        spare = np.concatenate([np.setdiff1d(others, fill), batch])
        return np.concatenate([batch, fill, np.resize(spare, missing - len(fill))]).astype(np.int64)


def _shared_texts(texts: np.ndarray) -> np.ndarray:
    """Number the texts that occur in more than one row; -1 for all others. Shape `[rows, k]` as given."""
    texts = np.sort(texts, axis=1)
    texts[:, 1:][texts[:, 1:] == texts[:, :-1]] = -1  # a text twice in one row is no clash between rows
    _, ids, counts = np.unique(texts, return_inverse=True, return_counts=True)
    ids = ids.reshape(texts.shape)
    return np.where((texts != -1) & (counts[ids] > 1), ids, -1)


def _separate(
    rows: np.ndarray, batch_of: np.ndarray, groups: np.ndarray, texts: np.ndarray, rng: np.random.Generator
) -> None:
    """Swap rows between batches of a group, in place, until no batch holds a text twice or no swap helps.

    Colouring a conflict graph exactly is NP-hard; random swaps settle all but the tightest cases in a few rounds, and
    each round is a sort. `rows` and `batch_of` have shape `[positions]` and are ordered by group and batch.

    Example: the batches of a group are [0, 1] and [2, 3], and rows 0 and 1 share a text. Both clash. Row 0 draws row 2
    as its partner; batch 1 holds no text of row 0 and batch 0 none of row 2, so the two swap places. Now the batches
    are [2, 1] and [0, 3], and the next round finds no clash.
    """
    num_texts = int(texts.max(initial=-1)) + 1
    if not num_texts:
        return
    group_of = groups[rows]
    starts = np.searchsorted(group_of, group_of, side="left")
    sizes = np.searchsorted(group_of, group_of, side="right") - starts
    movable = batch_of[starts] != batch_of[starts + sizes - 1]  # the group has a second batch

    fruitless = 0
    for _ in range(_REPAIR_ROUNDS):
        positions, columns = np.nonzero((texts[rows] >= 0) & movable[:, None])
        held = batch_of[positions] * num_texts + texts[rows[positions], columns]
        order = np.argsort(held, kind="stable")
        present = held[order]
        clashing = np.unique(positions[order[1:][present[1:] == present[:-1]]])
        if not len(clashing):
            return
        rng.shuffle(clashing)
        clashing = clashing[:_REPAIRS_PER_ROUND]

        shape = (len(clashing), min(_PROPOSALS_PER_ROUND // len(clashing), 256))
        partners = starts[clashing, None] + (rng.random(shape) * sizes[clashing, None]).astype(np.int64)
        own = np.broadcast_to(clashing[:, None], shape)

        def clashes(positions: np.ndarray, batches: np.ndarray, present: np.ndarray = present) -> np.ndarray:
            """Whether a row would meet one of its texts in a batch (before any row leaves it)."""
            text = texts[rows[positions]]
            wanted = batches[..., None] * num_texts + text
            found = present[np.minimum(np.searchsorted(present, wanted), len(present) - 1)] == wanted
            return (found & (text >= 0)).any(axis=-1)

        good = (batch_of[partners] != batch_of[own]) & ~clashes(own, batch_of[partners])
        good[good] = ~clashes(partners[good], batch_of[own[good]])
        choice = good.argmax(axis=1)
        solved = good[np.arange(len(clashing)), choice]
        pairs = np.stack([clashing[solved], partners[solved, choice[solved]]], axis=1)
        # A position moves once a round: keep the pairs that are the first to name both their positions.
        _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        pairs = pairs[(first[inverse].reshape(pairs.shape) // 2 == np.arange(len(pairs))[:, None]).all(axis=1)]
        rows[pairs] = rows[pairs[:, ::-1]]
        fruitless = fruitless + 1 if len(pairs) * 100 < len(clashing) else 0
        if fruitless == 2:
            return
