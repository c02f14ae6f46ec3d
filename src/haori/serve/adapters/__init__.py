"""From the name in a request to factors in a batch: names, files, memory, many adapters at once."""
