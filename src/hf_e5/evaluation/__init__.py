"""Evaluation: a finished model is judged."""
