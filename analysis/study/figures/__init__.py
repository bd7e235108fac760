"""Figures of a study, each a function of the rows of study.json."""
