"""Token ids: where they lie (`sources`), in which order a run sees them (`order`), who gets what (`loader`)."""
