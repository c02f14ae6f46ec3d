"""Classifiers that stock PEFT saved for tiny encoders, with their labels beside them, and what they answer alone."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.encoder_models import TEXTS

__all__ = ["SAVED", "TARGETS", "stock_classifier", "stock_logits", "whole_classifier", "write_head"]

TARGETS: dict[str, Any] = {
    "bert": ["query", "value", "dense"], "bert_without_pooler": ["query", "intermediate.dense"],
    "roberta": ["query", "value", "dense"], "distilbert": ["q_lin", "lin2"], "deberta": ["query_proj", "value_proj"],
    "modernbert": "all-linear",
}  # fmt: skip
"""What an adapter of each architecture changes; for BERT also the base's pooler, for ModernBERT also its head."""

SAVED: dict[str, list[str]] = {"bert_without_pooler": ["classifier", "pooler"], "deberta": ["classifier", "pooler"]}


def write_head(folder: Path, labels: int, *, multi_label: bool = False, kind: str = "sequence_classification") -> None:
    """Write the labels `label 0`, `label 1` and so on."""
    head = {"kind": kind, "labels": [f"label {number}" for number in range(labels)], "multi_label": multi_label}
    (folder / "head.json").write_text(json.dumps(head), encoding="utf-8")


def whole_classifier(base: Path, labels: int) -> Any:
    """Load a base as transformers' classifier; what its files lack is drawn at random, the same each time."""
    torch.manual_seed(labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=labels, ignore_mismatched_sizes=True
        ).eval()


def stock_classifier(
    base: Path, folder: Path, *, labels: int = 3, seed: int = 1, multi_label: bool = False, **options: Any
) -> Path:
    """Save a classifier made with stock PEFT, its trained values moved as training would."""
    config = AdaLoraConfig if options.pop("peft", "LORA") == "ADALORA" else LoraConfig
    ranks = {"init_r": 4, "total_step": 10} if config is AdaLoraConfig else {"r": 4}
    settings = {**ranks, "lora_alpha": 8, "task_type": "SEQ_CLS", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(whole_classifier(base, labels), config(**settings)).eval()
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=draw) * 0.2
        model.save_pretrained(folder)
    write_head(folder, labels, multi_label=multi_label)
    return folder


@torch.no_grad()
def stock_logits(base: Path, folder: Path | None, labels: int, texts: Any = TEXTS) -> torch.Tensor:
    """Return what transformers and PEFT give for texts one by one, without padding."""
    model = whole_classifier(base, labels)
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")
        found.append(model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits[0])
    return torch.stack(found)
