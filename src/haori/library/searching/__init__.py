"""Finding adapters without reading their cards: one table of entries, queries, the nearest first."""
