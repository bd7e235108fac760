"""Fictional knowledge: entries and probes (`entries`), what of it comes when (`plan`, and its files, `plan_files`), and how
it enters the batches (`injection`)."""
