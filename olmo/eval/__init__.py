"""Evaluators of the training loop: functions of a model that return metrics and tables."""
