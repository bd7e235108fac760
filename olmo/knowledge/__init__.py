"""Fictional knowledge: its entries and probes (`entries`), which of it is injected when (`rounds`, `plan`; from files
or a configuration: `plan_files`, `published_map`, `build`), and how it enters the batches (`injection`)."""
