import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from hf_e5.cli import main
from hf_e5.data.mixture import load_mixture
from hf_e5.data.mixture_config import read_mixture
from hf_e5.data.validation import validate_mixture
from hf_e5.errors import InputError


ROOT = Path(__file__).parent.parent
TRIPLETS = str(ROOT / "examples/data/triplets.jsonl")
COLUMNS = ["instruction", "query", "positive", "negative", "dataset", "task_type"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count, prefix=""):
    return [{"query": f"{prefix}question {i}", "positive": f"{prefix}answer {i}"} for i in range(count)]


def test_a_single_file_is_a_mixture_of_one():
    dataset = load_mixture(TRIPLETS)
    assert dataset.column_names == COLUMNS and len(dataset) == 3838
    records = [json.loads(line) for line in open(TRIPLETS, encoding="utf-8")]
    for record, row in zip(records, dataset, strict=True):
        assert row["query"] == record["query"] and row["positive"] == record["positive"]
        assert row["instruction"] == record["instruction"] and row["task_type"] == record["task_type"]
        assert row["negative"] == ([record["negative"]] if record.get("negative") else [])
    assert set(dataset["dataset"]) == {"triplets"}
    assert dataset.cache_files  # memory-mapped, not in RAM


def test_parquet_and_folder_with_configs_and_splits(tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        (tmp_path / "data/sts").mkdir(parents=True, exist_ok=True)
        Dataset.from_list(pairs(count, split)).to_parquet(tmp_path / f"data/sts/{split}-00000-of-00001.parquet")
    files = [{"split": split, "path": f"data/sts/{split}-*"} for split in ("train", "test")]
    front = yaml.safe_dump({"configs": [{"config_name": "sts", "data_files": files}]})
    (tmp_path / "README.md").write_text(f"---\n{front}---\n")
    assert len(load_mixture(tmp_path, config="sts")) == 6
    test = load_mixture(tmp_path, config="sts", split="test")
    assert test["query"][:] == ["testquestion 0", "testquestion 1"]
    assert test["instruction"][:] == [None, None] and test["negative"][:] == [[], []]
    assert len(load_mixture(tmp_path / "data/sts/train-00000-of-00001.parquet", max_rows=4)) == 4
    mixture = {"datasets": [{"path": str(tmp_path), "config": "sts", "split": "test", "name": "dev"}]}
    assert load_mixture(mixture)["dataset"][:] == ["dev", "dev"]


def test_columns_inside_structs_and_joined_titles(tmp_path):
    """The shape of retrieval sets on the Hub: lists of {title, text} passages."""
    rows = [
        {
            "q": f"question {i}",
            "positive_passages": [{"title": "T", "text": f"p{i}"}, {"title": "", "text": f"q{i}"}],
            "negative_passages": [{"title": "N", "text": f"n{i}-{j}"} for j in range(i)],
            "answers": ["unused"],
        }
        for i in range(6)
    ]
    entry = {
        "path": write(tmp_path / "rows.jsonl", rows),
        "columns": {
            "query": "q",
            "positive": "positive_passages.title + positive_passages.text",
            "negative": "negative_passages.text",
        },
        "instruction": "Find it.",
    }
    dataset = load_mixture({"datasets": [entry]})
    for i, row in enumerate(dataset):
        assert row["query"] == f"question {i}" and row["instruction"] == "Find it."
        assert row["positive"] in {f"T p{i}", f"q{i}"}
        assert row["negative"] == [f"n{i}-{j}" for j in range(i)]
    assert {row["positive"][0] for row in dataset} == {"T", "q"}  # one of several positives, drawn per row

    rows = [{"a": "q", "b": "p", "n1": "x", "n2": None, "n3": "y"}]
    entry = {"path": write(tmp_path / "wide.jsonl", rows), "columns": {"query": "a", "positive": "b"}}
    entry["columns"]["negative"] = ["n1", "n2", "n3"]
    assert load_mixture({"datasets": [entry]})["negative"][:] == [["x", "y"]]


def test_sampling_is_exact_seeded_and_independent_of_order(tmp_path):
    a, b = write(tmp_path / "a.jsonl", pairs(100, "a")), write(tmp_path / "b.jsonl", pairs(40, "b"))
    entries = [{"path": a, "ratio": 0.25}, {"path": b, "max_rows": 10}]
    dataset = load_mixture({"seed": 1, "datasets": entries})
    assert dataset["dataset"][:] == ["a"] * 25 + ["b"] * 10
    queries = dataset["query"][:]
    assert len(set(queries)) == 35
    assert load_mixture({"seed": 1, "datasets": entries[::-1]})["query"][:] == queries[25:] + queries[:25]
    assert load_mixture({"seed": 2, "datasets": entries})["query"][:] != queries
    more = load_mixture({"seed": 1, "datasets": [{"path": a, "ratio": 0.5}]})["query"][:]
    assert set(queries[:25]) < set(more)  # a larger share keeps the rows of a smaller one
    assert len(load_mixture({"datasets": [{"path": b, "max_rows": 1000}]})) == 40


def test_negatives_are_cut_first_or_drawn(tmp_path):
    rows = [{**pair, "negative": [f"{i}-{j}" for j in range(10)]} for i, pair in enumerate(pairs(50))]
    path = write(tmp_path / "rows.jsonl", rows)

    def negatives(**options):
        return load_mixture({"datasets": [{"path": path, **options}]})["negative"][:]

    assert negatives() == [row["negative"] for row in rows]
    assert negatives(num_negatives=0) == [[]] * 50
    assert negatives(num_negatives=2) == [row["negative"][:2] for row in rows]
    drawn = negatives(num_negatives=1, negatives="random")
    assert all(len(kept) == 1 and kept[0] in row["negative"] for kept, row in zip(drawn, rows, strict=True))
    assert len({kept[0].split("-")[1] for kept in drawn}) > 5
    assert drawn == negatives(num_negatives=1, negatives="random")


def test_instructions_alternate_by_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**pair, "instruction": "own"} for pair in pairs(9)])
    alternating = load_mixture({"datasets": [{"path": path, "instruction": ["A", "B"]}]})
    assert alternating["instruction"][:] == ["A", "B"] * 4 + ["A"]
    assert load_mixture(path)["instruction"][:] == ["own"] * 9


def test_symmetric_turns_half_of_the_rows_without_their_negatives(tmp_path):
    rows = [{**pair, "negative": "n"} for pair in pairs(200)]
    dataset = load_mixture({"datasets": [{"path": write(tmp_path / "r.jsonl", rows), "symmetric": True}]})
    turned = [row for row in dataset if row["query"].startswith("answer")]
    assert 70 < len(turned) < 130
    assert all(row["positive"].startswith("question") and row["negative"] == [] for row in turned)
    kept = [row for row in dataset if row["query"].startswith("question")]
    assert len(kept) + len(turned) == 200 and all(row["negative"] == ["n"] for row in kept)


def test_empty_rows_are_refused_or_dropped(tmp_path):
    rows = [*pairs(3), {"query": " ", "positive": "p"}, {"query": "q", "positive": None}]
    entry = {"path": write(tmp_path / "rows.jsonl", rows)}
    with pytest.raises(InputError, match="dataset 'rows', row 3, field 'query': no text; .*drop_empty"):
        load_mixture({"datasets": [entry]})
    assert len(load_mixture({"datasets": [{**entry, "drop_empty": True}]})) == 3


# What is wrong with a mixture -> the words that must name it.
BROKEN_MIXTURES = {
    "not a mapping": ("- a\n- b", "expected `name: value` lines, found list"),
    "not yaml": ("datasets: [", "not valid YAML"),
    "no datasets": ("datasets: []", "expected 'datasets:'"),
    "unknown top-level key": ("datasets: [{path: F}]\nseeds: 1", "unknown key 'seeds'"),
    "bad seed": ("datasets: [{path: F}]\nseed: -1", "'seed' must be a whole number"),
    "entry is text": ("datasets: [F]", "dataset 1: expected keys"),
    "no path": ("datasets: [{name: a}]", "'path' must name"),
    "unknown key": ("datasets: [{path: F, weight: 2}]", "dataset 1: unknown key 'weight'"),
    "two of one name": ("datasets: [{path: F}, {path: F}]", "two datasets are called 'rows'"),
    "ratio above 1": ("datasets: [{path: F, ratio: 1.5}]", "'ratio' must be above 0 and at most 1, found 1.5"),
    "ratio as text": ("datasets: [{path: F, ratio: half}]", "'ratio' must be"),
    "ratio and cap": ("datasets: [{path: F, ratio: 0.5, max_rows: 3}]", "not both"),
    "cap of zero": ("datasets: [{path: F, max_rows: 0}]", "'max_rows' must be a whole number >= 1"),
    "negative negatives": ("datasets: [{path: F, num_negatives: -1}]", "'num_negatives' must be"),
    "unknown choice": ("datasets: [{path: F, negatives: hardest}]", "'negatives' must be 'first' or 'random'"),
    "symmetric as text": ("datasets: [{path: F, symmetric: 'yes'}]", "'symmetric' must be true or false"),
    "empty instruction": ("datasets: [{path: F, instruction: ['']}]", "'instruction' must be text"),
    "no instruction in list": ("datasets: [{path: F, instruction: []}]", "'instruction' must be text"),
    "instruction twice": (
        "datasets: [{path: F, instruction: a, columns: {query: query, positive: positive, instruction: query}}]",
        "as a text and as a column",
    ),
    "unknown role": ("datasets: [{path: F, columns: {anchor: query}}]", "unknown role 'anchor'"),
    "columns without positive": ("datasets: [{path: F, columns: {query: query}}]", "at least 'query' and 'positive'"),
    "column is a number": ("datasets: [{path: F, columns: {query: 3, positive: positive}}]", "column of 'query' must"),
    "missing column": (
        "datasets: [{path: F, columns: {query: anchor, positive: positive}}]",
        r"dataset 'rows': no column 'anchor' for 'query'; it has query, positive",
    ),
    "missing file": ("datasets: [{path: nowhere.jsonl}]", "no such file: .*nowhere.jsonl"),
    "missing folder": ("datasets: [{path: ./no/such/folder}]", "neither a data file, a folder nor a Hub id"),
    "config of a file": ("datasets: [{path: F, config: sts}]", "is a file and has no config 'sts'"),
}


@pytest.mark.parametrize("kind", BROKEN_MIXTURES)
def test_broken_mixture_is_named(kind, tmp_path):
    text, message = BROKEN_MIXTURES[kind]
    path = tmp_path / "mixture.yaml"
    path.write_text(text.replace("F", write(tmp_path / "rows.jsonl", pairs(4))))
    with pytest.raises(InputError, match=message) as error:
        load_mixture(path)
    assert "\n" not in str(error.value)


# Rows that training refuses, or that a user should know of -> what the validator says.
BROKEN_ROWS = {
    "empty query": ({"query": "", "positive": "p"}, "error: field 'query': no text: 1 rows (4)"),
    "blank query": ({"query": " \n", "positive": "p"}, "error: field 'query': no text: 1 rows (4)"),
    "null query": ({"query": None, "positive": "p"}, "error: field 'query': no text: 1 rows (4)"),
    "query left out": ({"positive": "p"}, "error: field 'query': no text: 1 rows (4)"),
    "empty positive": ({"query": "q", "positive": ""}, "error: field 'positive': no text: 1 rows (4)"),
    "positive is its negative": (
        {"query": "q", "positive": "p", "negative": ["x", "p"]},
        "error: field 'negative': equals a positive of the row: 1 rows (4)",
    ),
    "query is its positive": (
        {"query": "q", "positive": "q"},
        "warning: field 'positive': equals the query: 1 rows (4)",
    ),
    "query is its negative": (
        {"query": "q", "positive": "p", "negative": ["q"]},
        "warning: field 'negative': equals the query: 1 rows (4)",
    ),
    "negative twice": (
        {"query": "q", "positive": "p", "negative": ["x", "x"]},
        "warning: field 'negative': the same text twice: 1 rows (4)",
    ),
    "duplicate": (
        {"query": "question 1", "positive": "answer 1"},
        "warning: field 'query': query and positive as in another row of 'rows': 1 rows (4)",
    ),
    "wrong encoding": (
        {"query": "caf\ufffd", "positive": "p"},
        "warning: field 'query': broken characters (U+FFFD or NUL: read with the wrong encoding?): 1 rows (4)",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_ROWS)
def test_broken_row_is_reported(kind, tmp_path, capsys):
    row, message = BROKEN_ROWS[kind]
    rows = [{**pair, "negative": ["n"]} for pair in pairs(4)] + [row]
    path = write(tmp_path / "rows.jsonl", rows)
    (report,) = validate_mixture(path)
    assert message in str(report)
    is_error = message.startswith("error")
    assert (report.errors, report.warnings) == ((1, 0) if is_error else (0, 1))
    if is_error:
        assert main(["validate", path]) == 2
    else:
        assert main(["validate", path]) == 0
    output = capsys.readouterr()
    assert message in output.out
    assert ("hf-e5 validate: 1 errors in rows" in output.err) == is_error


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"query": 3, "positive": "p"}], "row 0, field 'query': expected text, found int '3'"),
        ([{"query": ["q"], "positive": "p"}], "field 'query': expected text, found list"),
        ([{"query": "q", "positive": "p", "negatives": ["n"]}], "unknown column 'negatives'"),
        ([{"question": "q", "positive": "p"}], "unknown column 'question'"),
        ([{"query": "q"}], "no column 'positive'"),
        ([], "rows.jsonl is empty"),
    ],
)
def test_wrong_types_and_columns(rows, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_mixture(write(tmp_path / "rows.jsonl", rows))


def test_line_that_is_not_json(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "positive": "p"}\n{"query": "q", "positive":\n')
    with pytest.raises(InputError, match=r"rows.jsonl.*line 2"):
        load_mixture(path)


def test_validator_goes_on_after_a_dataset_that_cannot_be_read(tmp_path):
    good = write(tmp_path / "good.jsonl", pairs(5))
    bad, missing, again = validate_mixture(
        {
            "datasets": [
                {"path": write(tmp_path / "bad.jsonl", [{"text": "t"}])},
                {"path": "gone.parquet"},
                {"path": good},
            ]
        }
    )
    assert bad.errors == missing.errors == 1 and "unknown column 'text'" in str(bad) and "no such file" in str(missing)
    assert again.errors == 0 and "no negatives; see `hf-e5 mine`: all rows" in str(again)


def test_validator_finds_duplicates_across_datasets_and_measures(tmp_path):
    rows = [{"query": "q" * (i + 1), "positive": "p" * 10} for i in range(100)]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:2])

    class Tokenizer:  # counts words; the real one is only asked for `input_ids`
        def __call__(self, texts):
            return {"input_ids": [text.split() for text in texts]}

    first, second = validate_mixture({"datasets": [{"path": a}, {"path": b}]}, tokenizer=Tokenizer())
    assert "another row of 'a': 2 rows (0, 1)" in str(second)
    assert "characters of query (100 texts): 50 % 51, 90 % 91, 99 % 100, max 100" in str(first)
    assert "tokens of positive (100 texts): 50 % 1, 90 % 1, 99 % 1, max 1" in str(first)


def test_validator_reports_row_numbers_of_the_file_when_sampling(tmp_path):
    rows = [*pairs(60), {"query": "", "positive": "p"}]
    path = write(tmp_path / "rows.jsonl", rows)
    for seed in range(50):
        (report,) = validate_mixture({"seed": seed, "datasets": [{"path": path, "ratio": 0.5}]})
        if report.errors:
            assert "no text: 1 rows (60)" in str(report)
            return
    raise AssertionError("no sample held the bad row")


@pytest.mark.parametrize("name", ["synthetic", "synthetic_msmarco", "full"])
def test_shipped_mixtures_parse(name):
    sources, _ = read_mixture(ROOT / f"recipes/configs/mixtures/{name}.yaml")
    assert all(source.instruction or source.name == "synthetic" for source in sources)
    assert all(source.num_negatives == 1 for source in sources)
