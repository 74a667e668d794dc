"""Where every tensor goes, and the proof of it."""
