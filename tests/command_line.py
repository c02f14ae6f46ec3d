"""Runs the command line in this process, as a user would: arguments in; exit code, output and errors out."""

import sys
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    code: int
    out: str
    err: str


def haori(capsys: pytest.CaptureFixture[str], *arguments: object) -> Done:
    from haori.cli.app import main

    before = sys.argv
    sys.argv = ["haori", *map(str, arguments)]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err)
