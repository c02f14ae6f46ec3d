"""Decoding kernels in C, compiled on the machine they run on; see `kernels.c`."""
