"""Fictional knowledge: entries and probes (`entries`), what of it comes when (`plan`, `plan_files`), and how it enters
the batches (`injection`)."""
