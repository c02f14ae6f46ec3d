"""Tiny random models that look at pictures: BLIP, GIT, LLaVA and a classifier, real classes, saved in a folder."""

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


CHAT = (
    "{% for message in messages %}{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def llava(folder: Path, dtype: Any = None) -> Path:
    """A model that answers questions about pictures, as Qwen-VL and SmolVLM are asked: by a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(3)
    names = ["<unk>", "<pad>", "</s>", "<image>", "user", "assistant", "Describe", "picture", "sentence", *WORDS]
    words = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes, vocab_size=len(names), num_key_value_heads=2, bos_token_id=None, eos_token_id=2, pad_token_id=1
        ),
        image_token_index=3, vision_feature_layer=-1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    _sharpen(model)
    model.to(dtype or torch.float32).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokens, patch_size=8, vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
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
