import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_e5.data.sampler import TaskBatchSampler, group_rows, hash_texts
from hf_e5.errors import InputError


settings.register_profile("shared_machine", deadline=None, max_examples=60)
settings.load_profile("shared_machine")

group_lists = st.lists(st.integers(0, 4), min_size=1, max_size=120)
world_sizes = st.integers(1, 8)
batch_sizes = st.integers(1, 6)


def all_ranks(groups, batch_size, world_size, epoch=0, **options):
    """The batches of every rank: `[rank][step] -> row numbers`."""
    ranks = []
    for rank in range(world_size):
        sampler = TaskBatchSampler(groups, batch_size, world_size=world_size, rank=rank, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


@given(group_lists, batch_sizes, world_sizes, st.booleans(), st.integers(0, 3))
def test_ranks_agree_and_no_row_is_lost(groups, batch_size, world_size, homogeneous, epoch):
    ranks = all_ranks(groups, batch_size, world_size, epoch, homogeneous=homogeneous)
    assert len({len(batches) for batches in ranks}) == 1
    seen = Counter()
    for step in zip(*ranks, strict=True):
        assert len({len(batch) for batch in step}) == 1  # equal shares: nobody waits in a collective
        assert 1 <= len(step[0]) <= batch_size
        rows = [row for batch in step for row in batch]
        seen.update(rows)
        if homogeneous:
            assert len({groups[row] for row in rows}) == 1
        sizes = Counter(groups)
        available = sizes[groups[rows[0]]] if homogeneous else len(groups)
        assert len(set(rows)) == min(
            len(rows), available
        )  # a row twice only where the group is smaller than the world
    assert set(seen) == set(range(len(groups)))
    fill = (len(set(groups)) if homogeneous else 1) * (world_size - 1)
    assert sum(seen.values()) <= len(groups) + fill


@given(group_lists, batch_sizes, world_sizes)
def test_drop_last_gives_full_batches_of_distinct_rows(groups, batch_size, world_size):
    full = sum(size // (batch_size * world_size) for size in Counter(groups).values())
    if not full:
        with pytest.raises(InputError, match="no training batch"):
            TaskBatchSampler(groups, batch_size, world_size=world_size, drop_last=True)
        return
    ranks = all_ranks(groups, batch_size, world_size, drop_last=True)
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert len(ranks[0]) == full
    assert len(rows) == len(set(rows)) == full * batch_size * world_size


@given(group_lists, batch_sizes, world_sizes, st.data())
def test_texts_never_change_which_rows_are_seen(groups, batch_size, world_size, data):
    texts = data.draw(
        st.lists(st.lists(st.integers(-1, 9), min_size=3, max_size=3), min_size=len(groups), max_size=len(groups))
    )
    ranks = all_ranks(groups, batch_size, world_size, texts=np.array(texts))
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert set(rows) == set(range(len(groups)))
    for step in zip(*ranks, strict=True):
        assert len({groups[row] for batch in step for row in batch}) == 1


@given(st.integers(2, 6), batch_sizes, world_sizes, st.integers(0, 10_000))
def test_no_text_twice_where_avoidable(num_batches, batch_size, world_size, seed):
    """Each positive belongs to two rows and there are enough batches to part them: none may meet."""
    size = num_batches * batch_size * world_size
    positives = np.arange(size) // 2
    texts = np.stack([np.arange(size) + size, positives], axis=1)
    sampler = TaskBatchSampler([0] * size, batch_size, texts=texts, world_size=world_size, seed=seed)
    for batch in sampler.plan(0):
        assert len(set(positives[batch])) == len(batch)


def test_duplicates_are_parted_across_fields_and_in_bulk():
    """A negative that is another row's positive counts; 20,000 rows in which each paragraph serves five questions."""
    rng = np.random.default_rng(0)
    size = 20_000
    paragraphs = rng.permutation(size) // 5
    negatives = rng.permutation(size) // 5
    texts = np.stack([size + np.arange(size), paragraphs, negatives], axis=1)
    plain = TaskBatchSampler([0] * size, 256, world_size=4).plan(0)
    parted = TaskBatchSampler([0] * size, 256, world_size=4, texts=texts).plan(0)

    def meetings(plan):
        return sum(
            len(row_texts) - len(set(row_texts))
            for row_texts in ([text for row in batch for text in set(texts[row])] for batch in plan)
        )

    assert meetings(plain) > 1_000
    assert meetings(parted) == 0


def test_unavoidable_duplicates_terminate_and_are_spread():
    """Three labels in batches of eight: every batch has repeats, and no row is lost over it."""
    texts = np.stack([np.arange(64) + 10, np.arange(64) % 3], axis=1)
    plan = TaskBatchSampler([0] * 64, 8, texts=texts).plan(0)
    assert sorted(row for batch in plan for row in batch) == list(range(64))


def test_filling_rows_bring_no_text_that_is_there():
    """Five rows on four ranks leave one row to fill with three: the row that shares its text comes last."""
    texts = np.array([[0, 10], [1, 10], [2, 11], [3, 12], [4, 13], [5, 14], [6, 15], [7, 16], [8, 17]])
    for epoch in range(20):
        plan = TaskBatchSampler([0] * 9, 2, texts=texts, world_size=4, seed=1).plan(epoch)
        tail = min(plan, key=len)
        assert len(set(tail)) == 4 and not {0, 1} <= set(tail)


@given(st.integers(1, 8))
def test_epochs_differ_and_repeat_exactly(world_size):
    groups = [0] * 40 + [1] * 60
    first, second = all_ranks(groups, 2, world_size, 0, seed=7), all_ranks(groups, 2, world_size, 1, seed=7)
    assert first != second
    assert first == all_ranks(groups, 2, world_size, 0, seed=7)
    assert first != all_ranks(groups, 2, world_size, 0, seed=8)


def test_the_batch_order_mixes_groups():
    order = [int(batch[0] >= 500) for batch in TaskBatchSampler([0] * 500 + [1] * 500, 10).plan(0)]
    assert order != sorted(order) and sum(order) == 50


def test_skipping_resumes_exactly():
    """What the Trainer does on resume: skip the first batches of the epoch it stopped in."""
    rows = Dataset.from_dict({"row": list(range(50))})

    def loader():
        sampler = TaskBatchSampler([0] * 20 + [1] * 30, 4, seed=3)
        loader = DataLoaderShard(rows, batch_sampler=sampler, collate_fn=lambda batch: [r["row"] for r in batch])
        loader.set_epoch(2)
        return loader

    whole = list(loader())
    resumed = skip_first_batches(loader(), 5)
    resumed.set_epoch(2)
    resumed.batch_sampler.batch_sampler.set_epoch(2)
    assert list(resumed) == whole[5:] and len(resumed) == len(whole) - 5


def test_wrong_arguments_are_named():
    with pytest.raises(InputError, match="rank 2 of 2"):
        TaskBatchSampler([0], 1, world_size=2, rank=2)
    with pytest.raises(InputError, match="batch_size 0"):
        TaskBatchSampler([0], 0)
    with pytest.raises(InputError, match="no training batch"):
        TaskBatchSampler([], 1)
    with pytest.raises(InputError, match="2 rows of text hashes for 3 rows"):
        TaskBatchSampler([0, 0, 0], 1, texts=np.zeros((2, 1)))


def test_groups_and_hashes_of_a_dataset():
    dataset = Dataset.from_dict(
        {
            "query": ["a", "b", "c"],
            "positive": ["x", "y", "x"],
            "negative": [[], ["x", "z"], ["y"]],
            "dataset": ["nli", "synthetic", "synthetic"],
            "task_type": [None, "sts", "sts"],
        }
    )
    groups, names = group_rows(dataset)
    assert groups.tolist() == [0, 1, 1] and names == ["nli", "synthetic/sts"]
    assert group_rows(dataset.select([2, 0]))[0].tolist() == [0, 1]  # follows an index mapping
    assert group_rows(dataset, ["task_type"])[1] == ["", "sts"]

    texts = hash_texts(dataset)
    assert texts.shape == (3, 4) and (texts[0, 2:] == -1).all()
    assert texts[0, 1] == texts[2, 1] == texts[1, 2] and texts[1, 1] == texts[2, 2]
    assert len(np.unique(texts[texts != -1])) == 6
    single = Dataset.from_dict({"query": ["a", "b"], "positive": ["x", "y"], "negative": ["xyz", None]})
    assert hash_texts(single).shape == (2, 3) and hash_texts(single)[1, 2] == -1  # a text, not its letters
    assert texts[0, 0] == 1_702_698_405_120_146_464  # the same in every process and version: not Python's own hash


_TWO_RANKS = """
import json, sys
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from datasets import Dataset
from hf_e5.data.sampler import TaskBatchSampler, group_rows

accelerator = Accelerator(cpu=True)
dataset = Dataset.from_dict({"row": list(range(90)), "dataset": ["a"] * 33 + ["b"] * 57, "task_type": [None] * 90})
groups, _ = group_rows(dataset)
sampler = TaskBatchSampler(groups, 4, world_size=accelerator.num_processes, rank=accelerator.process_index, seed=5)
loader = DataLoaderShard(
    dataset, batch_sampler=sampler, device=accelerator.device,
    collate_fn=lambda batch: torch.tensor([example["row"] for example in batch]),
)
epochs = []
for epoch in range(2):
    loader.set_epoch(epoch)
    epochs.append([gather_object([batch.tolist()]) for batch in loader])  # a rank with fewer batches would hang here
if accelerator.is_main_process:
    open(sys.argv[1], "w").write(json.dumps(epochs))
accelerator.end_training()
"""


def test_two_processes_share_the_task_and_no_row(tmp_path):
    (tmp_path / "run.py").write_text(_TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, str(tmp_path / "run.py"), str(tmp_path / "out.json")], check=True, timeout=180)
    epochs = json.loads((tmp_path / "out.json").read_text())
    assert epochs[0] != epochs[1]
    for steps in epochs:
        assert len(steps) == 5 + 8
        for left, right in steps:
            assert len(left) == len(right) and not set(left) & set(right)
            assert len({row >= 33 for row in left + right}) == 1
        assert {row for pair in steps for rows in pair for row in rows} == set(range(90))
