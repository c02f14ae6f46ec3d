"""One system that trains a picture pipeline step by step on command: Haori, or the logic of diffusers' own example.

The example is train_text_to_image_lora.py of diffusers, written anew from its recipe: the frozen UNet, VAE and text
encoder in the dtype of mixed precision, PEFT's LoRA of the attention's four projections, and in each step pictures
read, encoded and captioned, noise added, the prediction compared, the gradient clipped and AdamW's step. A step is
measured from taking its pictures to the optimizer's update.
"""

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import serve

warnings.filterwarnings("ignore")
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
RANK = 8


def say(seconds: float, pictures: int, loss: float) -> None:
    """Report a step."""
    import torch

    from haori.training.memory import peak_memory_bytes

    peak = peak_memory_bytes("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"seconds": seconds, "pictures": pictures, "loss": loss, "peak_bytes": peak}), flush=True)


def run_haori(spec: dict[str, Any]) -> None:
    """Train through the loop that `haori train` uses; the method is LoRA or every weight."""
    from haori.tasks.recipe import recipe_from
    from haori.training import prepare
    from haori.training.batches import epoch_steps
    from haori.training.session import opened_loop

    lora = {"kind": "lora", "rank": RANK, "alpha": RANK, "target": TARGETS}
    prepared = prepare(
        recipe_from(
            {
                "name": "speed", "task": "text_to_image", "base": spec["base"],
                "data": {"path": spec["data"], "resolution": spec["size"]},
                "method": {"kind": "full"} if spec["method"] == "full" else lora,
                "optimizer": {"lr": 1e-4},
                "training": {"batch_size": spec["batch"], "epochs": 1, "dtype": "bf16", **spec.get("training", {})},
                "samples": {"prompts": []},
            }
        )
    )  # fmt: skip
    steps = epoch_steps(list(prepared.train.costs), prepared.recipe.training, 0)
    steps = [step for step in steps if sum(len(micro) for micro in step) == spec["batch"]]
    with tempfile.TemporaryDirectory() as folder, opened_loop(prepared, Path(folder)) as loop:
        serve({"steps": len(steps)})
        for index, _ in enumerate(sys.stdin):
            started = time.perf_counter()
            loop.step(steps[index % len(steps)], last_of_epoch=False)
            seconds = time.perf_counter() - started
            say(seconds, spec["batch"], loop.measurements.series("train")[-1]["loss"])


class Example:
    """The parts of the example, loaded with the settings of the spec."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        from accelerate import Accelerator
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor
        from peft import LoraConfig
        from transformers import CLIPTextModel, CLIPTokenizer

        options, base = spec["options"], spec["base"]
        self.accelerator = Accelerator(cpu=spec["cpu"], mixed_precision="bf16" if options["bf16"] else "no")
        self.dtype = torch.bfloat16 if options["bf16"] else torch.float32
        self.size = spec["size"]
        self.scheduler: Any = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        self.text_encoder: Any = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
        self.vae: Any = AutoencoderKL.from_pretrained(base, subfolder="vae")
        unet: Any = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
        for part in (unet, self.vae, self.text_encoder):
            part.requires_grad_(False)
            part.to(self.accelerator.device, dtype=self.dtype)
        if not options["sdpa"]:
            unet.set_attn_processor(AttnProcessor())
        if options["channels_last"]:
            unet.to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
        self.parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        self.unet, self.optimizer = self.accelerator.prepare(unet.train(), optimizer)
        self.files = sorted(Path(spec["data"]).glob("*.png"))
        tokenizer: Any = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        self.ids = tokenizer(
            [file.with_suffix(".txt").read_text() for file in self.files], max_length=tokenizer.model_max_length,
            padding="max_length", truncation=True, return_tensors="pt",
        ).input_ids  # fmt: skip

    def encode(self, rows: list[int]) -> tuple[Any, Any]:
        """Return the latents and the text states of pictures."""
        import torch

        device = self.accelerator.device
        with torch.no_grad():
            batch = torch.stack([self._pixels(self.files[row]) for row in rows]).to(device, self.dtype)
            latents = self.vae.encode(batch).latent_dist.sample() * self.vae.config.scaling_factor
            return latents, self.text_encoder(self.ids[rows].to(device), return_dict=False)[0]

    def step(self, latents: Any, text: Any) -> float:
        """Do one optimizer step and return its loss."""
        import torch

        scheduler = self.scheduler
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        wanted = noise
        if scheduler.config.prediction_type == "v_prediction":
            wanted = scheduler.get_velocity(latents, noise, timesteps)
        found = self.unet(noisy, timesteps, text, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(found.float(), wanted.float(), reduction="mean")
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())

    def _pixels(self, file: Path) -> Any:
        import numpy as np
        import torch
        from PIL import Image

        picture = Image.open(file).convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1)


def run_diffusers(spec: dict[str, Any]) -> None:
    """Train as the example does, with the settings of the spec; `cached` has everything encoded before."""
    import torch

    example = Example(spec)
    pictures = len(example.files)
    kept = example.encode(list(range(pictures))) if spec["options"]["cached"] else None
    serve({"steps": 0})
    generator = torch.Generator().manual_seed(1)
    for _ in sys.stdin:
        started = time.perf_counter()
        rows = torch.randperm(pictures, generator=generator)[: spec["batch"]].tolist()
        loss = example.step(*(example.encode(rows) if kept is None else (kept[0][rows], kept[1][rows])))
        say(time.perf_counter() - started, len(rows), loss)


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    {"haori": run_haori, "diffusers": run_diffusers}[wanted["system"]](wanted)
