"""The proof of a saved adapter: reloaded onto its base, measured in float64, merged, and compared."""
