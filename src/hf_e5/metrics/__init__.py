"""Metrics: `evaluate.Metric` subclasses that need no download."""
