"""What can be learnt: one folder a task, with its recipe, rows, batches, loss, probes and scores."""
