"""Blind ratings of systems two by two: pairs in random order, votes, and what follows from them.

Knows nothing of terminals and of how pictures were drawn. Exports are lazy: importing the package loads no numpy.
"""
