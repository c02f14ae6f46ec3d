"""Tiny models of the architectures that classify, each with a real tokenizer."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conftest import build_tiny_base
from tests.encoder_models import build_tiny_encoder

__all__ = [
    "ARCHITECTURES",
    "DECODERS",
    "ENCODERS",
    "build_classifier_base",
    "scores",
    "stock_classifier",
    "stock_scores",
]

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_WORDS = {"vocab_size": 25, "max_position_embeddings": 66, "pad_token_id": 0}
_PIECES = {"vocab_size": 403, "max_position_embeddings": 64}


def _roberta() -> Any:
    return transformers.RobertaModel(transformers.RobertaConfig(**_SIZES, **_WORDS))


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=25, max_position_embeddings=66
    )
    return transformers.DistilBertForMaskedLM(config)


def _deberta() -> Any:
    relative = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": True,
    }
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**_SIZES, **_WORDS, **relative))


def _modernbert() -> Any:
    layers = {"global_attn_every_n_layers": 2, "local_attention": 16}
    special = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**_SIZES, **_WORDS, **layers, **special))


def _bert_without_pooler() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, **_WORDS))


def _gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=403, **sizes))


def _qwen() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, **_PIECES, num_key_value_heads=2))


ENCODERS: dict[str, Callable[[], Any] | None] = {
    "bert": None, "bert_without_pooler": _bert_without_pooler, "roberta": _roberta, "distilbert": _distilbert,
    "deberta": _deberta, "modernbert": _modernbert,
}  # fmt: skip
DECODERS: dict[str, Callable[[], Any] | None] = {"llama": None, "gpt2": _gpt2, "qwen": _qwen}
ARCHITECTURES = ENCODERS | DECODERS


def build_classifier_base(name: str, folder: Path) -> Path:
    """Write a tiny base without a head, whose values are all different from zero and one."""
    whole = folder if ARCHITECTURES[name] is None else folder.with_name(f"{folder.name}-words")
    if name in ENCODERS:
        build_tiny_encoder(whole, pooling=None)
    else:
        build_tiny_base(whole)
    build = ARCHITECTURES[name]
    if build is None:
        return folder
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (whole / file).is_file():
            shutil.copyfile(whole / file, folder / file)
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def stock_classifier(
    base: Path, folder: Path, *, labels: int = 3, seed: int = 1, scale: float = 0.1, **options: Any
) -> Path:
    """Save a classifier made with stock PEFT, its trained values moved as training would."""
    import warnings

    from peft import LoraConfig, get_peft_model

    of_tokens = options.get("task_type") == "TOKEN_CLS"
    kind = (
        transformers.AutoModelForTokenClassification if of_tokens else transformers.AutoModelForSequenceClassification
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = kind.from_pretrained(base, num_labels=labels)
        linear = [
            name
            for name, module in plain.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split("."))
        ]
        given = {"r": 4, "lora_alpha": 8, "target_modules": linear, "task_type": "SEQ_CLS", **options}
        model = get_peft_model(plain, LoraConfig(**given)).eval()
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=draw) * scale
        model.save_pretrained(folder)
    return folder


def stock_scores(base: Path, folder: Path, rows: list[list[int]], *, labels: int = 3, of_tokens: bool = False) -> Any:
    """Load base and adapter with transformers and PEFT alone, and return the logits of each row."""
    import warnings

    from peft import PeftModel

    kind = (
        transformers.AutoModelForTokenClassification if of_tokens else transformers.AutoModelForSequenceClassification
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(kind.from_pretrained(base, num_labels=labels), folder).eval()
    return scores(model, rows)


@torch.no_grad()
def scores(model: Any, rows: list[list[int]]) -> Any:
    found = [model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=int)) for row in rows]
    return torch.cat([output.logits.float().reshape(-1, output.logits.shape[-1]) for output in found])
