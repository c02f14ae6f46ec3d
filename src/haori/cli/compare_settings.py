"""`haori compare RUN`: which epoch and which strength of an adapter for pictures."""

import re
from pathlib import Path
from typing import Any

__all__ = ["compare_settings"]

_USUAL = (0.4, 0.7, 1.0)
_MOST_STRENGTHS = 12
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)


def compare_settings(given: str, options: dict[str, Any], data: str | None, base: str | None, out: Path | None) -> None:
    """Draw at each epoch and strength, print and write what they are worth, and recommend one.

    Args:
        given: Folder of a run, or name of an adapter.
        options: As they were given; None where they were not.
        data: Pictures to be like; by default those that were trained on.
        base: Base to draw with; by default that of the training.
        out: Folder of the report.

    Raises:
        HaoriError: Something cannot be used.
    """
    from haori.cli.console import results
    from haori.cli.measure import picture_options
    from haori.core.user_path import user_path
    from haori.data.pictures import PictureSection
    from haori.evaluation.pictures.compared import compare_settings as compared
    from haori.evaluation.pictures.compared_report import show_settings
    from haori.evaluation.pictures.run_adapters import of_library, of_run

    strengths = _numbers("strengths", options.pop("strengths")) or _USUAL
    epochs = _numbers("epochs", options.pop("epochs"))
    section = None if data is None else PictureSection(path=data)
    folder = user_path(given)
    source = of_run(folder, section, epochs, base) if folder.is_dir() else of_library(given, section, epochs, base)
    chosen = picture_options({"most_captions": 8, **options})
    found, place = compared(source, strengths, options=chosen, out=out)
    show_settings(found, results())
    results().print(f"Report: {place / 'comparison.html'}", soft_wrap=True)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    from haori.core.errors import InputError

    if text is None:
        return None
    found = []
    for part in text.split(","):
        if not _NUMBER.fullmatch(part.strip()):
            raise InputError(f"--{option} has {part.strip()[:60]!r} where a number belongs; give it as in 0.4,0.7,1.")
        found.append(float(part))
    if len(set(found)) < len(found) or len(found) > _MOST_STRENGTHS:
        raise InputError(f"--{option} are different numbers, {_MOST_STRENGTHS} at most.")
    return tuple(found)
