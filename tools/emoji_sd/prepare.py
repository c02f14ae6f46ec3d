"""Renders the pictures of training and writes them with their code: `python prepare.py FOLDER`."""

import sys
from pathlib import Path

import numpy as np
import torch
from latents import PatchCode, as_tensor
from lists import AUTOENCODER_STYLES, STYLES, SUBJECTS

from pictures import render_all

__all__ = ["prepare"]


def prepare(folder: Path) -> None:
    """Write pictures.pt: the trained pictures with style and subject, those of the autoencoder, and the code."""
    trained = render_all(STYLES, SUBJECTS, folder / "npm")
    further = render_all(AUTOENCODER_STYLES, SUBJECTS, folder / "npm")
    pictures, only_coded = np.stack(list(trained.values())), np.stack(list(further.values()))
    code = PatchCode.of(as_tensor(np.concatenate([pictures, only_coded])))
    document = {
        "pictures": torch.from_numpy(pictures),
        "labels": list(trained),
        "only_coded": torch.from_numpy(only_coded),
        "code": vars(code),
    }
    torch.save(document, folder / "pictures.tmp")
    (folder / "pictures.tmp").replace(folder / "pictures.pt")
    back = code.decode(code.encode(as_tensor(pictures)))
    print(len(pictures), "pictures,", len(only_coded), "for the autoencoder only")
    print("linear code dB", -10 * ((back - as_tensor(pictures)) / 2).square().mean().log10().item())
    z = code.encode(as_tensor(pictures))
    print("code deviation by channel", z.std((0, 2, 3)).tolist(), "mean square", z.square().mean().item())


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
