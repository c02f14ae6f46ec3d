"""Trains text encoder and denoiser of emoji-sd: `python train.py FOLDER --steps N`; run again, it goes on.

Every draw (pictures, captions, times, noise) follows from the number of the step and of the process, so what a
checkpoint must hold is weights, optimizer, averages and the step. Several processes of one thread each share a batch
and average their gradients: beside other work on the same cores this is faster than one process of several threads.
"""

import argparse
import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from captions import ALIASES, caption, name_of, tokenizer
from latents import PatchCode, as_tensor
from lists import HELD_OUT_STYLES, HELD_OUT_SUBJECTS, STYLES, SUBJECTS
from model import denoiser, plain_attention, scheduler, text_encoder
from muon import Muon
from PIL import Image
from sheet import GUIDANCE, PROMPTS, as_images, sheet
from torch import Tensor, nn

__all__ = ["Trainer"]

EMA = 0.998
WARM_UP = 100  # steps
NOISINESS = 0.4  # power of a uniform draw: most times are noisy ones, where a caption decides and most is to be learnt
UNET = {"addition_embed_type": "text", "addition_embed_type_num_heads": 8}
"""The caption as a whole is added to the time, beside cross-attention: subjects are learnt many times faster."""


class Trainer:
    """The state of a training, and one step of it."""

    def __init__(
        self,
        folder: Path,
        *,
        batch: int,
        rate: float,
        unet: dict[str, Any],
        rank: int,
        world: int,
        last: int = 1 << 31,
        decay: int = 0,
        noisiness: float = NOISINESS,
    ) -> None:
        torch.manual_seed(0)
        data = torch.load(folder / "pictures.pt")
        self.code = PatchCode(**data["code"])
        self.latents = self.code.encode(as_tensor(data["pictures"].numpy()))
        self.labels: list[tuple[str, str]] = data["labels"]
        self.tokenizer = caption_tokenizer()
        self.scheduler = scheduler()
        self.model = nn.ModuleDict({"text": text_encoder(self.tokenizer), "unet": denoiser(**unet)})
        plain_attention(self.model["unet"])
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = optimizers(self.model, rate, rank, world)
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.batch, self.rank, self.world = batch, rank, world
        self.last, self.decay, self.noisiness = last, decay, noisiness
        self.step_number = self.pictures_seen = 0

    def step(self) -> float:
        """Train on one batch; return its loss."""
        self.model.train()
        drawn = torch.Generator().manual_seed(self.step_number * 64 + self.rank)
        chance = random.Random(self.step_number * 64 + self.rank)
        rows = self.rows(self.step_number)
        texts = [caption(subject, style, chance) for style, subject in (self.labels[row] for row in rows)]
        times = (1000 * torch.rand(len(rows), generator=drawn) ** self.noisiness).long().clamp(max=999)
        noise = torch.randn(len(rows), *self.latents.shape[1:], generator=drawn)
        loss = self.losses(self.model, self.latents[rows], texts, times, noise).mean()
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share = min(1.0, (self.step_number + 1) / WARM_UP, (self.last - self.step_number) / max(1, self.decay))
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        self.step_number += 1
        self.pictures_seen += self.batch * self.world
        decay = min(EMA, self.step_number / (self.step_number + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def rows(self, step: int) -> list[int]:
        """The pictures of a step for this process; each picture comes once in an epoch."""
        count, total = len(self.labels), self.batch * self.world
        rows = []
        for place in range(step * total + self.rank * self.batch, step * total + (self.rank + 1) * self.batch):
            order = torch.randperm(count, generator=torch.Generator().manual_seed(place // count))
            rows.append(int(order[place % count]))
        return rows

    def losses(self, model: nn.ModuleDict, clean: Tensor, texts: list[str], times: Tensor, noise: Tensor) -> Tensor:
        """Squared error of v for each picture, [n]."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noisy = self.scheduler.add_noise(clean, noise, times)
        target = self.scheduler.get_velocity(clean, noise, times)
        with torch.autocast("cpu", torch.bfloat16):
            states = model["text"](tokens).last_hidden_state
            predicted = model["unet"](noisy, times, states, return_dict=False)[0]
        return (predicted.float() - target).square().mean((1, 2, 3))

    @torch.no_grad()
    def gap(self) -> tuple[float, float]:
        """Mean loss of the average at fixed times with true captions, and how much worse shuffled captions are."""
        drawn = torch.Generator().manual_seed(1)
        rows = torch.randperm(len(self.labels), generator=drawn)[:128].tolist()
        texts = [f"{style} {name_of(subject)}" for style, subject in (self.labels[row] for row in rows)]
        times = torch.tensor([500, 700, 850, 950]).repeat(32)
        noise = torch.randn(128, *self.latents.shape[1:], generator=drawn)
        clean = self.latents[rows]
        self.average.eval()
        true, shuffled = (
            self.losses(self.average, clean, words, times, noise).mean().item()
            for words in (texts, texts[1:] + texts[:1])
        )
        return true, shuffled - true

    @torch.no_grad()
    def draw(self) -> Image.Image:
        """The ten prompts in each style by the averaged weights, decoded linearly, which is rough but at hand."""
        prompts = [f"{style} {prompt}" for style in STYLES for prompt in PROMPTS]
        texts = [*prompts, *[""] * len(prompts)]
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = self.average["text"](tokens).last_hidden_state
        steps = copy.deepcopy(self.scheduler)
        steps.set_timesteps(20)
        x = torch.randn(len(prompts), *self.latents.shape[1:], generator=torch.Generator().manual_seed(0))
        for time_of_step in steps.timesteps:
            asked, empty = self.average["unet"](x.repeat(2, 1, 1, 1), time_of_step, states, return_dict=False)[0].chunk(
                2
            )
            x = steps.step(empty + GUIDANCE * (asked - empty), time_of_step, x, return_dict=False)[0]
        pixels = ((self.code.decode(x).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        return sheet(as_images(pixels), prompts, columns=len(PROMPTS))

    def _share_gradients(self) -> None:
        if self.world == 1:
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.view(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def save(self, path: Path) -> None:
        """Write the whole state at once or not at all."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step_number,
            "pictures": self.pictures_seen,
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
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step_number, self.pictures_seen = state["step"], state["pictures"]


def optimizers(model: nn.Module, rate: float, rank: int, world: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, at twice the rate, and AdamW for embeddings, ends, norms and biases."""
    inner, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and not any(part in name for part in ("embed", "conv_in", "conv_out"))
        (inner if is_matrix else rest).append(parameter)
    adam = torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [adam, Muon(inner, 2 * rate, rank=rank, world=world)]


def caption_tokenizer() -> "PreTrainedTokenizerBase":  # noqa: F821
    """The tokenizer of every caption there can be, and of the words of held-out subjects and of usual prompts."""
    names = [name_of(subject) for subject in SUBJECTS + HELD_OUT_SUBJECTS]
    further = [alias for aliases in ALIASES.values() for alias in aliases]
    return tokenizer(
        [*names, *further, *STYLES, *HELD_OUT_STYLES, "a an the of in with and style picture drawing icon emoji"]
    )


def run(arguments: argparse.Namespace, rank: int) -> None:
    """Train in this process until the budget of steps is used up."""
    torch.set_num_threads(arguments.threads)
    if arguments.processes > 1:
        store = f"file://{arguments.folder.resolve()}/{arguments.name}.rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=arguments.processes)
    trainer = Trainer(
        arguments.folder,
        batch=arguments.batch,
        rate=arguments.rate,
        unet=json.loads(arguments.unet),
        rank=rank,
        world=arguments.processes,
        last=arguments.steps,
        decay=arguments.decay,
        noisiness=arguments.noisiness,
    )
    checkpoint = arguments.folder / f"{arguments.name}.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    total, started, seen = 0.0, time.monotonic(), 0
    while trainer.step_number < arguments.steps:
        total += trainer.step()
        seen += 1
        if trainer.step_number % arguments.every == 0 and rank == 0:
            trainer.save(checkpoint)
            true, worse = trainer.gap()
            if trainer.step_number % (10 * arguments.every) == 0:
                trainer.draw().save(arguments.folder / f"{arguments.name}-{trainer.step_number}.png")
            took = time.monotonic() - started
            entry = {
                "step": trainer.step_number,
                "pictures": trainer.pictures_seen,
                "loss": round(total / seen, 4),
                "fixed": round(true, 4),
                "gap": round(worse, 4),
                "pictures_per_s": round(seen * arguments.batch * arguments.processes / took, 1),
                "time": time.strftime("%H:%M:%S"),
            }
            with (arguments.folder / f"{arguments.name}.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            total, started, seen = 0.0, time.monotonic(), 0
    if rank == 0:
        trainer.save(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="main")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, default=32, help="pictures of a step in each process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=int, default=0, help="last steps, over which the rate falls to zero")
    parser.add_argument(
        "--noisiness", type=float, default=NOISINESS, help="below 1 for noisy times, above for clear ones"
    )
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--unet", default=json.dumps(UNET))
    arguments = parser.parse_args()
    (arguments.folder / f"{arguments.name}.rendezvous").unlink(missing_ok=True)
    if arguments.processes == 1:
        run(arguments, 0)
    else:
        context = torch.multiprocessing.get_context("spawn")
        workers = [context.Process(target=run, args=(arguments, rank)) for rank in range(arguments.processes)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a process of the training failed; run the same command again to go on")


if __name__ == "__main__":
    main()
