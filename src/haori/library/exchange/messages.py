"""What a server says where a file was expected: the message in an error's JSON, or the title of a page."""

import html
import json
import re

__all__ = ["message_in"]

_TITLE = re.compile(r"<title[^>]*>(.*?)</title>|<h1[^>]*>(.*?)</h1>", re.IGNORECASE | re.DOTALL)
_KEYS = ("message", "error", "detail", "error_description", "reason")
_LONGEST = 300


def message_in(head: bytes) -> str | None:
    """Return the message in the beginning of a reply; None if it is neither JSON nor a page of HTML."""
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith(("{", "[")):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return _line(text)
        return _line(_said(found) or text)
    if text[:15].lower().startswith(("<!doctype", "<html", "<?xml", "<head", "<error")):
        title = _TITLE.search(text)
        return _line(html.unescape(title[1] or title[2])) if title else "a page without a title"
    return None


def _said(found: object) -> str | None:
    if isinstance(found, str):
        return found
    if isinstance(found, dict):
        return next((said for key in _KEYS if (said := _said(found.get(key)))), None)
    return None


def _line(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.split())[:_LONGEST]
