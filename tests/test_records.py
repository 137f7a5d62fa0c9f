"""Text equality, hashes and readers of records. Splits and plans outlive a release: their hashes are fixed."""

import hashlib

import pytest
from datasets import Dataset

from hf_e5.data.mining.text_blocks import BLOCK, TextReader, TextWriter
from hf_e5.data.sampler import hash_texts
from hf_e5.errors import InputError
from hf_e5.filters.duplicates import signature
from hf_e5.records import fold, read_any_rows, read_rows, split_of, stable_hash, text_key


def test_texts_are_equal_but_for_case_and_spacing():
    assert fold("  How\tTALL is\u00a0K2 ẞ \n") == "how tall is k2 ss"
    assert text_key(" How  TALL\n") == text_key("how tall") == stable_hash("how tall") != text_key("howtall")
    text = "half \ud800 pair"
    expected = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    assert (
        stable_hash(text) == stable_hash(text.encode("utf-8", "surrogatepass")) == int.from_bytes(expected, "little")
    )


def test_hashes_that_something_lasting_depends_on_keep_their_values():
    """The side of a record, the plan of a sampler, the signature of a near duplicate."""
    assert (stable_hash("How TALL is K2?"), stable_hash("数学")) == (4442107490895682818, 4589804602879230362)
    tasks = [split_of({"task_type": "short_long", "instruction": f"Task {n}"}, 0.5) for n in range(8)]
    assert [n for n, side in enumerate(tasks) if side == "test"] == [0, 3, 4, 7]
    rows = [split_of({"task_type": "sts", "query": f"Text {n}"}, 0.5) for n in range(8)]
    assert [n for n, side in enumerate(rows) if side == "test"] == [4]
    dataset = Dataset.from_dict({"query": ["How TALL is K2?"], "positive": ["a"], "negative": [["c"]]})
    assert hash_texts(dataset).tolist() == [[2221053745447841409, 1702698405120146464, 978974258366619547]]
    assert signature("How TALL is K2?", "8,611 metres")[:4].tolist() == [45400401, 78988697, 81672134, 26045233]


def test_texts_of_mining_are_numbered_digested_and_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "texts.arrow"
    texts = [f"text {n}" for n in range(BLOCK + 3)]
    with TextWriter.open(path) as writer:
        assert [writer.add(text, text) for text in [*texts, *texts]] == [*range(len(texts))] * 2
        assert not path.exists()
    # The digest tells a later run whether the folder holds its data.
    assert writer.digest() == hashlib.blake2b("".join(f"{t}\0" for t in texts).encode(), digest_size=16).hexdigest()
    reader = TextReader(path)
    assert [reader.num_blocks, reader.text(BLOCK + 2)] == [2, texts[-1]] and reader.block(0) == texts[:BLOCK]
    before = path.read_bytes()
    with pytest.raises(RuntimeError), TextWriter.open(path) as writer:
        writer.add("other", "other")
        raise RuntimeError
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_readers_skip_blank_lines_and_differ_in_what_is_no_object(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\n[2]\n{"a": "\xff')
    assert list(read_any_rows(path)) == [{"a": 1}, {"line": "[2]"}, {"line": '{"a": "\ufffd'}]
    with pytest.raises(InputError, match=r"rows\.jsonl:3: expected a JSON object, got list; repair or delete"):
        list(read_rows(path))
    path.write_bytes(b'{"a": 1}\n{"a": ')
    assert list(read_rows(path, torn_end=True)) == [{"a": 1}]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: not valid JSON"):
        list(read_rows(path))
