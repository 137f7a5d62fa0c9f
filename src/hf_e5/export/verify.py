"""Verification: does a sentence-transformers folder give the vectors of the model that was trained?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from ..errors import InputError
from ..instructions import query_prompt
from ..modeling.encoder import E5Model
from ..modeling.tokenizer import end_token_id


# Short and long, cut and uncut, several scripts, nothing at all: what tends to go wrong between training and use.
PROBES = (
    "How tall is K2?",
    "",
    "K2, at 8,611 metres above sea level, is the second-highest mountain on Earth.",
    "东京的人口是多少?",
    "كم يبلغ ارتفاع جبل إفرست؟",
    "def add(a, b):\n    return a + b",
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 60,
)

# Largest difference of a component of a unit vector that rounding the weights explains, by the dtype they are stored
# in. Both sides compute in fp32: half-precision arithmetic alone moves vectors by far more than a wrong export might.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class VerifyReport:
    """Result of a comparison, over all probe texts as queries and as documents.

    `max_difference` is the largest absolute difference of any component, `min_cosine` the smallest cosine similarity
    between a vector and its reference, `tolerance` what is accepted for weights of `dtype`.
    """

    folder: Path
    dtype: torch.dtype
    max_difference: float
    min_cosine: float
    tolerance: float

    def raise_if_different(self) -> None:
        """Raise InputError if the vectors differ by more than rounding."""
        if not self.max_difference <= self.tolerance:
            raise InputError(f"{self}: the folder does not give the trained model's vectors")

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.folder}: max difference {self.max_difference:.1e} (accepted for {dtype}: {self.tolerance:.0e}), "
            f"min cosine {self.min_cosine:.6f}"
        )


def verify_export(folder: str | Path, checkpoint: str | Path | None = None) -> VerifyReport:
    """Compare `SentenceTransformer(folder)` with the model it was made from.

    Args:
        folder: What `export_sentence_transformer` wrote.
        checkpoint: The trained checkpoint; without it, the folder's own weights are run by `E5Model` instead, which
            still checks tokenizer, prompts, pooling and normalisation.

    Raises:
        InputError: `folder` is no sentence-transformers folder, a text does not end in EOS, or the vectors differ.
    """
    folder = Path(folder)
    if not (folder / "modules.json").is_file():
        raise InputError(f"{folder} is not a sentence-transformers folder: it holds no modules.json")
    exported = SentenceTransformer(str(folder), device="cpu")
    prompt = exported.prompts.get("query", "")
    instruction = prompt.removeprefix("Instruct: ").removesuffix("\nQuery: ") if prompt else None
    if query_prompt(instruction) != prompt:
        raise InputError(f"{folder}: the query prompt {prompt!r} is not of the form 'Instruct: ...\\nQuery: '")
    dtype, max_length = next(exported.parameters()).dtype, int(exported.max_seq_length or 512)
    del exported
    model = E5Model.from_pretrained(checkpoint or folder, dtype=torch.float32)
    reference = encode_probes(model, instruction, max_length)
    del model
    report = compare(folder, reference, instruction=instruction, dtype=dtype)
    report.raise_if_different()
    return report


def encode_probes(model: E5Model, instruction: str | None, max_length: int) -> Tensor:
    """The probes as queries and as documents, [2 x n, dim] fp32."""
    queries = model.encode(PROBES, instruction=instruction, max_length=max_length)
    return torch.cat([queries, model.encode(PROBES, max_length=max_length)])


def compare(folder: Path, reference: Tensor, *, instruction: str | None, dtype: torch.dtype) -> VerifyReport:
    """Load `folder` as a user would and compare its vectors with `reference` (of `encode_probes`).

    Raises:
        InputError: Its tokenizer does not end a text, cut or uncut, in EOS.
    """
    exported = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    tokenizer = exported.tokenizer
    end = end_token_id(tokenizer)
    for text in PROBES:
        if tokenizer(text, truncation=True)["input_ids"][-1] != end:
            raise InputError(f"{folder}: the tokenizer does not end {text[:20]!r} in {tokenizer.eos_token}")
    vectors = torch.cat(
        [
            exported.encode_query(list(PROBES), convert_to_tensor=True),
            exported.encode_document(list(PROBES), convert_to_tensor=True),
        ]
    ).float()
    return VerifyReport(
        folder=folder,
        dtype=dtype,
        max_difference=(vectors - reference).abs().max().item(),
        min_cosine=torch.cosine_similarity(vectors, reference).min().item(),
        tolerance=TOLERANCE[dtype],
    )
