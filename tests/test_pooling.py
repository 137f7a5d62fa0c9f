import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from hf_e5.modeling.pooling import POOLINGS, pool


def _masks():
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    return {"right": right, "left": right.flip(1), "full": torch.ones(3, 5, dtype=torch.long)}


@pytest.mark.parametrize("side", ["right", "left", "full"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_against_a_loop_over_texts(mode, side):
    mask = _masks()[side]
    hidden = torch.randn(3, 5, 8, dtype=torch.float64)
    for row, vector in enumerate(pool(hidden, mask, mode)):
        tokens = hidden[row][mask[row].bool()]
        weights = torch.arange(1, len(tokens) + 1, dtype=torch.float64)
        expected = {
            "last": tokens[-1],
            "first": tokens[0],
            "mean": tokens.mean(0),
            "weighted_mean": (tokens * weights[:, None]).sum(0) / weights.sum(),
        }[mode]
        torch.testing.assert_close(vector.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "mode, theirs", [("last", "lasttoken"), ("mean", "mean"), ("weighted_mean", "weightedmean"), ("first", "cls")]
)
def test_pooling_equals_sentence_transformers(mode, theirs):
    mask, hidden = _masks()["right"], torch.randn(3, 5, 8)
    module = Pooling(8, pooling_mode=theirs)
    expected = module({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pool(hidden, mask, mode), expected)


def test_gradients_reach_only_the_pooled_token():
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    pool(hidden, torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]), "last").sum().backward()
    touched = hidden.grad.abs().sum(-1).bool().tolist()
    assert touched == [[False, True, False, False], [False, False, False, True]]


def test_unknown_mode():
    with pytest.raises(ValueError, match="unknown pooling"):
        pool(torch.zeros(1, 1, 1), torch.ones(1, 1), "max")
