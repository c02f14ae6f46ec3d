"""Pickles are never loaded: their tensors are taken out in a sandboxed process, on request."""
