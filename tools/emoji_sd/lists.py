"""The subjects and styles of emoji-sd: what is trained on, what is held out."""

from pathlib import Path

__all__ = [
    "ASKED_IN_STYLE",
    "AUTOENCODER_STYLES",
    "HELD_OUT_STYLES",
    "HELD_OUT_SUBJECTS",
    "SHOWN_IN_STYLE",
    "STYLES",
    "SUBJECTS",
]


def _words(name: str) -> tuple[str, ...]:
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return tuple(word for line in lines if not line.startswith("#") for word in line.split())


SUBJECTS = _words("subjects.txt")
"""Trained on, as CLDR names with hyphens."""
HELD_OUT_SUBJECTS = _words("held_out_subjects.txt")
"""Never seen in training, in no style."""

STYLES = {"noto": "noto", "fluent": "fluent-emoji-flat"}
"""Style word of a caption, and the set it stands for."""
AUTOENCODER_STYLES = {"monotone": "emojione-monotone"}
"""Line art that only the autoencoder sees, so that it can draw line art at all."""
HELD_OUT_STYLES = {"lineart": "fluent-emoji-high-contrast", "twemoji": "twemoji"}
"""Never seen in training, not even by the autoencoder."""

SHOWN_IN_STYLE = _words("style_shown.txt")
"""Subjects whose pictures in a held-out style an adapter learns from."""
ASKED_IN_STYLE = _words("style_asked.txt")
"""Subjects that are then asked for in that style."""
