"""Causal language models: OLMo's, and those of other families."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from .olmo import Block, Embedding, LayerNorm, OLMo, rotary_table, rotate
