"""Modeling: a decoder backbone, its tokenizer, and the vector of a text."""
