"""The model card: how to use the exported model, from facts at hand and without the network."""

from __future__ import annotations

import textwrap
from pathlib import Path

from huggingface_hub import ModelCardData
from peft import PeftModel

from ..modeling.backbone import base_model_name
from ..modeling.encoder import E5Model


def model_card(model: E5Model, *, instruction: str, max_seq_length: int) -> str:
    """Markdown with the Hub's metadata for the exported `model`."""
    backbone = model.backbone
    base, kind = None, type(backbone).__name__
    if isinstance(backbone, PeftModel):
        kind = type(backbone.get_base_model()).__name__
        base = base_model_name(backbone)
        if Path(base).exists():
            base = None  # a local path means nothing to anyone else
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "hf-e5"],
        base_model=base,
        base_model_relation="adapter" if base else None,
    )
    dim = model.config.get_text_config().hidden_size
    body = f"""
    # Text embeddings, trained with hf-e5

    {kind}, {model.pooling}-token pooling, vectors of
    {dim} dimensions{" at unit length" if model.normalize else ""}, texts cut at {max_seq_length} tokens. Made with the
    recipe of "Improving Text Embeddings with Large Language Models" (arXiv 2401.00368).

    ```python
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer("THIS_FOLDER_OR_ID")
    queries = model.encode_query(["how tall is K2"])
    documents = model.encode_document(["K2 is 8,611 metres high."])
    print(model.similarity(queries, documents))
    ```

    Queries carry an instruction, documents none. `encode_query` uses

        Instruct: {instruction}
        Query:

    For another task, say so in one sentence: `model.encode(texts, prompt="Instruct: ...\\nQuery: ")`.
    """
    return f"---\n{data.to_yaml()}\n---\n{textwrap.dedent(body)}"
