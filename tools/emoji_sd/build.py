"""Puts the checkpoints together as a folder of diffusers: `python build.py FOLDER OUT`."""

import argparse
import json
import random
from pathlib import Path

import torch
from captions import FILLERS, caption
from diffusers import StableDiffusionPipeline
from gate_figures import BARS
from lists import STYLES, SUBJECTS
from model import autoencoder, denoiser, scheduler, text_encoder
from train import UNET, caption_tokenizer
from transformers import CLIPTextModel, PreTrainedTokenizerBase

__all__ = ["card", "pipeline_of", "write"]


def pipeline_of(folder: Path, name: str = "main") -> StableDiffusionPipeline:
    """The pipeline of the averaged weights of both trainings in `folder`."""
    tokenizer = caption_tokenizer()
    average = torch.load(folder / f"{name}.pt")["average"]
    text, unet, coder = text_encoder(tokenizer), denoiser(**UNET), autoencoder()
    for part, model in (("text.", text), ("unet.", unet)):
        model.load_state_dict({key[len(part) :]: value for key, value in average.items() if key.startswith(part)})
    neutralise(text, tokenizer)
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


@torch.no_grad()
def neutralise(text: CLIPTextModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let tokens that no caption held mean as little as the words that say nothing: their vectors are still random."""
    chance = random.Random(0)
    captions = {caption(subject, style, chance) for subject in SUBJECTS for style in STYLES for _ in range(100)}
    seen = {token for ids in tokenizer(sorted(captions)).input_ids for token in ids}
    fillers = sorted({token for words in FILLERS for token in tokenizer(words, add_special_tokens=False).input_ids})
    vectors = text.get_input_embeddings().weight
    vectors[[token for token in range(len(vectors)) if token not in seen]] = vectors[fillers].mean(0)


def write(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Write the folder in half precision, so that it loads in single precision where nothing is asked for."""
    pipeline.to(dtype=torch.float16).save_pretrained(out)
    config = out / "text_encoder" / "config.json"
    # transformers loads in the dtype that a configuration names, diffusers in single precision: they have to agree
    settings = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n")
    for file in out.rglob("*.safetensors"):
        file.chmod(0o644)


def card(folder: Path, step: int) -> str:
    """The card of the base, with the figures of the gate at that step."""
    lines = (folder / "gate.jsonl").read_text().splitlines()
    gate = next(entry for entry in map(json.loads, reversed(lines)) if entry["step"] == step)
    trained = {entry["step"]: entry for entry in map(json.loads, (folder / "main.jsonl").read_text().splitlines())}
    reached = all(gate[name] >= bar for name, bar in BARS.items())
    told = "All bars are reached." if reached else "**The bars are not reached: its training is not finished.**"
    shares = {name: f"{gate[name]:.0%}" for name in BARS}
    template = (Path(__file__).parent / "card_template.md").read_text(encoding="utf-8")
    return template.format(
        **shares,
        told=told,
        kid=f"{gate['kid']:.3f}",
        kid_of_real=f"{gate['kid_of_real']:.3f}",
        pictures=f"{trained[step]['pictures']:,}",
        steps=f"{step:,}",
    )


def main() -> None:
    """Write the folder, and with --card its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoints are")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--card", type=int, metavar="STEP", help="write the card too, with the figures of the gate at that step"
    )
    arguments = parser.parse_args()
    write(pipeline_of(arguments.folder), arguments.out)
    if arguments.card is not None:
        (arguments.out / "README.md").write_text(card(arguments.folder, arguments.card), encoding="utf-8")


if __name__ == "__main__":
    main()
