"""Texts to vectors with one encoder and any of its adapters."""
