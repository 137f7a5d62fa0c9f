"""Export: a trained checkpoint becomes a sentence-transformers folder, verified."""
