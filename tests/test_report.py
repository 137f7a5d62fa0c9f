import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from hf_e5.cli import main
from hf_e5.data.build import build_dataset
from hf_e5.data.provenance import read_provenance
from hf_e5.errors import InputError
from hf_e5.filters.record_filters import FILTERS
from hf_e5.filters.run import filter_records
from hf_e5.languages import load_languages
from hf_e5.report.figures import plot_shares
from hf_e5.report.statistics import Sample, distinct_ngrams, read_usage
from hf_e5.report.write import write_report


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Page(HTMLParser):
    """The page as a browser parses it: elements, table cells and the text of the data element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.cells: list[str] = []
        self.data = ""
        self.links: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements[tag] += 1
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        self._inside = "data" if attributes.get("id") == "data" else tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "td":
            self.cells.append(data)
        elif self._inside == "data":
            self.data += data

    def rows(self) -> list[dict]:
        data = json.loads(self.data)
        return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def test_report_of_filtered_records(tmp_path, sample_rows):
    rows = [
        *sample_rows,
        {**sample_rows[0], "id": "again"},
        {**sample_rows[1], "id": "same", "negative": sample_rows[1]["positive"]},
    ]
    write(tmp_path / "records.jsonl", rows)
    answers = [
        {"id": "a", "model": "big", "prompt_tokens": 100, "completion_tokens": 300, "cost": 0.5, "error": None},
        {"id": "b", "model": "big", "prompt_tokens": 100, "completion_tokens": 0, "cost": 0.1, "error": "json: x"},
        {"id": "c", "model": "small", "prompt_tokens": 50, "completion_tokens": 150, "cost": 0.2, "error": None},
        {
            "id": "d",
            "model": "small",
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "cost": None,
            "error": "http 503: x",
        },
    ]
    write(tmp_path / "answers.jsonl", answers)
    filter_records(tmp_path, num_proc=1)
    report = write_report(tmp_path)
    assert report == json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))

    assert report["records"] == len(sample_rows)
    assert report["task_types"] == dict(Counter(row["task_type"] for row in sample_rows).most_common())
    assert report["languages"] == dict(Counter(row["language"] for row in sample_rows).most_common())
    assert report["distinct_instructions"] == len({row["instruction"] for row in sample_rows})
    lengths = sorted(len(row["query"]) for row in sample_rows if row["task_type"] == "sts")
    assert report["characters"]["sts"]["query"]["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.05)
    assert lengths[0] <= report["characters"]["sts"]["query"]["p5"] <= report["characters"]["sts"]["query"]["median"]
    assert "negative" not in report["characters"]["long_long"]
    assert report["filters"]["dropped"]["exact_duplicate"] == 1
    assert report["dropped_by_task_type"] == {
        sample_rows[0]["task_type"]: {"exact_duplicate": 1},
        sample_rows[1]["task_type"]: {"positive_equals_negative": 1},
    }
    assert report["near_duplicate_rate"] == 1 / len(rows)
    assert report["usage"]["models"]["big"] == {
        "answers": 2, "prompt_tokens": 200, "completion_tokens": 300, "cost": pytest.approx(0.6),
    }  # fmt: skip
    assert report["usage"]["usd_per_1k_records"] == pytest.approx(1000 * 0.8 / len(sample_rows))
    assert report["usage"]["tokens_per_record"] == pytest.approx(700 / len(sample_rows))
    assert report["usage"]["errors"] == {"json": 1, "http 503": 1}

    page = Page(tmp_path / "report" / "index.html")
    assert {row["id"]: row["dropped_by"] for row in page.rows() if row["dropped_by"]} == {
        "again": "exact_duplicate",
        "same": "positive_equals_negative",
    }
    assert len(page.rows()) == len(rows)
    assert "exact_duplicate" in page.cells and "USD 0.60" in page.cells
    # self-contained: nothing but jumps within the page and within its figure
    assert all(link.startswith("#") for link in page.links)


BLUE, GREY, ORANGE = (0x00, 0x72, 0xB2), (0xB8, 0xBE, 0xC6), (0xD5, 0x5E, 0x00)


def pixels(path: Path, side: int, color: tuple[int, int, int]) -> np.ndarray:
    """Where one half of the figure, 0 (task types) or 1 (languages), has exactly this colour."""
    with Image.open(path) as image:
        return (np.array_split(np.asarray(image.convert("RGB")), 2, axis=1)[side] == color).all(axis=-1)


def test_bars_are_as_long_as_their_shares_whatever_their_names(tmp_path):
    path, _ = plot_shares({"$a_{$": 3, "own $type$": 1}, {"en": 4}, tmp_path / "figure")
    widths = set(pixels(path, 0, BLUE).sum(axis=1).tolist()) - {0}
    assert abs(max(widths) - 3 * min(widths)) <= 4  # edges that fall within a pixel
    assert not any(pixels(path, side, color).any() for side in (0, 1) for color in (GREY, ORANGE))


def test_marks_are_at_the_shares_of_the_paper(tmp_path):
    path, _ = plot_shares({"short_long": 5, "sts": 5}, {"en": 1}, tmp_path / "figure")
    columns = np.flatnonzero(pixels(path, 0, BLUE).any(axis=0))
    mark = next(np.flatnonzero(row) for row in pixels(path, 0, ORANGE) if row.any())
    share = 0.5 * (mark.mean() - columns[0]) / (columns[-1] - columns[0])
    assert share == pytest.approx(167 / 507, abs=0.005)


def test_languages_beyond_the_first_14_are_one_bar(tmp_path):
    languages = dict.fromkeys(list(load_languages())[:14], 9) | {"xx": 4, "yy": 5}
    path, _ = plot_shares({"own": 1}, languages, tmp_path / "figure")
    bars = {color: pixels(path, 1, color).sum(axis=1) for color in (BLUE, GREY)}
    assert abs(int(bars[BLUE].max()) - int(bars[GREY].max())) <= 2
    starts = {color: int((np.diff(rows > 0) & (rows[1:] > 0)).sum()) for color, rows in bars.items()}
    assert starts == {BLUE: 14, GREY: 1}


def test_figure_2(tmp_path, sample_rows):
    write(tmp_path / "records.jsonl", sample_rows)
    write_report(tmp_path)
    with Image.open(tmp_path / "report" / "figure2.png") as image:
        assert image.format == "PNG" and image.width > 1500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert ElementTree.parse(tmp_path / "report" / "figure2.svg").getroot().tag.endswith("svg")
    first = (tmp_path / "report" / "figure2.svg").read_bytes()
    write_report(tmp_path)
    assert (tmp_path / "report" / "figure2.svg").read_bytes() == first


def test_text_of_a_model_cannot_leave_its_place(tmp_path, sample_rows):
    evil = "</script><script>alert(1)</script><!--<script> <img src=x onerror=alert(2)> & \u2028 {{ 7 * 7 }} ]]>"
    fields = {"query": evil, "positive": evil, "negative": evil + "x", "instruction": evil, "model": evil}
    row = {**sample_rows[0], **fields, "id": evil, "placeholders": {evil: evil}}
    dropped = {**row, "id": f"{evil}2", "task_type": evil, "language": evil}
    write(tmp_path / "records.jsonl", [row, dropped, *sample_rows[:3]])
    with open(tmp_path / "records.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "half a pair", "task_type": "\\ud83d", "query": "\\ud83d"}\n')
    filter_records(tmp_path, skip=FILTERS.keys() - {"schema"}, num_proc=1)
    write_report(tmp_path)
    page = Page(tmp_path / "report" / "index.html")
    assert page.elements["script"] == 2 and page.elements["img"] == 0
    shown = {row["id"]: row for row in page.rows()}
    for written in (row, dropped):
        assert {name: shown[written["id"]][name] for name in written} == written
    source = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<img" not in source and "49" not in re.sub(r"\d{3,}", "", page.rows()[0]["query"])
    assert "sha256-" in source.split("</head>")[0]


def test_a_dropped_record_of_the_wrong_types_is_shown_as_text(tmp_path, sample_rows):
    odd = {
        "id": "odd",
        "task_type": ["a"],
        "query": 5,
        "positive": [{"b": None}],
        "negative": False,
        "language": {"c": 1},
    }
    write(tmp_path / "records.jsonl", [*sample_rows[:3], odd])
    filter_records(tmp_path, num_proc=1)
    assert write_report(tmp_path)["dropped_by_task_type"] == {"['a']": {"schema": 1}}
    shown = Page(tmp_path / "report" / "index.html").rows()[-1]
    texts = {"id": "odd", "task_type": '["a"]', "query": "5", "positive": '[{"b": null}]', "language": '{"c": 1}'}
    assert {name: shown[name] for name in texts} == texts


def test_a_large_run_is_shown_as_a_sample(tmp_path, sample_rows):
    rows = [{**row, "id": f"{n}-{row['id']}"} for n in range(3) for row in sample_rows]
    write(tmp_path / "records.jsonl", rows)
    filter_records(tmp_path, num_proc=1)
    write_report(tmp_path, max_rows=100)
    source = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    shown = Counter(bool(row["dropped_by"]) for row in Page(tmp_path / "report" / "index.html").rows())
    assert shown == {True: 50, False: 50}
    assert f"50 of {len(sample_rows)} kept and 50 of {2 * len(sample_rows)} dropped" in source


def test_raw_records_stale_filters_and_the_command(tmp_path, capsys, sample_rows):
    write(tmp_path / "records.jsonl", sample_rows[:20])
    assert main(["report", str(tmp_path)]) == 0
    assert f"hf-e5 filter {tmp_path}" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["usage"] is None and report["near_duplicate_rate"] is None and "filters" not in report
    filter_records(tmp_path, num_proc=1)
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "other")]) == 0
    assert f"hf-e5 build {tmp_path / 'kept.jsonl'} OUT" in capsys.readouterr().out
    write(tmp_path / "records.jsonl", sample_rows[:25])
    assert main(["report", str(tmp_path)]) == 0
    assert "has changed since the filters ran" in capsys.readouterr().err


def test_wrong_input(tmp_path, sample_rows):
    with pytest.raises(InputError, match="records.jsonl: no such file"):
        write_report(tmp_path)
    (tmp_path / "records.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="no records"):
        write_report(tmp_path)
    write(tmp_path / "records.jsonl", sample_rows[:2])
    assert main(["report", str(tmp_path), "--max_rows", "0"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run_folder(tmp_path, sample_rows):
    """A run folder that also holds notes and the figures of `hf-e5 contamination`, and a folder of other work."""
    for name in ("run", "thesis"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "records.jsonl", sample_rows[:5])
        (tmp_path / name / "notes.txt").write_text("mine")
        (tmp_path / name / "report.json").write_text("{}")
    (tmp_path / "file").write_text("data")
    return tmp_path / "run"


@pytest.mark.parametrize("output", ["thesis", "run", ".", "file", "run/notes.txt/report"])
def test_the_command_deletes_nothing_that_it_did_not_write(run_folder, output, monkeypatch, capsys):
    top = run_folder.parent
    before = everything(top)
    for folder, argument in ((top, "run"), (run_folder, ".")):
        monkeypatch.chdir(folder)
        assert main(["report", argument, "--output", str(top / output)]) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1 or "records" in error.splitlines()[0]  # a progress bar
        assert str(top / output.split("/report")[0]) in error.splitlines()[-1]
        assert everything(top) == before
    monkeypatch.chdir(run_folder)
    assert main(["report", ".", "--output", "."]) == main(["report", ".", "--output", ".."]) == 2
    assert everything(top) == before


def test_a_report_replaces_a_report_unless_something_was_added_to_it(run_folder, monkeypatch, capsys, sample_rows):
    report = run_folder / "report"
    assert main(["report", str(run_folder)]) == 0
    first = everything(report)
    write(run_folder / "records.jsonl", sample_rows[:9])
    assert main(["report", str(run_folder)]) == 0
    second = everything(report)
    assert second.keys() == first.keys() and json.loads(second["report.json"])["records"] == 9
    monkeypatch.chdir(report)
    assert main(["report", str(run_folder)]) == 2  # the shell that stands there would lose its folder
    monkeypatch.undo()
    for name in ("remarks.txt", "mine/remarks.txt"):
        (report / name).parent.mkdir(exist_ok=True)
        (report / name).write_text("mine")
        before = everything(run_folder)
        capsys.readouterr()
        assert main(["report", str(run_folder)]) == 2
        assert f"also holds {name}" in capsys.readouterr().err
        assert everything(run_folder) == before
        (report / name).unlink()


def test_a_report_that_fails_half_way_leaves_the_one_before(run_folder, monkeypatch):
    write_report(run_folder)
    before = everything(run_folder)

    def fail(**_):
        raise OSError("disk full")

    monkeypatch.setattr("hf_e5.report.write.render_page", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run_folder)
    assert everything(run_folder) == before


def test_distinct_ngrams_by_hand():
    pairs = [("a b a", "学习 x"), ("A b", "学 x")]
    result = distinct_ngrams(pairs)
    assert result["query_distinct_1"] == pytest.approx(2 / 5, abs=1e-4)
    assert result["query_distinct_2"] == pytest.approx(2 / 3, abs=1e-4)
    assert result["query_distinct_3"] == 1
    assert result["positive_distinct_1"] == pytest.approx(3 / 5, abs=1e-4)  # 学 习 x 学 x
    assert distinct_ngrams([("ज़िंदगी में", "x")])["query_distinct_1"] == 1  # two words, not four pieces
    assert distinct_ngrams([])["query_distinct_1"] == 0


def test_samples_are_uniform_and_ordered():
    counts: Counter[int] = Counter()
    for seed in range(2000):
        sample = Sample(5, seed)
        for row in range(20):
            sample.add(row)
        assert sample.rows() == sorted(sample.rows()) and len(set(sample.rows())) == 5
        counts.update(sample.rows())
    # Each of 20 rows is drawn with probability 1/4: 500 of 2000 times, give or take 5 standard deviations.
    assert all(abs(count - 500) < 5 * math.sqrt(2000 * 0.25 * 0.75) for count in counts.values())


def test_usage_without_prices_and_with_a_torn_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    assert read_usage(path, 1) is None
    row = {"model": "m", "prompt_tokens": 10, "completion_tokens": 5, "cost": None, "error": None}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "cost": 1.0}) + '\n{"mod')
    usage = read_usage(path, 2)
    assert usage["usd_per_1k_records"] is None and usage["models"]["m"]["cost"] is None
    assert usage["tokens_per_record"] == 15
    path.write_text('{"mod\n' + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"answers\.jsonl:1: not valid JSON"):
        read_usage(path, 1)


def test_report_and_card_read_one_usage_from_a_run_that_was_killed(tmp_path, sample_rows):
    """An answer that took no tokens needs no price; one that did makes its model unpriced; a torn line is none."""
    write(tmp_path / "records.jsonl", sample_rows[:20])
    row = {"prompt_tokens": 10, "completion_tokens": 5, "error": None}
    failed = {"prompt_tokens": 0, "completion_tokens": 0, "cost": None, "error": "connection: reset"}
    answers = [
        {"model": "priced", **row, "cost": 1.5},
        {"model": "priced", **failed},
        {"model": "own", **row, "cost": None},
        {"model": "own", **row, "cost": 1.0},
    ]
    write(tmp_path / "answers.jsonl", answers)
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"model": "priced", "prompt_to')
    report = write_report(tmp_path)["usage"]
    usage = read_provenance([tmp_path / "records.jsonl"]).usage
    assert report["models"] == {name: vars(model) for name, model in usage.models.items()}
    assert report["errors"] == dict(usage.errors) == {"connection": 1}
    assert [(name, model.answers, model.cost) for name, model in usage.models.items()] == [
        ("priced", 2, 1.5),
        ("own", 2, None),
    ]
    build_dataset([tmp_path], tmp_path / "set")
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "| 2 | 10 | 5 | 1.50 |" in card and "| 2 | 20 | 10 | not priced |" in card
