"""Weights of a base on disk, one tensor at a time: reading one, merging an adapter into all of them, checking that.

tensors   where each tensor lies, and reading it        rounding  from float64, once
plan      which tensors of which files become what      writing   the merged files
checking  each written tensor computed again            merging   the whole: planned, written, checked, put in place
"""
