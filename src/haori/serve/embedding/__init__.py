"""Texts to vectors, or to the labels of classifiers, with one encoder and any of its adapters."""
