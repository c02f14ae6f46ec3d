"""The files of diffusers: modules by their path behind the pipeline's component, `unet.mid_block...to_q.lora_A.weight`.

Older files have `.lora.down.weight` for `.lora_A.weight`, and before that the attention's processor held the factors,
`attn1.processor.to_q_lora.down.weight`, with no component before it where only the UNet was trained.

There is no tensor for the alpha: it is in the header, in `lora_adapter_metadata`, as PEFT's configuration by component,
and without that the scale is 1. Other programs do not read that entry, so what is written here has every scale
multiplied into its B.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.adapters.patterns import exact_patterns
from haori.core.errors import FileFormatError, InputError
from haori.library.families import family_of
from haori.library.formats.bundled_words import EMBEDDINGS, is_bundled, read_embeddings, write_embeddings
from haori.library.formats.format import Source
from haori.library.formats.kohya_metadata import kohya_metadata
from haori.library.formats.peft_reading import CONFIG_KEY
from haori.library.formats.safetensors_writing import write_hashed, write_tensors
from haori.library.formats.scaling import scaled
from haori.library.formats.tensor_names import place_modules, read_modules, split_key
from haori.library.formats.transformer_places import DIFFUSERS_NAMES
from haori.library.formats.unet_names import canonical_clip, clip_module
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from haori.core.records import AdapterCard

__all__ = ["FORMAT"]

_METADATA = "lora_adapter_metadata"
_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_[234])?)\.")
# Other programs' names of modules of FLUX, also behind `transformer.`.
_NOT_OURS = re.compile(r"(transformer\.)?(double_blocks|single_blocks)\.")
# Files of one model, as its own save_lora_adapter and the old save_attn_procs write them, have no component.
_BARE_UNET = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding)(\.|$)"
)
_OLD = re.compile(r"(to_q|to_k|to_v|to_out|add_k_proj|add_v_proj)_lora\.(down|up)\.weight$")
_OLD_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_PROJECTION = re.compile(r"unet\..*\.attentions\.\d+\.proj_(in|out)$")
_CLIP_PREFIX = "text_model."
_OLD_ENDS = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")


class Diffusers:
    """The format, for all pipelines of diffusers."""

    name = "diffusers"
    title = "diffusers"

    def detect(self, source: Source) -> bool:
        """Say whether keys begin with a pipeline's component, or with the blocks of one."""
        found = {split[0] for key in source.tensors if (split := split_key(_respelled(key))) is not None}
        return any(_split(name) is not None for name in found) and not any(_NOT_OURS.match(name) for name in found)

    def read(self, source: Source) -> AdapterUpdates:
        """Read the file into the neutral form.

        Raises:
            FileFormatError: A key is of no component or method, or tensors do not fit together.
        """
        named = read_modules(source, _respelled)
        placed = place_modules(source, named.modules, _neutral_name)
        modules = _with_alphas(source, placed)
        metadata = {key: value for key, value in source.metadata.items() if key != EMBEDDINGS}
        updates = AdapterUpdates(modules, metadata, self.name, extra={**named.extra, **read_embeddings(source)})
        return replace(updates, family=family_of(updates))

    def write(
        self,
        updates: AdapterUpdates,
        path: Path,
        card: "AdapterCard | None" = None,
        *,
        base_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a safetensors file that pipelines load with `load_lora_weights`, every module at its right strength.

        New words go into files of their own beside it, for `load_textual_inversion`.

        Raises:
            InputError: The adapter is not all LoRA, or changes something else than a pipeline's components.
        """
        _check(updates)
        family = updates.family or family_of(updates)
        unusual = _encoders_without_attention(updates)
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, dict[str, int]] = {}
        for name, update in updates.modules.items():
            a, b = _plain_factors(name, update, family)
            component, _, module = name.partition(".")
            ends = _OLD_ENDS if component in unusual else ("lora_A.weight", "lora_B.weight")
            tensors |= {f"{name}.{end}": factor for end, factor in zip(ends, (a, b), strict=True)}
            ranks.setdefault(component, {})[module.removeprefix(_CLIP_PREFIX)] = len(a)
        described = {key: value for component in ranks for key, value in _config(component, ranks[component]).items()}
        own = {
            "format": "pt",
            _METADATA: json.dumps(described, sort_keys=True),
            **write_embeddings(path, updates.extra),
        }
        if card is not None:
            write_hashed(path, tensors, {**_described_by(card, updates, family, path.stem), **own})
            return
        silent = ("sshs_", "modelspec.", CONFIG_KEY)
        metadata = {key: value for key, value in updates.metadata.items() if not key.startswith(silent)}
        write_tensors(path, tensors, {**metadata, **own})


def _described_by(card: "AdapterCard", updates: AdapterUpdates, family: str | None, name: str) -> dict[str, str]:
    """Return what the card says, in the terms of sd-scripts and ModelSpec, but for the network: PEFT's words count."""
    found = kohya_metadata(updates, family, card, name)
    return {key: value for key, value in found.items() if not key.startswith("ss_network_")}


def _respelled(key: str) -> str:
    """Return the key of an attention's processor as one of its layers."""
    key = key.replace(".processor.", ".")
    if (found := _OLD.search(key)) is None:
        return key
    layer = found[1]
    if ".self_attn." in key:
        layer = _OLD_IN_TEXT.get(layer, layer)
    elif layer == "to_out":
        layer = "to_out.0"
    return f"{key[: found.start()]}{layer}.lora.{found[2]}.weight"


def _split(name: str) -> tuple[str, str] | None:
    """Return component and path of a module; None if no pipeline has one of that name."""
    if found := _COMPONENT.match(name):
        return found[1], name[found.end() :]
    if _BARE_UNET.match(name):
        return "unet", name
    is_known = any(names.place_of(name) is not None for names in DIFFUSERS_NAMES.values())
    return ("transformer", name) if is_known else None


def _neutral_name(module: str) -> str | None:
    if (split := _split(module)) is None:
        return None
    component, path = split
    return f"{component}.{canonical_clip(path) if component.startswith('text_encoder') else path}"


def _with_alphas(source: Source, modules: Mapping[str, ModuleUpdate]) -> dict[str, ModuleUpdate]:
    """Give each update the alpha that PEFT's configuration in the header names for it."""
    if _METADATA not in source.metadata:
        return dict(modules)
    try:
        described = json.loads(source.metadata[_METADATA])
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise FileFormatError(f"{str(source.path)!r} cannot be read: its {_METADATA} is no JSON object.")
    bare = "r" in described or "lora_alpha" in described
    found: dict[str, ModuleUpdate] = {}
    for name, update in modules.items():
        component, _, path = name.partition(".")
        prefix = "" if bare else f"{component}."
        alpha = _alpha(source, described, prefix, path)
        if alpha is None or update.alpha is not None or update.kind != "lora":
            found[name] = update
        else:
            found[name] = replace(update, alpha=alpha, rslora=bool(described.get(f"{prefix}use_rslora", False)))
    return found


def _alpha(source: Source, described: Mapping[str, Any], prefix: str, path: str) -> float | None:
    pattern = described.get(f"{prefix}alpha_pattern") or {}
    alpha = described.get(f"{prefix}lora_alpha")
    if not isinstance(pattern, dict):
        raise FileFormatError(f"{str(source.path)!r} cannot be read: its {prefix}alpha_pattern is no table.")
    for key, value in pattern.items():
        try:
            fits = re.fullmatch(rf"(.*\.)?({key})", path) or re.fullmatch(key, path.removeprefix(_CLIP_PREFIX))
        except re.error:
            raise FileFormatError(
                f"{str(source.path)!r} cannot be read: {str(key)[:80]!r} in its {prefix}alpha_pattern is no pattern."
            ) from None
        if fits:
            alpha = value
            break
    if alpha is None:
        return None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise FileFormatError(f"{str(source.path)!r} cannot be read: its header gives {path!r} the alpha {alpha!r}.")
    return float(alpha)


def _check(updates: AdapterUpdates) -> None:
    for name, update in updates.modules.items():
        if _COMPONENT.match(name) is None:
            raise InputError(
                f"The module {name!r} is in no component of a diffusers pipeline (unet, transformer, text_encoder, "
                "text_encoder_2, ...). Write this adapter as peft."
            )
        reason = None
        if update.magnitude is not None:
            reason = "diffusers loads DoRA's magnitudes wrongly or drops them"
        elif update.kind != "lora":
            kind = {"loha": "LoHa", "lokr": "LoKr", "diff": "a whole difference"}[update.kind]
            reason = f"pipelines of diffusers load LoRA, and this is {kind}"
        elif update.bias is not None:
            reason = "it changes a bias, which pipelines of diffusers do not load"
        if reason:
            raise InputError(
                f"{name} cannot be written for diffusers: {reason}. Make a LoRA of the adapter first with "
                "`haori resize`, or write it as kohya, which holds all of this."
            )
    if others := [key for key in updates.extra if not is_bundled(key)]:
        raise InputError(
            f"A diffusers file holds LoRA alone, and the adapter has the tensor {min(others)!r} besides; write it as "
            "kohya, or peft for a classifier."
        )


def _encoders_without_attention(updates: AdapterUpdates) -> set[str]:
    """Return the CLIP text encoders of which no attention layer is changed.

    Stock diffusers tells the spelling of an encoder's keys by those of its attention, and without one knows the old
    spelling alone.
    """
    encoders = {
        name.partition(".")[0]
        for name in updates.modules
        if name.startswith("text_encoder") and clip_module(name.partition(".")[2]) is not None
    }
    attending = {name.partition(".")[0] for name in updates.modules if ".self_attn." in name}
    return encoders - attending


def _plain_factors(name: str, update: ModuleUpdate, family: str | None) -> "tuple[Tensor, Tensor]":
    """Return A and B with B A = dW, in the shapes of the layer's own kind."""
    import torch

    a, b = update.factors["A"], update.factors["B"]
    if (core := update.factors.get("mid")) is not None:
        a = torch.einsum("ij...,jq->iq...", core.double(), a.double().flatten(1)).float()
    b = scaled(b, update.scale).reshape(*b.shape[:2], *[1] * (a.dim() - 2))  # a matrix in files of DyLoRA
    narrow = all(size == 1 for size in a.shape[2:])
    if narrow and _PROJECTION.match(name) and family in {"sd15", "sd2", "sdxl"}:
        # A 1 x 1 convolution in Stable Diffusion 1, a linear layer since; trainers write either as the other.
        shape = (1, 1) if family == "sd15" else ()
        a, b = a.reshape(*a.shape[:2], *shape), b.reshape(*b.shape[:2], *shape)
    return a.contiguous(), b.contiguous()


def _config(component: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return PEFT's configuration of one component, each module at the scale 1.

    Modules of CLIP are named without `text_model.`, which fits their names in all versions of transformers.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = exact_patterns({name: rank for name, rank in ranks.items() if rank != common}, ranks)
    config = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "bias": "none",
    }
    return {f"{component}.{key}": value for key, value in config.items()}


FORMAT = Diffusers()
