"""Calls of tools: how each family of models writes them, how they are read, and how an answer is kept to them.

Knows texts and schemas, nothing about HTTP or engines.
"""

from haori.server.tools.events import CallArguments, CallBegun, CallEvent, TextFound
from haori.server.tools.formats import ToolFormat, format_of
from haori.server.tools.grammar import calls_grammar
from haori.server.tools.reader import CallReader

__all__ = [
    "CallArguments",
    "CallBegun",
    "CallEvent",
    "CallReader",
    "TextFound",
    "ToolFormat",
    "calls_grammar",
    "format_of",
]
