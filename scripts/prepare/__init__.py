"""Making data and fictional knowledge."""
