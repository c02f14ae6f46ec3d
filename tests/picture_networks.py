"""Networks for tests: one that sees the mean colours of a picture's four quarters, and a tiny random CLIP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from haori.metrics.picture_features import Seen


class Quarters:
    """Features [n, 12]: red, green and blue of each quarter, from 0 to 1."""

    name = "quarters"
    reads_text = False

    def see(self, pictures: Sequence[Any], texts: Sequence[str] | None = None) -> Seen:
        found = [np.asarray(one.convert("RGB").resize((2, 2), 4), float).ravel() / 255 for one in pictures]
        return Seen(np.array(found))


def tiny_clip(folder: Path) -> Path:
    """Save a random CLIPModel with its processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    from tests.diffusion_pipelines import clip_tokenizer

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(length=20)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**sizes, **text}, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    return folder
