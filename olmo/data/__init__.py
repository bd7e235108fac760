"""Token ids: where they are stored (`sources`), in which order a run sees them (`order`), and batches (`loader`)."""
