"""Evaluation: scores of a trained model."""
