"""Synthesis: an LLM writes (instruction, query, positive, hard negative) records (paper, section 3.1)."""
