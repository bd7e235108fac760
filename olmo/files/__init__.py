"""Files: read safely, written completely or not at all."""
