"""Filters: records are kept or dropped."""
