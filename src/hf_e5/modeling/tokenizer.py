"""The tokenizer: every text ends in EOS, on every path.

Last-token pooling reads the vector at EOS (paper, section 3.2), so EOS must survive truncation, saving, reloading and
other software. Flags such as `add_eos_token` do not promise that: transformers 5 follows `tokenizer.json` and drops
them. EOS is therefore written into the tokenizer's post-processor, the part of `tokenizer.json` that runs last.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import InputError


logger = logging.getLogger(__name__)


def load_tokenizer(name_or_path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer and make it end every text in EOS (see `ensure_eos`).

    Args:
        name_or_path: Folder or Hub id.
        kwargs: Passed to `AutoTokenizer.from_pretrained`, e.g. `gguf_file` or `revision`.

    Raises:
        InputError: The tokenizer cannot be found, has no EOS token or is not a fast tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer at {name_or_path!s}: {_first_line(error)}") from error
    return ensure_eos(tokenizer)


def ensure_eos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make `tokenizer` end every text in exactly one end token; changes it in place and returns it.

    A tokenizer that does so already (XLM-R's `</s>`, BERT's `[SEP]`) is left alone. Whatever it puts in front of a
    text (Mistral's `<s>`) stays. Without a pad token, EOS is used to pad: pooling goes by the attention mask, never by
    token id, so the two may be the same. The chat template is dropped, because today's sentence-transformers would
    wrap every text in it.

    Raises:
        InputError: There is no EOS token, or the tokenizer has no `tokenizers` backend to write the rule into.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    tokenizer.chat_template = None
    prefix, suffix = _special_tokens_around(tokenizer)
    if not suffix:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer of {name} has no EOS token, and last-token pooling reads the vector at EOS: "
                "set eos_token in its tokenizer_config.json to a token of its vocabulary"
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"the tokenizer of {name} is not a fast tokenizer: save it with a tokenizer.json first")
        special = [*prefix, tokenizer.eos_token]
        first, second = [*prefix, "$A", tokenizer.eos_token], [*prefix, "$B:1", f"{tokenizer.eos_token}:1"]
        backend.post_processor = TemplateProcessing(
            single=first,
            pair=first + second,
            special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(special)],
        )
        if not _special_tokens_around(tokenizer)[1]:
            raise InputError(f"the tokenizer of {name} does not keep an EOS rule in its post-processor")
    if tokenizer.pad_token_id is None:
        pad = tokenizer.eos_token or tokenizer.sep_token
        if pad is None:
            raise InputError(f"the tokenizer of {name} has neither a pad nor an EOS token: set pad_token")
        logger.info("%s has no pad token; padding with %r (pooling goes by the attention mask)", name, pad)
        tokenizer.pad_token = pad
    return tokenizer


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of `texts`, each at most `max_length` long and ending in EOS. No padding.

    Truncation leaves room for the special tokens: a text that is cut still ends in EOS (`max_length - 1` tokens of
    text and one EOS; one token fewer where the tokenizer also adds BOS).
    """
    if not texts:
        return []
    # Not the tokenizer's own warning about long texts: truncation is asked for here.
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
    return encoded["input_ids"]


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The special tokens that the tokenizer itself puts before and after a text, found by asking it."""
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            before, after = ids[:start], ids[start + len(bare) :]
            return list(tokenizer.convert_ids_to_tokens(before)), list(tokenizer.convert_ids_to_tokens(after))
    raise InputError(f"cannot tell which special tokens {tokenizer.name_or_path} adds to a text")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
