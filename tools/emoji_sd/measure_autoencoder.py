"""Prints how well the autoencoder gives pictures back, for each style: `python measure_autoencoder.py FOLDER`."""

import sys
from pathlib import Path

import numpy as np
import torch
from latents import PatchCode, as_tensor
from lists import AUTOENCODER_STYLES, HELD_OUT_STYLES, HELD_OUT_SUBJECTS, STYLES, SUBJECTS
from model import autoencoder
from train_autoencoder import decibels

from pictures import render_all

__all__ = ["main"]


@torch.no_grad()
def main(folder: Path) -> None:
    """Print decibels of 100 pictures of each style, and of subjects that are held out, beside the linear code's."""
    torch.set_num_threads(1)
    model = autoencoder()
    model.load_state_dict(torch.load(folder / "autoencoder.pt")["average"])
    code = PatchCode(**torch.load(folder / "pictures.pt")["code"])
    for title, styles, subjects in (
        ("trained", STYLES, SUBJECTS[::4]),
        ("seen by the decoder", AUTOENCODER_STYLES, SUBJECTS[::4]),
        ("held-out subjects", STYLES, HELD_OUT_SUBJECTS),
        ("held-out style", HELD_OUT_STYLES, SUBJECTS[::4]),
    ):
        for style, icon_set in styles.items():
            drawn = render_all({style: icon_set}, subjects, folder / "npm")
            pictures = as_tensor(np.stack(list(drawn.values())))
            back = model.decode(model.encode(pictures).latent_dist.mode()).sample
            linear = decibels(pictures, code.decode(code.encode(pictures)))
            print(f"{title:20} {style:10} {decibels(pictures, back):5.1f} dB, linear {linear:5.1f} dB", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
