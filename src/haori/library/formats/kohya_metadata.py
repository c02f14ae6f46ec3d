"""The header metadata of files in kohya's format: sd-scripts' `ss_*` and Stability's ModelSpec 1.0.1.

What a file said of its training goes on as it was; what describes the network is written anew from its tensors. The
hashes are filled in by `write_hashed`, since they are of the bytes that are written.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from haori.library.families import stated_family
from haori.library.formats.peft_reading import CONFIG_KEY
from haori.library.formats.training_metadata import training_metadata, usage_hint
from haori.library.update_shapes import weight_shape
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from haori.core.records import AdapterCard

__all__ = ["kohya_metadata"]

_BASE_VERSIONS = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux1": "flux1"}
_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "flux1": "flux-1-dev",
}
# `get_model_version_str_for_sd1_sd2` of sd-scripts ends the version of a base that predicts velocity so.
_VELOCITY = "_v"
_WITH_VELOCITY = ("sd15", "sd2")
_DIFFUSING = ("sd15", "sd2", "sdxl")
_PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}  # ModelSpec 1.0.1 has no word for the others
_DIFFUSERS = "diffusers"
# As `get_sai_model_spec` of sd-scripts has it for LoRA.
_IMPLEMENTATIONS = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "flux1": "https://github.com/black-forest-labs/flux",
}
_NETWORK_MODULES = {"flux1": "networks.lora_flux"}
_OURS = (
    CONFIG_KEY,
    "lora_adapter_metadata",
    "format",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
_VARIES = "Dynamic"  # as `resize_lora.py` of sd-scripts writes it


def kohya_metadata(
    updates: AdapterUpdates, family: str | None, card: "AdapterCard | None", name: str
) -> dict[str, str]:
    """Return the header's strings, without hashes.

    Args:
        updates: What is written.
        family: Family of its base. ModelSpec demands an architecture, so it is left out where the family is unknown.
        card: What is known of the adapter.
        name: What the file is called.
    """
    found = {key: value for key, value in updates.metadata.items() if key not in _OURS}
    if card is not None:
        found = {**card.file_metadata, **found, **training_metadata(card)}
        found = {key: value for key, value in found.items() if key not in _OURS}
    found["ss_output_name"] = name
    found |= _of_network(updates, family)
    prediction = _prediction(found, family, card)
    if family in _BASE_VERSIONS and stated_family(_only(found, "ss_base_model_version")) != family:
        velocity = _VELOCITY if prediction == "v" and family in _WITH_VELOCITY else ""
        found["ss_base_model_version"] = f"{_BASE_VERSIONS[family]}{velocity}"
    found["ss_v2"] = str(family == "sd2")
    found = {key: value for key, value in found.items() if key != "modelspec.hash_sha256"}
    found.pop("modelspec.prediction_type", None)
    return {**found, **_model_spec(found, family, prediction, card, name)}


def _prediction(known: Mapping[str, str], family: str | None, card: "AdapterCard | None") -> str | None:
    """Return ModelSpec's word for what the base predicts; None for flow matching, and where nothing tells it."""
    if family not in _DIFFUSING:
        return None
    if card is not None and card.base.prediction is not None:
        return _PREDICTION_TYPES.get(card.base.prediction)
    if known.get("ss_base_model_version", "").endswith(_VELOCITY):
        return "v"
    return known.get("modelspec.prediction_type")


def _of_network(updates: AdapterUpdates, family: str | None) -> dict[str, str]:
    """Describe rank and alpha: of linear layers and 1 x 1 convolutions, and in the arguments of others."""
    modules = updates.modules.values()
    lycoris = any(
        update.kind != "lora" or "mid" in update.factors or update.magnitude is not None for update in modules
    )
    flat = [update for update in modules if not _has_kernel(update)]
    wide = [update for update in modules if _has_kernel(update)]
    arguments: dict[str, str] = {}
    if lycoris:
        kinds = {update.kind for update in modules if update.kind != "diff"}
        names = {"lora": "locon", "loha": "loha", "lokr": "lokr"}
        arguments["algo"] = names[next(iter(kinds))] if len(kinds) == 1 else ("full" if not kinds else "locon")
    if any(update.magnitude is not None for update in modules):
        arguments["dora_wd"] = "True"
    if wide and (rank := _common(wide, _rank_of)):
        arguments |= {"conv_dim": rank, "conv_alpha": _common(wide, _alpha_of)}
    found = {
        "ss_network_module": "lycoris.kohya" if lycoris else _NETWORK_MODULES.get(family or "", "networks.lora"),
        "ss_network_dim": _common(flat or wide, _rank_of),
        "ss_network_alpha": _common(flat or wide, _alpha_of),
        "ss_network_args": json.dumps(arguments) if arguments else "",
    }
    return {key: value for key, value in found.items() if value}


def _has_kernel(update: ModuleUpdate) -> bool:
    return any(size > 1 for size in (weight_shape(update) or ())[2:])


def _rank_of(update: ModuleUpdate) -> float | None:
    return update.rank


def _alpha_of(update: ModuleUpdate) -> float | None:
    return None if update.rank is None else round(update.scale * update.rank, 6)


def _common(updates: Iterable[ModuleUpdate], value_of: Callable[[ModuleUpdate], float | None]) -> str:
    values = {value for update in updates if (value := value_of(update)) is not None}
    if len(values) > 1:
        return _VARIES
    return str(next(iter(values))) if values else ""


def _model_spec(
    known: Mapping[str, str], family: str | None, prediction: str | None, card: "AdapterCard | None", name: str
) -> dict[str, str]:
    if family not in _ARCHITECTURES:
        return {}
    architecture = _ARCHITECTURES[family]
    if family == "sd2" and prediction == "v":
        architecture = "stable-diffusion-v2-768-v"
    if family == "flux1" and "schnell" in known.get("ss_sd_model_name", "").lower():
        architecture = "flux-1-schnell"
    found: dict[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora",
        "implementation": _IMPLEMENTATIONS.get(family, _DIFFUSERS),
        "title": known.get("modelspec.title") or name,
        "date": known.get("modelspec.date") or (card.created if card else datetime.now(UTC).isoformat("T", "seconds")),
    }
    if prediction is not None:
        found["prediction_type"] = prediction
    if resolution := _resolution(known.get("ss_resolution", "")):
        found["resolution"] = resolution
    if card is not None:
        found |= {
            "description": card.description,
            "license": card.licence,
            "tags": ", ".join(card.tags),
            "trigger_phrase": ", ".join(card.trigger_words),
            "usage_hint": usage_hint(card),
            "merged_from": ", ".join(card.parents) if len(card.parents) > 1 else None,
        }
    return {f"modelspec.{key}": value for key, value in found.items() if value}


def _resolution(text: str) -> str | None:
    """Return `512x768` for sd-scripts' `(512, 768)`, `512,768` or `512`."""
    sizes = re.findall(r"\d+", text)
    return f"{sizes[0]}x{sizes[-1]}" if sizes else None


def _only(found: Mapping[str, str], key: str) -> dict[str, str]:
    return {key: found[key]} if key in found else {}
