"""Puts the checkpoints together as a folder of diffusers: `python build.py FOLDER OUT`."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from model import autoencoder, denoiser, scheduler, text_encoder
from train import UNET, caption_tokenizer

__all__ = ["pipeline_of"]


def pipeline_of(folder: Path, name: str = "main") -> StableDiffusionPipeline:
    """The pipeline of the averaged weights of both trainings in `folder`."""
    tokenizer = caption_tokenizer()
    average = torch.load(folder / f"{name}.pt")["average"]
    text, unet, coder = text_encoder(tokenizer), denoiser(**UNET), autoencoder()
    for part, model in (("text.", text), ("unet.", unet)):
        model.load_state_dict({key[len(part) :]: value for key, value in average.items() if key.startswith(part)})
    coder.load_state_dict(torch.load(folder / "autoencoder.pt")["average"])
    return StableDiffusionPipeline(
        vae=coder.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    """Write the folder in half precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoints are")
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="main")
    arguments = parser.parse_args()
    pipeline_of(arguments.folder, arguments.name).to(dtype=torch.float16).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
