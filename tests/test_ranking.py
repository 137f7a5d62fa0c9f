import numpy as np
import pytest
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.metrics import ndcg_score

from hf_e5.metrics.ranking import MRR, NDCG, Accuracy


RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(40, 200))
RELEVANT = [sorted(RNG.choice(200, size=RNG.integers(1, 15), replace=False).tolist()) for _ in SCORES]
RANKED = [np.argsort(-row).tolist() for row in SCORES]


def test_ndcg_equals_scikit_learn():
    truth = np.zeros_like(SCORES)
    for row, relevant in zip(truth, RELEVANT, strict=True):
        row[relevant] = 1
    result = NDCG().compute(predictions=RANKED, references=RELEVANT)
    assert result == {"ndcg_at_10": pytest.approx(ndcg_score(truth, SCORES, k=10))}


def test_all_equal_sentence_transformers():
    evaluator = InformationRetrievalEvaluator(
        queries={str(i): "" for i in range(40)},
        corpus={str(i): "" for i in range(200)},
        relevant_docs={str(i): set(map(str, relevant)) for i, relevant in enumerate(RELEVANT)},
        mrr_at_k=[200], ndcg_at_k=[10], accuracy_at_k=[1], precision_recall_at_k=[100], map_at_k=[1],
    )  # fmt: skip
    hits = [[{"corpus_id": str(d), "score": float(row[d])} for d in range(200)] for row in SCORES]
    expected = evaluator.compute_metrics(hits)
    found = {"predictions": RANKED, "references": RELEVANT}
    assert NDCG().compute(**found)["ndcg_at_10"] == pytest.approx(expected["ndcg@k"][10])
    assert MRR().compute(**found)["mrr"] == pytest.approx(expected["mrr@k"][200])
    assert Accuracy().compute(**found)["accuracy"] == pytest.approx(expected["accuracy@k"][1])


def test_nothing_relevant_retrieved_is_zero_and_nothing_relevant_at_all_an_error():
    found = {"predictions": [[1, 2, 3]], "references": [[9]]}
    assert MRR().compute(**found) == {"mrr": 0.0}
    assert NDCG().compute(**found) == {"ndcg_at_10": 0.0}
    with pytest.raises(ValueError, match="query 0 has no relevant document"):
        MRR().compute(predictions=[[1]], references=[[]])
