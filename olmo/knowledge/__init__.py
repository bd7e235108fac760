"""Fictional knowledge: entries and probes (`entries`), and how it enters the batches (`injection`)."""
