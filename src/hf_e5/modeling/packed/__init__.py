"""Packs: texts of any length through the decoder without padding, with fused layers."""
