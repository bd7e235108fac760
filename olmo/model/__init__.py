"""Causal language models: OLMo's, and those of other families."""

# ruff: noqa: F401 (what is imported here is what the package exports)
from typing import TYPE_CHECKING

from .. import on_use

if TYPE_CHECKING:
    from .olmo import Block, Embedding, LayerNorm, OLMo, rotary_table, rotate
else:
    __getattr__, __dir__ = on_use(
        __name__,
        olmo="Block Embedding LayerNorm OLMo rotary_table rotate",
    )
