"""`SyntheticTriplets` and `hf-e5 build`: what goes in comes out, in every way of loading it."""

import json
import random
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pandas
import pyarrow.parquet as pq
import pytest
from datasets import concatenate_datasets, get_dataset_config_names, load_dataset

import hf_e5.records
from hf_e5 import SyntheticTriplets
from hf_e5.cli import main
from hf_e5.data.build import build_dataset
from hf_e5.errors import InputError
from hf_e5.instructions import TASK_TYPES
from hf_e5.records import fold, split_of


SAMPLE = Path(__file__).parents[1] / "examples" / "data" / "triplets.jsonl"
TEST_SIZE = 0.1


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: list) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(*command: str) -> int | None:
    """Run a command of hf-e5 and return its exit code."""
    try:
        return main(list(command))
    except SystemExit as leave:
        return leave.code


def as_records(rows) -> dict[str, dict]:
    """Rows of the dataset as records, by id."""
    return {row["id"]: {**row, "placeholders": json.loads(row["placeholders"])} for row in rows}


@pytest.fixture(scope="module", autouse=True)
def no_matplotlib():
    """Build as where the extra is not installed; test_card.py has the figure, which takes a second to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_e5.data.card.find_spec", lambda name: None)
        yield


@pytest.fixture(scope="module")
def records():
    return read(SAMPLE)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "triplets"
    build_dataset([SAMPLE], out, test_size=TEST_SIZE)
    return out


@pytest.fixture
def loaded(built, tmp_path):
    return lambda *args, **kwargs: load_dataset(str(built), *args, cache_dir=str(tmp_path), **kwargs)


def test_every_record_comes_out_once_and_unchanged(records, loaded):
    splits = loaded()
    rows = [*splits["train"], *splits["test"]]
    assert len(rows) == len(records)
    expected = {record["id"]: {"negative": None, **record} for record in records}
    assert as_records(rows) == expected


def test_card_without_matplotlib_has_no_figure(built):
    assert not (built / "figures").exists() and "figures/" not in (built / "README.md").read_text(encoding="utf-8")


def test_no_instruction_is_in_both_splits(loaded):
    splits = loaded()
    seen = {}
    for split in ("train", "test"):
        asymmetric = [row for row in splits[split] if row["task_type"] not in ("sts", "bitext")]
        symmetric = [row for row in splits[split] if row["task_type"] in ("sts", "bitext")]
        seen[split] = {fold(row["instruction"]) for row in asymmetric} | {fold(row["query"]) for row in symmetric}
        assert {row["task_type"] for row in symmetric} == {"sts", "bitext"}
    assert not seen["train"] & seen["test"]
    share = len(seen["test"]) / len(seen["train"] | seen["test"])
    assert share == pytest.approx(TEST_SIZE, abs=0.02)  # 3,800 keys: 4 standard deviations


def test_the_split_of_a_record_depends_on_nothing_around_it(records, tmp_path):
    shuffled = random.Random(0).sample(records, 500)
    infos = build_dataset([write(tmp_path / "r.jsonl", shuffled)], tmp_path / "out", test_size=TEST_SIZE)
    for name, info in infos.items():
        for split in info.splits:
            for path in (tmp_path / "out" / "data" / name).glob(f"{split}-*"):
                for row in pq.read_table(path).to_pylist():
                    assert split_of(row, TEST_SIZE) == split
    assert split_of({"task_type": "sts", "query": "Some  Text"}, 0.5) == split_of(
        {"task_type": "sts", "query": "some text "}, 0.5
    )


def test_the_same_records_give_the_same_bytes(built, tmp_path):
    build_dataset([SAMPLE], tmp_path / built.name, test_size=TEST_SIZE)

    def hashes(folder):
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): sha256(path.read_bytes()).hexdigest() for path in files}

    assert hashes(tmp_path / built.name) == hashes(built)


def test_configs(records, built, loaded):
    assert get_dataset_config_names(str(built)) == ["all", *TASK_TYPES]
    counts = Counter(record["task_type"] for record in records)
    for name in TASK_TYPES:
        splits = loaded(name)
        assert sum(splits.num_rows.values()) == counts[name]
        assert set(splits["train"]["task_type"]) == {name}


def test_a_config_without_negatives_has_the_schema_of_the_others(loaded):
    without, both = loaded("short_short", split="train"), loaded(split="train")
    assert without.features == both.features == loaded("sts", split="train").features
    assert set(without["negative"]) == {None}
    assert without.features["negative"].dtype == "string"
    assert len(concatenate_datasets([without, loaded("sts", split="train")])) > len(without)


def test_streaming_gives_the_rows_of_the_download(loaded):
    assert list(loaded("long_long", split="train", streaming=True)) == list(loaded("long_long", split="train"))
    streamed = loaded(split="test", streaming=True)
    assert list(streamed) == list(loaded(split="test"))
    assert streamed.features == loaded(split="test").features


def test_pandas_reads_it(built, loaded):
    expected = as_records(loaded(split="test"))
    frames = [pandas.read_parquet(path) for path in built.glob("data/*/test-*.parquet")]
    frame = pandas.concat(frames).astype(object)
    assert as_records(frame.where(frame.notna(), None).to_dict("records")) == expected


def test_shards(tmp_path, records):
    out = tmp_path / "out"
    build_dataset([SAMPLE], out, test_size=0, max_shard_size="1MB")
    names = sorted(path.name for path in (out / "data" / "short_long").iterdir())
    assert len(names) > 1
    assert names == [f"train-{number:05d}-of-{len(names):05d}.parquet" for number in range(len(names))]
    data = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert list(data) == ["train"] and len(data["train"]) == len(records)


def test_builder_class(records, tmp_path):
    builder = SyntheticTriplets(config_name="sts", data_files=str(SAMPLE), cache_dir=str(tmp_path))
    builder.download_and_prepare()
    rows = [row for split in builder.as_dataset().values() for row in split]
    assert as_records(rows) == {record["id"]: record for record in records if record["task_type"] == "sts"}
    streamed = builder.as_streaming_dataset(split="train")
    assert list(streamed) == list(builder.as_dataset(split="train"))
    everything = SyntheticTriplets(data_files=str(SAMPLE), cache_dir=str(tmp_path), test_size=0.5)
    everything.download_and_prepare()
    assert everything.config.name == "all"
    assert sum(everything.as_dataset().num_rows.values()) == len(records)
    assert everything.as_dataset().num_rows["test"] > len(records) / 3


def test_given_splits_are_kept(records, tmp_path):
    """What `split_of` says does not matter, and an empty split is left out."""
    files = {
        "train": str(
            write(tmp_path / "a.jsonl", [*records[:60], *(r for r in records[60:] if r["task_type"] == "sts")])
        ),
        "test": str(write(tmp_path / "b.jsonl", [r for r in records[60:] if r["task_type"] != "sts"])),
    }
    builder = SyntheticTriplets(data_files=files, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    for split, rows in builder.as_dataset().items():
        assert rows["id"][:] == [record["id"] for record in read(Path(files[split]))]
    only = SyntheticTriplets(config_name="sts", data_files=files, cache_dir=str(tmp_path / "cache"))
    only.download_and_prepare()
    assert list(only.as_dataset()) == ["train"]
    # A cache of the same files without their splits is another one.
    pooled = SyntheticTriplets(data_files=[files["train"]], cache_dir=str(tmp_path / "cache"), test_size=0.5)
    pooled.download_and_prepare()
    alone = SyntheticTriplets(data_files={"train": files["train"]}, cache_dir=str(tmp_path / "cache"))
    alone.download_and_prepare()
    assert list(pooled.as_dataset()) == ["train", "test"] and list(alone.as_dataset()) == ["train"]
    with pytest.raises(InputError, match="leave test_size out"):
        SyntheticTriplets(data_files=files, test_size=0.1)


def test_build_parses_a_record_once_to_part_it_and_once_to_write_it(records, tmp_path, monkeypatch):
    parsed = Counter()
    parse = hf_e5.records.parse_line

    def count(line):
        record, problem = parse(line)
        parsed[record["id"]] += 1
        return record, problem

    monkeypatch.setattr("hf_e5.records.parse_line", count)
    build_dataset([write(tmp_path / "r.jsonl", records[:300])], tmp_path / "out", test_size=0.5)
    parts = len(list((tmp_path / "out").rglob("*.parquet")))
    # One more of the first record of each part, as a part must not be empty.
    assert parsed.total() == 2 * 300 + parts and parts >= 8 and max(parsed.values()) == 3


def test_builder_class_says_what_is_wrong(records, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [records[0], {**records[1], "query": None}])
    with pytest.raises(InputError, match=r"bad\.jsonl:2: query: missing or null"):
        SyntheticTriplets(data_files=str(bad), cache_dir=str(tmp_path / "cache")).download_and_prepare()
    with pytest.raises(InputError, match="no record of task type 'stss'"):
        SyntheticTriplets(config_name="stss", data_files=str(SAMPLE), cache_dir=str(tmp_path)).download_and_prepare()
    with pytest.raises(InputError, match="data_files"):
        SyntheticTriplets(cache_dir=str(tmp_path)).download_and_prepare()
    with pytest.raises(InputError, match="test_size"):
        SyntheticTriplets(data_files=str(SAMPLE), test_size=1, cache_dir=str(tmp_path)).download_and_prepare()


def test_sources_and_task_types_of_ones_own(records, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    write(first / "records.jsonl", records[:30])
    write(first / "kept.jsonl", records[:20])
    own = [{**record, "task_type": "code_search"} for record in records[20:40]]
    write(second / "records.jsonl", own)
    third = write(tmp_path / "third.jsonl", records[40:50])
    infos = build_dataset([first, second, third], tmp_path / "out", test_size=0)
    assert sum(info.splits["train"].num_examples for info in infos.values()) == 50
    assert list(infos)[-1] == "code_search"
    data = load_dataset(str(tmp_path / "out"), "code_search", split="train", cache_dir=str(tmp_path / "cache"))
    assert data["id"][:] == [record["id"] for record in own]


def test_unusual_text_comes_out_unchanged(records, tmp_path):
    texts = [
        "\u2028line\u2028separators\x85",
        "nul \x00 byte",
        "\U0001f600 \u202eright to left",
        "  spaces  ",
        "a\r\nb",
    ]
    odd = [{**records[0], "id": str(n), "query": text, "positive": text} for n, text in enumerate(texts)]
    build_dataset([write(tmp_path / "r.jsonl", odd)], tmp_path / "out", test_size=0)
    data = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert data["query"][:] == data["positive"][:] == texts


def test_paths_are_no_patterns(records, tmp_path):
    folder = tmp_path / "a [b] *c"
    folder.mkdir()
    build_dataset([write(folder / "r?.jsonl", records[:10])], folder / "out [1]", test_size=0)
    paths = list((folder / "out [1]").rglob("*.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in paths) == 10


def broken(**changes):
    return lambda record: {**record, **changes}


def without(field):
    return lambda record: {name: value for name, value in record.items() if name != field}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((without(name), f"{name}: missing or null") for name in ("id", "task_type", "query", "positive", "model")),
        *((without(name), f"{name}: missing or null") for name in ("language", "document_language", "placeholders")),
        (broken(instruction=None), "instruction: missing or null"),
        (broken(query=""), "query: empty"),
        (broken(positive="  "), "positive: empty"),
        (broken(negative=""), "negative: empty"),
        (broken(query=["a"]), "query: expected a string, got list"),
        (broken(id=7), "id: expected a string, got int"),
        (broken(language="German"), "language: expected an ISO 639 code such as 'en', got 'German'"),
        (broken(task_type="Short-Long"), "task_type: expected lower-case letters"),
        (broken(task_type="all"), "task_type: expected lower-case letters"),
        (broken(placeholders="domain"), "placeholders: expected an object"),
        (broken(placeholders={"domain": ["x"]}), "placeholders: expected an object"),
        (lambda record: [record], "expected a JSON object, got list"),
    ],
)
def test_wrong_record(records, tmp_path, capsys, change, message):
    path = write(tmp_path / "r.jsonl", [*records[:2], change(records[2]), records[3]])
    assert run("build", str(path), str(tmp_path / "out")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-e5 build:") and f"{path}:3: {message}" in error
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no records"),
        (b"\n \n", "no records"),
        (b'{"id": "1"', "r.jsonl:1: not valid JSON"),
        (b"\xff\xfe", "r.jsonl:1: not valid JSON"),
    ],
)
def test_wrong_file(tmp_path, content, message):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        build_dataset([tmp_path / "r.jsonl"], tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


def test_other_wrong_input(records, tmp_path):
    path = write(tmp_path / "r.jsonl", [*records[:3], {**records[4], "id": records[1]["id"]}])
    with pytest.raises(InputError, match=r"r\.jsonl:4: id: the same as that of .*r\.jsonl:2"):
        build_dataset([path], tmp_path / "out")
    with pytest.raises(InputError, match=r"triplets\.jsonl:1: id: the same as that of .*triplets\.jsonl:1"):
        build_dataset([SAMPLE, SAMPLE], tmp_path / "out")
    half = json.dumps({**records[0], "positive": "x"}).replace('"x"', '"\\ud83d"')
    path.write_text(half + "\n")
    with pytest.raises(InputError, match=r"r\.jsonl:1: positive: holds half of a surrogate pair"):
        build_dataset([path], tmp_path / "out")
    with pytest.raises(InputError, match=r"missing: no such file or folder"):
        build_dataset([tmp_path / "missing"], tmp_path / "out")
    with pytest.raises(InputError, match=r"no records\.jsonl in this folder"):
        build_dataset([tmp_path], tmp_path / "out")
    path.unlink()
    assert not list(tmp_path.iterdir())

    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    with pytest.raises(InputError, match="out: exists"):
        build_dataset([SAMPLE], out)
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and (out / "precious").read_text() == "data"


def test_command_line(tmp_path, capsys):
    assert run("build", str(SAMPLE), str(tmp_path / "out"), "--test_size", "0.1", "--license", "apache-2.0") == 0
    printed = capsys.readouterr().out
    assert f"hf-e5 push {tmp_path / 'out'} USER/NAME" in printed
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()
    assert run("build", str(SAMPLE), str(tmp_path / "other"), "--test_size", "2") == 2
    assert run("build", str(SAMPLE), str(tmp_path / "other"), "--max_shard_size", "huge") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_records(records, tmp_path):
    """Five times the records, the same peak: a build process reports its own peak memory."""
    # Not getrusage: its maximum is that of the parent too, from before the process became another program.
    code = (
        "import sys; from hf_e5.data.build import build_dataset; build_dataset(sys.argv[1:2], sys.argv[2]);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for copies in (4, 20):
        copied = ({**record, "id": f"{copy}-{record['id']}"} for copy in range(copies) for record in records)
        path, out = write(tmp_path / f"{copies}.jsonl", copied), tmp_path / f"out-{copies}"
        command = [sys.executable, "-c", code, str(path), str(out)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 30  # MB; the larger file has 80 MB more
