import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from hf_e5.evaluation.retrieval import comparison_table, evaluate_rows, share_found
from hf_e5.instructions import format_query


@pytest.fixture(scope="module")
def rows(sample_rows):
    return sample_rows[:150]


def encode(texts):
    """Vectors that depend on the text alone, alike in every run."""
    vectors = [torch.randn(16, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
    return torch.nn.functional.normalize(torch.stack(vectors), dim=-1)


def test_scores_equal_sentence_transformers(rows):
    results = evaluate_rows(rows, encode)
    assert set(results) == {row["task_type"] for row in rows}
    for name, result in results.items():
        group = [row for row in rows if row["task_type"] == name]
        documents = list(dict.fromkeys(t for row in group for t in (row["positive"], row.get("negative")) if t))
        queries = encode([format_query(row["query"], row["instruction"]) for row in group])
        scores = queries @ encode(documents).T
        evaluator = InformationRetrievalEvaluator(
            queries={str(i): "" for i in range(len(group))},
            corpus={str(i): "" for i in range(len(documents))},
            relevant_docs={str(i): {str(documents.index(row["positive"]))} for i, row in enumerate(group)},
            mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[1, 5], precision_recall_at_k=[10], map_at_k=[1],
        )  # fmt: skip
        hits = [[{"corpus_id": str(d), "score": float(s)} for d, s in enumerate(line)] for line in scores]
        expected = evaluator.compute_metrics(hits)
        assert (result.num_queries, result.num_documents) == (len(group), len(documents))
        assert result.ndcg_at_10 == pytest.approx(expected["ndcg@k"][10])
        assert result.accuracy == pytest.approx(expected["accuracy@k"][1])
        assert share_found([result], [1, 5]) == pytest.approx([expected["accuracy@k"][1], expected["accuracy@k"][5]])


def test_the_table_holds_both_models_and_their_means(rows):
    before, after = (
        evaluate_rows(rows, encode),
        evaluate_rows(rows, lambda texts: encode(texts[::-1]).flip(0).roll(1, 1)),
    )
    head, *lines, mean = comparison_table(before, after).splitlines()
    assert [line.split()[0] for line in lines] == list(before)
    numbers = [[float(word) for word in line.split()[3:] if word != "->"] for line in lines]
    expected = [f"{sum(column) / len(lines):.3f}" for column in zip(*numbers, strict=True)]
    shown = [word for word in mean.split()[1:] if word != "->"]
    assert [float(value) for value in shown] == pytest.approx([float(value) for value in expected], abs=1e-3)
