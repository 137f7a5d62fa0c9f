import json
from dataclasses import asdict

import pyarrow
import pyarrow.parquet
import pytest

from hf_e5.cli import main
from hf_e5.errors import InputError
from hf_e5.filters.contamination import TestSets, check_contamination, normalize, read_texts


QUESTION = "Who wrote the Tractatus Logico-Philosophicus?"


def test_case_and_every_kind_of_space_are_ignored():
    assert normalize(" Ａb\u3000\u00a0C\tß\n") == normalize("ａB cSS")
    tests = TestSets([("nq", QUESTION)])
    assert tests.find("who wrote\u00a0the  tractatus LOGICO-philosophicus ?") == ["nq"]
    assert tests.find("Who wrote the Tractatus Logico Philosophicus?") == []


def test_find_agrees_with_a_dictionary(sample_rows):
    texts = [("even" if number % 2 == 0 else "odd", row["positive"]) for number, row in enumerate(sample_rows)]
    expected: dict[str, set[str]] = {}
    for name, text in texts:
        expected.setdefault(normalize(text), set()).add(name)
    tests = TestSets(texts)
    for row in sample_rows:
        for text in (row["query"], row["positive"].upper()):
            assert set(tests.find(text)) == expected.get(normalize(text), set())
    assert sum(tests.sizes().values()) == sum(map(len, expected.values()))


def test_report_counts_distinct_texts_and_parts_low_entropy(tmp_path):
    tests = TestSets([("nq", QUESTION), ("nq", "yes"), ("nq", "never asked in training"), ("fever", QUESTION)])
    training = [("a:1:query", QUESTION.upper()), ("a:2:query", QUESTION), ("a:2:positive", "Yes"), ("a:3:query", "no")]
    report = check_contamination(iter(training), tests)
    assert report.training_texts == 4
    nq, fever = report.test_sets["nq"], report.test_sets["fever"]
    assert (nq.test_texts, nq.contaminated, nq.low_entropy) == (3, 1, 1)
    assert (fever.test_texts, fever.contaminated, fever.low_entropy) == (1, 1, 0)
    assert nq.examples == [{"place": "a:1:query", "text": QUESTION.upper()}]
    assert "| nq | 3 | 1 | 33.33% | 1 |" in report.to_markdown()
    json.dumps(asdict(report))


def test_texts_are_read_from_every_format(tmp_path):
    rows = [{"id": 1, "text": "first text"}, {"id": 2, "text": "second\ntext"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"data": [["first text"], "second\ntext"]}), encoding="utf-8")
    (tmp_path / "c.csv").write_text('text,label\nfirst text,\n"second\ntext",x\n', encoding="utf-8")
    (tmp_path / "d.txt").write_text("first text\nsecond text\n", encoding="utf-8")
    table = pyarrow.table({"text": ["first text", None], "negative": [["second\ntext"], []]})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert {normalize(text) for text in read_texts(path)} >= {"firsttext", "secondtext"}, path
    tests = TestSets.from_files([tmp_path], min_characters=5)
    assert len(tests.names) == 5
    assert len(tests.find("FIRST TEXT")) == 5


@pytest.mark.parametrize("name, content", [("a.jsonl", "{"), ("b.parquet", "no"), ("c.xlsx", ""), ("d.txt", None)])
def test_unreadable_test_sets_are_named(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=name):
        TestSets.from_files([path])


def test_command_line(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(json.dumps({"query": QUESTION.lower(), "positive": "Wittgenstein"}) + "\n")
    (tmp_path / "nq.txt").write_text(f"{QUESTION}\nWittgenstein\nIs it raining in Vienna today?\n")
    arguments = [str(tmp_path / "train.jsonl"), "--test_sets", str(tmp_path / "nq.txt")]
    assert main(["contamination", *arguments, "--output", str(tmp_path / "report.json")]) == 0
    assert f"| {tmp_path / 'nq.txt'} | 3 | 1 | 33.33% | 1 |" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["training_texts"] == 2
    assert report["test_sets"][str(tmp_path / "nq.txt")]["examples"][0]["place"].endswith("train.jsonl: text 1")
    assert main(["contamination", str(tmp_path / "nowhere.txt"), "--test_sets", str(tmp_path / "nq.txt")]) == 2
    assert "nowhere.txt: no such file" in capsys.readouterr().err
