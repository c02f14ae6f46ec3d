"""What a mounted file is, from its header and its sidecars alone: format, kind of base, rank, trigger words, hashes.

No tensor is read, so that a tree of thousands of large files is listed in seconds; using one reads it all.
"""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from haori.core.errors import FileFormatError
from haori.core.records import AdapterCard, BaseReference
from haori.core.safetensors_header import TensorEntry
from haori.library.families import FAMILY_TITLES, stated_family
from haori.library.formats.format import Source, open_source
from haori.library.formats.registry import format_of
from haori.library.mounts.sidecars import Sidecars, read_sidecars

__all__ = ["UNKNOWN", "Described", "describe"]

UNKNOWN = "unknown"
_PICKLES = (".pt", ".ckpt")
# Ends of the first factor, whose first dimension is the rank.
_FIRST_FACTORS = re.compile(r"\.(lora_down|lora_A|lora\.down|lora_linear_layer\.down)\.?.*weight$|\.lora_a$")
_LOHA_FACTOR = re.compile(r"\.hada_w1_b$")
_METHODS = (("dora", "dora_scale"), ("dora", "lora_magnitude_vector"), ("loha", ".hada_w1"), ("lokr", ".lokr_w"))
_COMPONENTS = (
    ("transformer", re.compile(r"(lora_)?transformer[._]|diffusion_model\.|(lora_unet_)?(double|single)_blocks")),
    ("unet", re.compile(r"lora_unet_|unet\.|lycoris_")),
    ("text_encoder_2", re.compile(r"lora_te2_|text_encoder_2\.")),
    ("text_encoder", re.compile(r"lora_te1?_|text_encoder\.")),
)  # fmt: skip
_CONTEXT = re.compile(r"attn2[._]to_[kv]\.(lora_down|lora_A|lora\.down)")
# Of transformers whose files say nothing in their header; what is added to the library is told by its shapes, too.
_NAMES = (
    ("flux2", re.compile(r"to_qkv_mlp_proj|stream_modulation|ff(_context)?[._]linear_(in|out)")),
    ("flux1", re.compile(r"(single_transformer|double|single)_blocks[._]")),
    ("qwen_image", re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]")),
    ("z_image", re.compile(r"(context|noise)_refiner[._]|layers[._]\d+[._](adaLN|attention[._]to_)")),
)
_CONTEXT_WIDTHS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
_BASES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")


class Described(NamedTuple):
    """What a file is.

    Attributes:
        card: Its card, with an empty id: the id is the hash of a content that was not read.
        sidecars: What stands beside it.
        alias: The name its trainer gave it (`ss_output_name`), which prompts may use too.
        hashes: Hashes that its header and sidecars state.
    """

    card: AdapterCard
    sidecars: Sidecars
    alias: str
    hashes: tuple[str, ...]


def describe(path: Path, sidecars: tuple[str, ...]) -> Described:
    """Describe a file of a mounted tree.

    Args:
        path: The file.
        sidecars: Names of its sidecars, in the same folder.

    Raises:
        FileFormatError: It is damaged, a pickle, or no adapter.
        OSError: It cannot be read.
    """
    if path.suffix.lower() in _PICKLES:
        raise FileFormatError(
            f"{path.name!r} is a pickle, which can run code, so it is not read; convert it to safetensors."
        )
    source = open_source(path)
    found = format_of(source)
    said = read_sidecars(path.parent, sidecars)
    return Described(
        _card(path, source, found.name, said),
        said,
        _line(source.metadata.get("ss_output_name", "")),
        _stated_hashes(source.metadata, said),
    )


def _card(path: Path, source: Source, format_name: str, said: Sidecars) -> AdapterCard:
    tensors, metadata = source.tensors, source.metadata
    stat = path.stat()
    family = _family(tensors, metadata)
    stated = tuple(dict.fromkeys(text for text in (said.base, *(metadata.get(key, "") for key in _BASES)) if text))
    ranks = [rank for key, entry in tensors.items() if (rank := _rank(key, entry)) is not None]
    return AdapterCard(
        id="",
        origin="added",
        created=datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds"),
        base=BaseReference(
            name=FAMILY_TITLES.get(family or "", _line(stated[0]) if stated else UNKNOWN),
            source=UNKNOWN,
            components={},
            family=family or UNKNOWN,
        ),
        components=_components(tensors),
        task="image" if source.tensors and family else UNKNOWN,
        method=next((method for method, part in _METHODS if any(part in key for key in tensors)), "lora"),
        rank=max(ranks, default=None),
        trainable_parameters=sum(math.prod(entry.shape) for entry in tensors.values()),
        size_bytes=stat.st_size,
        licence=_line(metadata.get("modelspec.license", "")) or None,
        description=said.description or _line(metadata.get("modelspec.description", "")) or None,
        tags=tuple(dict.fromkeys((*said.tags, *_parts(metadata.get("modelspec.tags", ""))))),
        stated_bases=stated,
        format=format_name,
        trigger_words=tuple(
            dict.fromkeys((*said.trigger_words, *_parts(metadata.get("modelspec.trigger_phrase", ""))))
        ),
        downloaded_from=said.source,
        permissions=said.permissions,
    )


def _family(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> str | None:
    """Tell the kind of base: the width of the text that a UNet attends to, else names, else what the header says."""
    for key, entry in tensors.items():
        if _CONTEXT.search(key) and len(entry.shape) > 1 and entry.shape[1] in _CONTEXT_WIDTHS:
            return _CONTEXT_WIDTHS[entry.shape[1]]
    if any(key.startswith(("lora_te2_", "text_encoder_2.text_model", "lora_unet_input_blocks")) for key in tensors):
        return "sdxl"
    likely = (family for family, name in _NAMES if any(name.search(key) for key in tensors))
    return stated_family(metadata) or next(likely, None)


def _rank(key: str, entry: TensorEntry) -> int | None:
    fits = _FIRST_FACTORS.search(key) or _LOHA_FACTOR.search(key)
    return entry.shape[0] if fits and entry.shape else None


def _components(tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    found = {next((name for name, start in _COMPONENTS if start.match(key)), "model") for key in tensors}
    return tuple(sorted(found)) or ("model",)


def _stated_hashes(metadata: Mapping[str, str], said: Sidecars) -> tuple[str, ...]:
    in_header = (metadata.get(key, "") for key in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"))
    digits = [text.removeprefix("0x").lower() for text in (*in_header, *said.hashes.values())]
    return tuple(dict.fromkeys(text for text in digits if re.fullmatch(r"[0-9a-f]{8,64}", text)))


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part for piece in text[:4000].split(",") if (part := _line(piece)))


def _line(text: str) -> str:
    return " ".join(text[:4000].split())
