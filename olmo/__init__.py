"""Train OLMo-compatible language models, inject knowledge into them, and look at their memories."""
