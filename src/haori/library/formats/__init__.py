"""The file formats of adapters, one module each: how each is told, read into the neutral form, and written from it."""
