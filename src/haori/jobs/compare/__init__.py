"""Compare methods on one base with the same data and budget."""
