"""Trains the autoencoder of emoji-sd: `python train_autoencoder.py FOLDER --steps N`; run again, it goes on.

The encoder is set to the linear code of patches; the decoder learns pictures from that code, with a little
noise, since the denoiser's codes are not perfect either. Pictures are shifted, mirrored and recoloured, so that the
few of the training set stand for many.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from encoder import set_encoder
from latents import PatchCode, as_tensor
from model import autoencoder
from torch import Tensor, nn

__all__ = ["Trainer"]


class Trainer:
    """The state of the autoencoder's training, and one step of it."""

    def __init__(self, folder: Path, *, batch: int, rate: float, steps: int) -> None:
        torch.manual_seed(0)
        data = torch.load(folder / "pictures.pt")
        self.code = PatchCode(**data["code"])
        self.pictures = as_tensor(torch.cat([data["pictures"], data["only_coded"]]).numpy())
        self.model = autoencoder()
        set_encoder(self.model, self.code)
        self.average = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.batch, self.rate, self.steps, self.step_number = batch, rate, steps, 0

    def step(self) -> float:
        """Train on one batch; return its error."""
        drawn = torch.Generator().manual_seed(self.step_number)
        pictures = augment(self.pictures[self._rows()], drawn)
        code = self.code.encode(pictures)
        noise = 0.1 * torch.rand(len(code), 1, 1, 1, generator=drawn) * torch.randn(code.shape, generator=drawn)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = self.model.decode(code + noise).sample.float()
        error = (decoded - pictures).square().mean() + 0.1 * (decoded - pictures).abs().mean()
        error.backward()
        nn.utils.clip_grad_norm_(self.model.decoder.parameters(), 1.0)
        left = 1 - self.step_number / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.step_number + 1) / 100, max(4 * left, 0.02))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        decay = min(0.998, self.step_number / (self.step_number + 10))
        for name, tensor in self.model.state_dict().items():
            self.average[name].lerp_(tensor, 1 - decay)
        return error.item()

    def _rows(self) -> list[int]:
        count = len(self.pictures)
        rows = []
        for place in range(self.step_number * self.batch, (self.step_number + 1) * self.batch):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(place // count))
            rows.append(int(order[place % count]))
        return rows

    def save(self, path: Path) -> None:
        """Write the whole state at once or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_number,
        }
        with path.with_suffix(".tmp").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        """Go on from a saved state."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step_number = state["step"]


def augment(pictures: Tensor, drawn: torch.Generator) -> Tensor:
    """Shift by up to 3 pixels, mirror half, and exchange the colours of a third of `pictures` [n, 3, h, w]."""
    changed = []
    for original in pictures:
        down, right, mirror, recolour = torch.rand(4, generator=drawn).tolist()
        picture = original.roll((round(6 * down - 3), round(6 * right - 3)), (1, 2))
        mirrored = picture.flip(2) if mirror < 0.5 else picture
        changed.append(mirrored[torch.randperm(3, generator=drawn)] if recolour < 1 / 3 else mirrored)
    return torch.stack(changed)


def decibels(pictures: Tensor, decoded: Tensor) -> float:
    """Peak signal to noise of pictures in -1..1, over all of them."""
    return -10 * ((decoded.clamp(-1, 1) - pictures) / 2).square().mean().log10().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="autoencoder")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(arguments.folder, batch=arguments.batch, rate=arguments.rate, steps=arguments.steps)
    checkpoint = arguments.folder / f"{arguments.name}.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    total, started, seen = 0.0, time.monotonic(), 0
    while trainer.step_number < arguments.steps:
        total += trainer.step()
        seen += 1
        if trainer.step_number % arguments.every == 0 or trainer.step_number == arguments.steps:
            trainer.save(checkpoint)
            entry = {
                "step": trainer.step_number,
                "error": round(total / seen, 5),
                "pictures_per_s": round(seen * arguments.batch / (time.monotonic() - started), 1),
                "time": time.strftime("%H:%M:%S"),
            }
            with (arguments.folder / f"{arguments.name}.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            total, started, seen = 0.0, time.monotonic(), 0


if __name__ == "__main__":
    main()
