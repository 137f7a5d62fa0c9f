"""The store: one line per answer, on the disk before it counts, mended after a crash."""

import asyncio
import json
import os

import pytest

from hf_e5.errors import InputError
from hf_e5.records import RECORD_COLUMNS, read_rows
from hf_e5.synthesis.store import AnswerStore


def row(number, *, error=None, attempt=1, final=True, cost=0.5):
    answer = {"raw": "??"} if error else {"record": dict.fromkeys(RECORD_COLUMNS, "é") | {"id": f"0-sts-{number}"}}
    return {
        "id": f"0-sts-{number}",
        "kind": "example",
        "task_type": "sts",
        "model": "m",
        "attempt": attempt,
        "final": final,
        "error": error,
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "cost": cost,
        "request_id": "r",
        "finish_reason": "stop",
        **answer,
    }


def write(folder, rows, **options):
    async def main():
        store = AnswerStore(folder, **options)
        await asyncio.gather(*(store.append(one) for one in rows))
        store.close()
        return store

    return asyncio.run(main())


def ids(path):
    return [one["id"] for one in read_rows(path)]


def test_totals_and_views(tmp_path):
    rows = [row(1), row(2, error="json: no", final=False), row(2, attempt=2), row(3, error="http 400: no", cost=None)]
    write(tmp_path, rows)
    store = AnswerStore(tmp_path)
    assert (store.examples, store.prompt_tokens, store.completion_tokens, store.usd) == (2, 12, 16, 1.5)
    assert store.done == {"0-sts-1", "0-sts-2", "0-sts-3"}
    assert set(store.failed) == {"0-sts-3"}
    assert ids(tmp_path / "records.jsonl") == ["0-sts-1", "0-sts-2"]
    (failure,) = read_rows(tmp_path / "failures.jsonl")
    assert failure["reason"] == "http 400: no"
    assert failure["raw"] == "??"
    assert tuple(next(read_rows(tmp_path / "records.jsonl"))) == RECORD_COLUMNS
    assert "é" in (tmp_path / "records.jsonl").read_text(encoding="utf-8")


def test_an_answer_counts_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "answers.jsonl").read_bytes()))

    async def main():
        store = AnswerStore(tmp_path)
        waiting = [asyncio.create_task(store.append(row(number))) for number in range(50)]
        await asyncio.gather(*waiting)
        assert len(store.done) == 50
        store.close()

    asyncio.run(main())
    assert synced[-1].count(b"\n") == 50
    assert len(synced) < 10  # answers that arrive together share an fsync


def test_every_cut_of_the_last_line_is_mended(tmp_path):
    write(tmp_path, [row(1), row(2)])
    log = tmp_path / "answers.jsonl"
    content = log.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(content) - 1, 7):
        log.write_bytes(content[:end])
        store = AnswerStore(tmp_path)
        assert "0-sts-1" in store.done
        store.close()
        assert log.read_bytes() == content[:last]
    log.write_bytes(content[:-1])  # only the line end is missing: the answer is paid for and whole
    AnswerStore(tmp_path).close()
    assert log.read_bytes() == content


def test_a_crash_before_the_views_were_written(tmp_path):
    write(tmp_path, [row(1), row(2)])
    (tmp_path / "records.jsonl").write_bytes(b'{"id": "0-sts-1", "ta')
    AnswerStore(tmp_path).close()
    assert ids(tmp_path / "records.jsonl") == ["0-sts-1", "0-sts-2"]


def test_failures_can_be_opened_again(tmp_path):
    brainstorm = {**row(9, error="json: no"), "id": "0-sts-tasks-00001", "kind": "brainstorm"}
    write(tmp_path, [row(1, error="json: no"), brainstorm])
    store = AnswerStore(tmp_path)
    assert store.reopen_failures() == 1
    assert store.done == {"0-sts-tasks-00001"}
    store.close()
    write(tmp_path, [row(1, attempt=2)])
    assert ids(tmp_path / "failures.jsonl") == ["0-sts-tasks-00001"]
    assert ids(tmp_path / "records.jsonl") == ["0-sts-1"]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    store = AnswerStore(tmp_path)
    with pytest.raises(InputError, match="another run"):
        AnswerStore(tmp_path)
    store.close()
    AnswerStore(tmp_path).close()


def test_a_folder_belongs_to_one_plan(tmp_path):
    AnswerStore(tmp_path, {"seed": 1}).close()
    AnswerStore(tmp_path, {"seed": 1}).close()
    with pytest.raises(InputError, match="another seed"):
        AnswerStore(tmp_path, {"seed": 2})


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps(row(1)) + "\nnonsense\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(InputError, match=r"answers\.jsonl:2: not valid JSON"):
        AnswerStore(tmp_path)


def test_lone_surrogates_do_not_stop_a_run(tmp_path):
    bad = row(1)
    bad["record"]["query"] = "half a pair \ud83d"
    write(tmp_path, [bad])
    assert ids(tmp_path / "records.jsonl") == ["0-sts-1"]
