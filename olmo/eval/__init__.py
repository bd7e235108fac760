"""Evaluators of the training loop; each is a function of a model that returns metrics and tables."""
