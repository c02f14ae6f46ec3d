"""A tiny BERT with a WordPiece tokenizer, and adapters that stock PEFT saved for it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "tree",
    "quickly",
    "red",
    "small",
    "large",
    "bird",
    "sings",
    "and",
    "then",
    "sleeps",
    "here",
]
TEXTS = (
    "the cat sat on the mat",
    "a dog",
    "the small red bird sings and then the large dog ran under the tree quickly and sleeps here",
    "cat",
)
ALL = ["query", "key", "value", "dense"]


def build_tiny_encoder(folder: Path, *, seed: int = 0, pooling: str | None = "mean_tokens", longest: int = 40) -> Path:
    """Write a BERT of 2 layers, D 32, in sentence-transformers' layout, or in transformers' own (`pooling` None)."""
    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "words.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(str(folder / "words.txt"), model_max_length=64)
    (folder / "words.txt").unlink()
    torch.manual_seed(seed)
    model = BertModel(BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    ))  # fmt: skip
    for parameter in model.parameters():  # zeros and ones would hide a mistake
        parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if pooling is not None:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
        (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return folder


def stock_encoder(base: Path, folder: Path, *, seed: int = 1, scale: float = 0.2, **options: Any) -> Path:
    """Save an adapter made with stock PEFT, its trained values moved as training would."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "FEATURE_EXTRACTION", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(**settings)).eval()
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape, generator=draw) * scale
        model.save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path) -> Any:
    """Load base and adapter with transformers and PEFT alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()


@torch.no_grad()
def stock_vectors(base: Path, model: Any, texts: Any = TEXTS, *, pooling: str = "mean") -> torch.Tensor:
    """Return what transformers gives for texts one by one, without padding: pooled, and of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = []
    for text in texts:
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]  # T D
        found.append(states.mean(0) if pooling == "mean" else states[0])
    return functional.normalize(torch.stack(found), dim=1)
