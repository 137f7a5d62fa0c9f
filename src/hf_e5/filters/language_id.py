"""Language identification that asks one question: is this text in the language it should be in?

py3langid gives a probability for each language. A verifier needs less than a classifier: a text is in the wrong
language only when its own language, and every language that is hard to tell from it, is next to impossible.
docs/benchmarks/filters.md has the measured comparison of libraries.
"""

from __future__ import annotations

from functools import cache

from ..errors import InputError
from ..languages import load_languages


# Shorter texts (terms, names, labels) are not judged: "expressio unius est exclusio alterius" is a good English query.
# The measure is UTF-8 bytes of letters, since a letter of Chinese or Hindi tells more than a Latin one.
MIN_LETTER_BYTES = 40
MAX_CHARACTERS = 300
MIN_PROBABILITY = 0.02

# Code is in no language: a German answer may well be a Python function. Texts with more than this share of such
# characters are not judged either.
CODE_CHARACTERS = frozenset("{}[]()<>=;_#\\|&$+`@*/")
MAX_CODE_SHARE = 0.03

# Languages whose texts also pass as another one: standards of one language, mutually readable neighbours, other codes
# for the same language, and stand-ins for the languages that the model does not know (sd, su, yi).
LOOKS_LIKE = {
    "bs": ("hr", "sr"),
    "fil": ("tl",),
    "hr": ("bs", "sr"),
    "id": ("ms",),
    "jv": ("id", "ms"),
    "ms": ("id",),
    "no": ("nn", "da"),
    "da": ("no", "nn"),
    "sd": ("ur", "fa", "ar", "ps"),
    "sr": ("bs", "hr"),
    "su": ("id", "ms", "jv"),
    "yi": ("he",),
}


@cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise InputError("language identification needs py3langid: pip install hf-e5[synthesis]") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Without the languages that nobody asks for, probabilities do not leak from Chinese to Wu or English to Pidgin.
    wanted = set(load_languages()).union(*LOOKS_LIKE.values())
    identifier.set_languages([label for label in identifier.labels if label in wanted])
    return identifier


def detect_other_language(text: str, language: str) -> tuple[str, float] | None:
    """Return (code of the language found, probability of `language`) if `text` is surely not in `language`.

    None also stands for "cannot tell": a text that is too short or looks like code, or a language that the model does
    not know.

    Args:
        language: ISO 639 code, such as `pt`; a region or script (`pt-BR`) is ignored.
    """
    text = text[:MAX_CHARACTERS]
    letters = "".join(filter(str.isalpha, text))
    if len(letters.encode(errors="ignore")) < MIN_LETTER_BYTES:
        return None
    if sum(map(CODE_CHARACTERS.__contains__, text)) > MAX_CODE_SHARE * len(text):
        return None
    language = language.partition("-")[0]
    accepted = (language, *LOOKS_LIKE.get(language, ()))
    ranking = _identifier().rank(text)
    if not any(code in accepted for code, _ in ranking):
        return None
    probability = float(sum(share for code, share in ranking if code in accepted))
    return (ranking[0][0], probability) if probability < MIN_PROBABILITY else None
