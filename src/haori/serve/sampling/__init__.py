"""From logits to the next token: filters, penalties, constraints, log-probabilities."""
