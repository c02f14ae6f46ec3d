"""Metrics: pure functions of answers, references and scores. Nothing here knows a model, a tokenizer or a file.

`kinds` says how each metric reads; the other modules compute them, each once as a plain figure and once as a
statistic over rows (`statistics`) that a bootstrap can draw again.
"""
