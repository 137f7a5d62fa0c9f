import random

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from hf_e5.filters.duplicates import NUM_PERM, SHINGLE, exact_key, near_duplicates, signature


def shingles(text: str) -> set[str]:
    return {text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1)}


def jaccard(a: str, b: str) -> float:
    first, second = shingles(f"{a}\t"), shingles(f"{b}\t")
    return len(first & second) / len(first | second)


def edited(text: str, edits: int, rng: random.Random) -> str:
    words = text.split(" ")
    for place in rng.sample(range(len(words)), edits):
        words[place] = "".join(rng.sample("bcdfghjklmnpqrstvwxz", 5))
    return " ".join(words)


def test_exact_key_ignores_case_and_spacing_only():
    assert exact_key("How TALL  is\nK2", "8611 m") == exact_key("how tall is k2", "8611 M ")
    assert exact_key("ab", "c") != exact_key("a", "bc")
    assert exact_key("a", "b") != exact_key("b", "a")


@pytest.mark.parametrize("text", ["", "a", "ab", "数学", "a long text " * 40, "half \ud800 pair"])
def test_signature_of_any_text(text):
    values = signature(text, text)
    assert values.shape == (NUM_PERM,) and values.dtype == np.uint32
    assert (values == signature(text.upper(), f" {text}")).all()


def test_signatures_estimate_the_jaccard_similarity(sample_rows):
    rng = random.Random(0)
    texts = [row["positive"].lower() for row in sample_rows if row["task_type"] == "short_long"][:60]
    errors = []
    for text in texts:
        text = " ".join(text.split())
        other = edited(text, min(3, len(text.split())), rng)
        estimate = (signature(text, "") == signature(other, "")).mean()
        errors.append(estimate - jaccard(text, other))
    # Standard error of a mean of 60 estimates with 60 permutations each: at most 0.5 / 60.
    assert abs(np.mean(errors)) < 0.04
    assert np.std(errors) < 0.1


def test_near_duplicates_are_those_of_brute_force_and_of_datasketch(sample_rows):
    rng = random.Random(1)
    originals = [" ".join(row["positive"].lower().split()) for row in sample_rows if len(row["positive"]) > 300][:80]
    # Every third text comes back with one word changed, every third with most of them.
    texts = list(originals)
    for number, text in enumerate(originals):
        if number % 3 == 0:
            texts.append(edited(text, 1, rng))
        elif number % 3 == 1:
            texts.append(edited(text, len(text.split()) * 2 // 3, rng))
    truth = {}
    for row in range(len(originals), len(texts)):
        best = max(range(len(originals)), key=lambda earlier: jaccard(texts[row], texts[earlier]))
        similarity = jaccard(texts[row], texts[best])
        assert similarity > 0.88 or similarity < 0.6  # nothing near the threshold, where the estimate may err
        if similarity > 0.88:
            truth[row] = best
    signatures = np.stack([signature(text, "") for text in texts])
    assert near_duplicates(signatures, 0.75) == truth
    assert len(truth) > 20

    index, found = MinHashLSH(threshold=0.75, num_perm=NUM_PERM), {}
    for row, values in enumerate(signatures):
        minhash = MinHash(NUM_PERM, seed=1, hashvalues=values, scheme="affine32")
        for earlier in index.query(minhash):
            found[row] = earlier
        index.insert(row, minhash)
    assert {row: found[row] for row in truth if row in found}.items() <= truth.items()
    assert len(found.keys() & truth.keys()) > 0.9 * len(truth)


def test_clusters_point_to_their_first_row():
    base = np.arange(NUM_PERM, dtype=np.uint32)
    near, far = base.copy(), base + np.uint32(1000)
    near[:3] += np.uint32(5000)
    nearer = near.copy()
    nearer[3:6] += np.uint32(5000)
    rows = np.stack([far, base, near, nearer, far, base])
    assert near_duplicates(rows, 0.94) == {2: 1, 3: 1, 4: 0, 5: 1}
    assert near_duplicates(rows, 1.0) == {4: 0, 5: 1}
    assert near_duplicates(np.empty((0, NUM_PERM), np.uint32), 0.8) == {}
