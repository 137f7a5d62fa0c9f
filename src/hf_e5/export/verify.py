"""Verification: does an exported folder give the vectors of the model that was written, and what did writing it cost?

Two questions, each with its own measure. *Fidelity* compares the folder, loaded by sentence-transformers, with the
model that was written: merged and cast as the folder is, held in memory. It is the gate. *Drift* compares that model
with the checkpoint as trained: what merging and casting changed. It is information: rounding a right model to bf16 may
move a component by more than a lost LoRA layer does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..modeling.encoder import E5Model
from ..modeling.tokenizer import tokenize
from .settings import ExportSettings, merge_and_cast


# Largest accepted difference of a component, as a share of the reference vector's norm. Derived: both sides compute in
# fp32 with the same parameters, whatever dtype they are stored in, and differ by the order of their sums only: one
# rounding (6e-8) for each of about seven products a layer, which adds up like a random walk to 6e-8 * sqrt(7 * 30)
# = 9e-7 with 30 layers, 2e-6 with 100. The rest is room for sharp attention, which amplifies.
BOUND = 1e-5

# Nothing at all (one EOS token: the most sensitive), capitals, several scripts, an emoji, code.
TEXTS = (
    "How tall is K2?",
    "",
    "K2, at 8,611 metres above sea level, is the second-highest mountain on Earth.",
    "东京的人口是多少?",
    "كم يبلغ ارتفاع جبل إفرست؟",
    "हिमालय कितना ऊँचा है?",
    "Сколько лет Эрмитажу?",
    "¿Dónde está la estación? 🚉",
    "def add(a, b):\n    return a + b",
)

# One token each, with a space before it, in practically every vocabulary: a text can be made to any number of tokens.
LETTERS = "a b c d e f g h i l m n o p r s t w".split()

POOLING_MODES = {"last": "lasttoken", "mean": "mean", "weighted_mean": "weightedmean", "first": "cls"}


@dataclass(frozen=True)
class Drift:
    """What merging and casting changed, over all probes.

    `min_cosine` and `mean_cosine` are of a probe's vectors before and after. `queries` probes ranked the documents
    before and after: `changed_tops` of them now have another first document, and of their `pairs` of documents
    `swapped_pairs` are in the other order.
    """

    min_cosine: float
    mean_cosine: float
    queries: int
    changed_tops: int
    pairs: int
    swapped_pairs: int

    def __str__(self) -> str:
        return (
            f"smallest cosine {self.min_cosine:.5f}, mean {self.mean_cosine:.5f}, {self.changed_tops} of "
            f"{self.queries} top documents changed, {self.swapped_pairs} of {self.pairs} pairs swapped"
        )


@dataclass(frozen=True)
class VerifyReport:
    """Result of a verification.

    `max_difference` (fidelity) is the largest absolute difference of a component between a vector of the folder and
    of the model that was written, as a share of that vector's norm. `disagreements` name what sentence-transformers
    loads other than `settings` say. `drift` is None where no checkpoint was given.
    """

    folder: Path
    settings: ExportSettings
    max_difference: float
    disagreements: tuple[str, ...] = ()
    drift: Drift | None = None

    def raise_if_different(self) -> None:
        """Raise InputError if the folder is not what was written; drift never raises."""
        problems = list(self.disagreements)
        if not self.max_difference <= BOUND:
            problems.append(f"its vectors differ from that model's by {self.max_difference:.1e} (bound {BOUND:.0e})")
        if problems:
            raise InputError(f"{self.folder} is not the model that was exported: {'; '.join(problems)}")

    def __str__(self) -> str:
        text = f"fidelity {self.max_difference:.1e} (bound {BOUND:.0e})"
        if self.drift is None:
            return text
        if self.settings.dtype is None:
            return f"{text}; drift from the checkpoint: none, as nothing was merged or cast"
        cause = f"{'merging and ' if self.settings.merged else ''}casting to {self.settings.dtype}"
        return f"{text}; drift from the checkpoint by {cause}: {self.drift}"


@dataclass(frozen=True)
class Probes:
    """Texts that are encoded as queries and as documents, and the tokens that the documents must become."""

    settings: ExportSettings
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    token_ids: list[list[int]]  # of the documents

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, settings: ExportSettings) -> Probes:
        """`TEXTS`, one document that just fits `max_seq_length`, and one text that does not (other letters)."""
        length = settings.max_seq_length
        fits, beyond = LETTERS, LETTERS[::-1]
        fits = _repeat(fits, _count_that_fits(tokenizer, fits, length))
        beyond = _repeat(beyond, _count_that_fits(tokenizer, beyond, length) + 1)
        documents = (*TEXTS, " ".join(fits), " ".join(beyond))
        return cls(settings, (*TEXTS, " ".join(beyond)), documents, tokenize(tokenizer, documents, length))

    def encode(self, model: E5Model) -> Tensor:
        """Vectors of the queries, then the documents, [n, dim] fp32."""
        length = self.settings.max_seq_length
        queries = model.encode(self.queries, instruction=self.settings.instruction, max_length=length)
        return torch.cat([queries, model.encode(self.documents, max_length=length)])

    def encode_exported(self, exported: SentenceTransformer) -> Tensor:
        """The same by the folder's own prompts, as its users encode."""
        queries = exported.encode_query(list(self.queries), convert_to_tensor=True)
        return torch.cat([queries, exported.encode_document(list(self.documents), convert_to_tensor=True)]).float()

    def drift(self, trained: Tensor, written: Tensor) -> Drift:
        """Compare vectors of `encode`, before and after merging and casting."""
        before, after = (F.normalize(vectors.double(), dim=-1) for vectors in (trained, written))
        cosines = (before * after).sum(dim=-1)
        count = len(self.queries)
        scores = [vectors[:count] @ vectors[count:].T for vectors in (before, after)]  # [queries, documents]
        tops = [score.argmax(dim=-1) for score in scores]
        first, second = torch.triu_indices(len(self.documents), len(self.documents), offset=1)
        orders = [score[:, first] > score[:, second] for score in scores]
        return Drift(
            min_cosine=cosines.min().item(),
            mean_cosine=cosines.mean().item(),
            queries=count,
            changed_tops=int((tops[0] != tops[1]).sum()),
            pairs=orders[0].numel(),
            swapped_pairs=int((orders[0] != orders[1]).sum()),
        )


def verify_export(folder: str | Path, checkpoint: str | Path | None = None) -> VerifyReport:
    """Compare `SentenceTransformer(folder)` with the model it was made from.

    What the folder was exported with is read from its `e5_config.json`; sentence-transformers' files must agree.

    Args:
        folder: What `export_sentence_transformer` wrote.
        checkpoint: The trained checkpoint, from which the model that was written is made again: merged and cast as
            the folder is, with the checkpoint's own tokenizer, pooling and normalisation. Without it, `E5Model` runs
            the folder's own weights and tokenizer: other weights, or a tokenizer that adds other tokens in front of
            a text or repeats EOS, are then not seen.

    Raises:
        InputError: `folder` is not an export, or of an older version, or not of `checkpoint`; what it loads is not
            what was stored; its vectors differ by more than `BOUND`, or are not finite.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        raise InputError(f"{folder} is not a sentence-transformers folder: it holds no modules.json")
    settings = ExportSettings.read(folder)
    model = E5Model.from_pretrained(checkpoint or folder, dtype=torch.float32)
    probes = Probes.of(model.tokenizer, settings)
    drift = None
    if checkpoint is None:
        reference = encode_finite(probes, model, str(folder))
    else:
        for name in ("pooling", "normalize"):
            stored, trained_with = getattr(settings, name), getattr(model, name)
            if stored != trained_with:
                raise InputError(f"{folder} was exported with {name}={stored}, {checkpoint} has {name}={trained_with}")
        trained = encode_finite(probes, model, str(checkpoint))
        try:
            merge_and_cast(model, settings)
        except InputError as error:
            raise InputError(f"{folder} was not made from {checkpoint}: {error}") from None
        reference = encode_finite(probes, model.float(), f"{checkpoint} merged and cast as {folder}")
        drift = probes.drift(trained, reference)
    del model  # a second copy is about to be loaded
    report = compare(folder, probes, reference, drift)
    report.raise_if_different()
    return report


def compare(folder: Path, probes: Probes, reference: Tensor, drift: Drift | None) -> VerifyReport:
    """Load `folder` as a user would, in fp32, and compare its vectors with `reference` (of `Probes.encode`).

    Raises:
        InputError: sentence-transformers cannot load it, or it gives vectors that are not finite.
    """
    exported = load_exported(folder)
    vectors = _require_finite(probes.encode_exported(exported), str(folder))
    found = tuple(disagreements(exported, probes))
    return VerifyReport(folder, probes.settings, max_difference(vectors, reference), found, drift)


def load_exported(folder: Path) -> SentenceTransformer:
    """`SentenceTransformer(folder)` with fp32 arithmetic on the CPU.

    Raises:
        InputError: It cannot be loaded.
    """
    try:
        return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"{folder}: sentence-transformers cannot load it: {reason}") from error


def disagreements(exported: SentenceTransformer, probes: Probes) -> list[str]:
    """What was loaded other than it was exported, a line each: vectors show only some of it."""
    settings, tokenizer = probes.settings, exported.tokenizer
    loaded: list[tuple[str, object, object]] = [
        (f"the prompt {name!r}", exported.prompts.get(name), text) for name, text in settings.prompts.items()
    ]
    modules = ["Transformer", "Pooling", *(["Normalize"] if settings.normalize else [])]
    pooling = next((module for module in exported if type(module).__name__ == "Pooling"), None)
    loaded += [
        ("default_prompt_name", exported.default_prompt_name, None),
        ("the list of modules", [type(module).__name__ for module in exported], modules),
        ("pooling_mode", getattr(pooling, "pooling_mode", None), POOLING_MODES[settings.pooling]),
        ("max_seq_length", exported.max_seq_length, settings.max_seq_length),
        ("do_lower_case", getattr(exported[0], "do_lower_case", None), False),
        ("similarity_fn_name", exported.similarity_fn_name, "cosine"),
        ("chat_template", tokenizer.chat_template, None),
    ]
    found = [f"{name} is {value!r}, not {expected!r}" for name, value, expected in loaded if value != expected]
    for text, expected in zip(probes.documents, probes.token_ids, strict=True):
        ids = tokenizer(text, truncation=True)["input_ids"]
        if ids != expected:
            found.append(f"{text[:20]!r} becomes the tokens {_ends(ids)}, not {_ends(expected)}")
            break
    return found


def max_difference(vectors: Tensor, reference: Tensor) -> float:
    """The largest difference of a component, as a share of the reference vector's norm: for unit vectors as it is.

    fp32's rounding grows with the size of what is summed, so that one bound holds with and without normalisation.
    Infinite where the vectors differ in dimension.
    """
    if vectors.shape != reference.shape:
        return float("inf")
    return ((vectors - reference).abs().amax(dim=-1) / reference.norm(dim=-1)).max().item()


def encode_finite(probes: Probes, model: E5Model, name: str) -> Tensor:
    """`probes.encode(model)`, an InputError that tells `name` where a vector is not finite."""
    return _require_finite(probes.encode(model), name)


def _require_finite(vectors: Tensor, name: str) -> Tensor:
    bad = int((~vectors.isfinite().all(dim=-1)).sum())
    if bad:
        raise InputError(f"{name}: the vectors of {bad} of {len(vectors)} probes are not finite (NaN or infinity)")
    return vectors


def _count_that_fits(tokenizer: PreTrainedTokenizerBase, letters: Sequence[str], max_length: int) -> int:
    """How many letters make a text of at most `max_length` tokens, special ones included."""

    def tokens(count: int) -> int:
        return len(tokenizer(" ".join(_repeat(letters, count)), verbose=False)["input_ids"])

    return bisect_right(range(max_length + 1), max_length, key=tokens) - 1


def _repeat(letters: Sequence[str], count: int) -> list[str]:
    return [letters[index % len(letters)] for index in range(count)]


def _ends(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"[{ids[0]}, {ids[1]}, ... {ids[-2]}, {ids[-1]}] ({len(ids)})"
