"""Metrics: pure functions of answers, references and scores.

Nothing here knows the model that is measured, a tokenizer or a file; pictures alone are looked at through a network of
their own (`picture_features`).

`kinds` says how each metric reads; the other modules compute them, each once as a plain figure and once as a
statistic over rows (`statistics`) that a bootstrap can draw again.
"""
