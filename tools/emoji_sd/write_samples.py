"""Writes the pictures of a held-out style that Haori ships: `python write_samples.py FOLDER_OF_TARBALLS OUT`."""

import sys
from pathlib import Path

from captions import name_of
from lists import HELD_OUT_STYLES, SHOWN_IN_STYLE

from pictures import IconSet, fetch

if __name__ == "__main__":
    tarballs, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    icons = IconSet(fetch(HELD_OUT_STYLES["lineart"], tarballs))
    for subject in SHOWN_IN_STYLE:
        icons.render(subject).convert("L").save(out / f"{subject}.png", optimize=True)
        (out / f"{subject}.txt").write_text(name_of(subject) + "\n", encoding="utf-8")
