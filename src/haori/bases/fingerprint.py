"""Identifies a model folder by content: structure, weights, tokenizer and chat template.

What does not change the model does not change its fingerprint: README, file names, the transformers version that
saved it, formatting of JSON.
"""

from pathlib import Path
from typing import Any

from haori.bases.folder import ModelFolder, read_json
from haori.core.hashing import hash_data, hash_file, hash_parts
from haori.core.records import Fingerprint

__all__ = ["chat_template_of", "fingerprint_folder"]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_SLOW_FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def fingerprint_folder(folder: ModelFolder, *, tokenizer: Path | None = None) -> Fingerprint:
    """Return the fingerprint of a model folder; hashes of large files come from the cache.

    Args:
        folder: The model.
        tokenizer: Folder of its tokenizer; by default that of the model.
    """
    shapes = sorted([name, *shape] for name, shape in folder.tensors.items())
    beside = tokenizer or folder.path
    template = chat_template_of(beside)
    return Fingerprint(
        architecture=folder.architecture,
        structure=hash_data([folder.architecture, shapes]),
        weights=hash_data(sorted(hash_file(file) for file in folder.weight_files)),
        tokenizer=_tokenizer_hash(beside),
        chat_template=None if template is None else hash_parts([template]),
    )


def chat_template_of(path: Path) -> str | None:
    """Return the default chat template of a model folder, found where transformers looks for it."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    template = _optional_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _tokenizer_hash(path: Path) -> str | None:
    """Hash vocabulary, merges, rules, added and special tokens; None where there is no tokenizer."""
    special = _special_tokens(path)
    if (path / "tokenizer.json").is_file():
        document = read_json(path / "tokenizer.json")
        model = document.get("model")
        return hash_data(
            {
                "model": _model(model if isinstance(model, dict) else {}),
                "rules": [document.get(rule) for rule in _RULES],
                "added": [_without_defaults(token) for token in document.get("added_tokens") or []],
                "special": special,
            }
        )
    files = [path / name for name in _SLOW_FILES if (path / name).is_file()]
    return hash_data([[hash_file(file) for file in files], special]) if files else None


def _model(model: dict[str, Any]) -> dict[str, Any]:
    """Write merges one way: older files hold `"a b"`, newer ones `["a", "b"]`."""
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or []]
    return {**_without_defaults(model), "merges": merges}


def _without_defaults(table: Any) -> Any:
    """Drop false and empty values, which some versions write and others leave out; token id 0 stays."""
    if not isinstance(table, dict):
        return table
    return {key: value for key, value in table.items() if value not in (None, False, "", []) or key == "id"}


def _special_tokens(path: Path) -> dict[str, str]:
    found = {}
    tables = [_optional_json(path / name) for name in ("special_tokens_map.json", "tokenizer_config.json")]
    for table in tables:
        for key in _SPECIAL:
            value = table.get(key)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[key] = content
    return found


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
