"""The dataset card: its YAML describes the files, its text the records and the run that wrote them."""

import json
import re
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from hf_e5.data.build import build_dataset
from hf_e5.data.card import size_category
from hf_e5.errors import InputError
from hf_e5.filters.run import filter_records
from hf_e5.instructions import TASK_TYPES


SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "triplets.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a synthesis run: real records, filtered for real, and the log of answers that they came from."""
    folder = tmp_path_factory.mktemp("run")
    with open(SAMPLE, encoding="utf-8") as sample:
        lines = list(islice(sample, 400))
    (folder / "records.jsonl").write_text("".join([*lines, lines[0].replace("0-000", "copy")]), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"configuration": "abc123", "seed": 42, "shard": [0, 1]}))
    answer = {"prompt_tokens": 1000, "completion_tokens": 250, "cost": 0.25}
    answers = [{"model": "big", **answer}] * 6 + [{"model": "own", **answer, "cost": None}]
    (folder / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (folder / "test_set.txt").write_text("a text to be tested on\n")
    filter_records(folder, num_proc=1)
    return folder


@pytest.fixture(scope="module")
def built(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "triplets"
    build_dataset([run], out, license="cc-by-4.0", test_size=0.1)
    return out


@pytest.fixture(scope="module")
def card(built):
    return DatasetCard.load(built / "README.md")


def table(card: DatasetCard, title: str) -> list[list[str]]:
    """The cells of the first table after a title, without its head."""
    text = card.text.split(title)[1]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE).group(0).splitlines()[2:]
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


def test_yaml_lists_the_files_with_their_numbers(built, card):
    data = card.data.to_dict()
    assert [config["config_name"] for config in data["configs"]] == ["all", *TASK_TYPES]
    assert [config["config_name"] for config in data["configs"] if config.get("default")] == ["all"]
    infos = {info["config_name"]: info for info in data["dataset_info"]}
    for config in data["configs"]:
        splits = {split["name"]: split["num_examples"] for split in infos[config["config_name"]]["splits"]}
        files = {entry["split"]: list(built.glob(entry["path"])) for entry in config["data_files"]}
        assert splits == {split: sum(pq.read_metadata(path).num_rows for path in files[split]) for split in files}
        size = sum(path.stat().st_size for paths in files.values() for path in paths)
        assert infos[config["config_name"]]["download_size"] == size


def test_yaml_says_what_the_search_needs(run, card):
    data = card.data.to_dict()
    records = [json.loads(line) for line in (run / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    languages = {record[field] for record in records for field in ("language", "document_language")}
    assert data["language"] == sorted(languages) and "no" in languages and "false" not in languages
    assert data["license"] == "cc-by-4.0"
    assert data["size_categories"] == ["n<1K"]
    assert "sentence-similarity" in data["task_categories"] and "synthetic" in data["tags"]
    assert data["multilinguality"] == ["multilingual"]


def test_text_tells_counts_filters_and_cost(run, card):
    summary = json.loads((run / "filters.json").read_text())
    assert summary["dropped"]["exact_duplicate"] == 1
    rows = table(card, "### Filters")
    assert {name: int(count) for name, count, _ in rows} == summary["dropped"]
    assert "401 records were checked" in card.text

    records = [json.loads(line) for line in (run / "kept.jsonl").read_text(encoding="utf-8").splitlines()]
    configs = {name: cells for name, *cells in table(card, "## Configs")}
    for name in ("all", *TASK_TYPES):
        of_type = [record for record in records if name in ("all", record["task_type"])]
        train, test, negatives, query, positive, negative = configs[name]
        assert int(train) + int(test) == len(of_type)
        with_negative = [record for record in of_type if record.get("negative") is not None]
        assert negatives == f"{len(with_negative) / len(of_type):.0%}"
        assert int(query) == round(sum(len(record["query"]) for record in of_type) / len(of_type))
        assert int(positive) == round(sum(len(record["positive"]) for record in of_type) / len(of_type))
        mean = sum(len(record["negative"]) for record in with_negative) / len(with_negative) if with_negative else None
        assert negative == ("" if mean is None else f"{mean:.0f}")

    assert table(card, "## How it was made") == [["claude", str(len(records)), "100.0%"]]
    assert table(card, "### Cost") == [
        ["big", "6", "6,000", "1,500", "1.50"],
        ["own", "1", "1,000", "250", "not priced"],
    ]
    assert "configuration `abc123`, seed `42`\n" in card.text
    instructions = {" ".join(record["instruction"].casefold().split()) for record in records}
    assert f"{len(instructions)} distinct instructions" in card.text.replace("\n", " ")


def test_figure_is_shown(built, card):
    assert "![Shares of task types and languages](figures/shares.png)" in card.text
    assert (built / "figures" / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (built / "figures").iterdir()] == ["shares.png"]


def test_card_holds_nothing_of_the_machine(run, card):
    assert str(run) not in card.content and str(Path.home()) not in card.content


def test_records_without_a_run(tmp_path):
    build_dataset([SAMPLE], tmp_path / "out")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert "None are recorded" in card.text and "Not recorded." in card.text
    assert card.data.license == "unknown" and "None was chosen" in card.text
    assert "Overlap with evaluation sets has not been checked." in card.text
    assert card.data.size_categories == ["1K<n<10K"]


def test_unfiltered_records_of_a_run_claim_no_filters(run, tmp_path):
    build_dataset([run / "records.jsonl"], tmp_path / "out")
    text = DatasetCard.load(tmp_path / "out" / "README.md").text
    assert "None are recorded" in text and "| big | 6 |" in text


def test_broken_log_is_named(run, tmp_path):
    (tmp_path / "records.jsonl").write_bytes((run / "records.jsonl").read_bytes())
    (tmp_path / "answers.jsonl").write_text('{"model": "big"\n{"model": "big"}\n')
    with pytest.raises(InputError, match=r"answers\.jsonl:1: not valid JSON"):
        build_dataset([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("count", "name"),
    [(1, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (500_000, "100K<n<1M"), (10**9, "n>1B")],
)
def test_size_category(count, name):
    assert size_category(count) == name
