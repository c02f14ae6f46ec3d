"""Tiny random models that look at pictures: BLIP, GIT and a classifier, real classes, saved in a folder."""

from pathlib import Path
from typing import Any

WORDS = ["a", "cat", "dog", "red", "blue", "house", "tree", "car", "on", "the", "of", "and", "with", "small", "big"]


def tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", "[DEC]", *WORDS]
    return BertTokenizer({name: at for at, name in enumerate(names)}, bos_token="[DEC]")


def blip(folder: Path) -> Path:
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    torch.manual_seed(0)
    words = tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": words.bos_token_id, "pad_token_id": 0,
        "sep_token_id": words.sep_token_id, "eos_token_id": words.sep_token_id, "max_position_embeddings": 64,
    }  # fmt: skip
    config = BlipConfig(text_config={**sizes, **text}, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    model = BlipForConditionalGeneration(config).eval()
    _sharpen(model)
    model.save_pretrained(folder)
    pixels = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(image_processor=pixels, tokenizer=words).save_pretrained(folder)
    return folder


def git(folder: Path) -> Path:
    import torch
    from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

    torch.manual_seed(1)
    words = tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GitConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8}, vocab_size=len(words), bos_token_id=2,
        eos_token_id=3, pad_token_id=0, max_position_embeddings=64, **sizes,
    )  # fmt: skip
    model = GitForCausalLM(config).eval()
    _sharpen(model)
    model.save_pretrained(folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(image_processor=pixels, tokenizer=words).save_pretrained(folder)
    return folder


def classifier(folder: Path, *, several: bool = True) -> Path:
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(2)
    labels = dict(enumerate(("1girl", "long_hair", "red_dress", "outdoors", "smile")))
    config = ViTConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        id2label=labels, label2id={name: at for at, name in labels.items()},
        problem_type="multi_label_classification" if several else "single_label_classification",
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _sharpen(model: Any) -> None:
    """Make weights so large that what is said depends on the picture."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(12.0)
