"""The front matter of a model card: what the model hub reads of it, each field taken from the record.

Sources: the model card metadata specification of huggingface/hub-docs (modelcard.md), its list of licences, and its
page of LoRA adapters (`base_model_relation: adapter`, `instance_prompt`).
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from haori.core.records import MODEL_COMPONENT, AdapterCard, Evaluation
from haori.library.licences.attribution import public_name
from haori.library.licences.terms import UNKNOWN_LICENCE
from haori.library.licences.verdict import LicenceVerdict

__all__ = ["ATTRIBUTION_NAME", "base_on_hub", "card_fields", "is_image", "library_name"]

ATTRIBUTION_NAME = "ATTRIBUTION.md"
"""The file that the licence of a model card points to where the hub knows no name for it."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_LICENCES = {
    "LicenseRef-scancode-llama-2-license-2023": "llama2", "LicenseRef-scancode-llama-3.1-license-2024": "llama3.1",
    "LicenseRef-scancode-llama-3.2-license-2024": "llama3.2", "LicenseRef-llama3": "llama3",
    "LicenseRef-scancode-llama-3.3-license-2024": "llama3.3", "LicenseRef-scancode-llama-4-cla-2025": "llama4",
    "LicenseRef-scancode-gemma-tou-2024-04-01": "gemma", "LicenseRef-creativeml-openrail-m": "creativeml-openrail-m",
    "LicenseRef-scancode-bigscience-rail-1.0": "bigscience-bloom-rail-1.0", "LicenseRef-openrail": "openrail",
    "LicenseRef-scancode-bigscience-open-rail-m": "bigscience-openrail-m", "ODbL-1.0": "odbl", "ODC-By-1.0": "odc-by",
    "LicenseRef-scancode-bigcode-open-rail-m-v1": "bigcode-openrail-m", "PDDL-1.0": "pddl", "Unlicense": "unlicense",
    **{f"{name}-{end}": name.lower() for name in ("GPL-2.0", "GPL-3.0", "AGPL-3.0", "LGPL-2.1", "LGPL-3.0")
       for end in ("only", "or-later")},
    **{name: name.lower() for name in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "AFL-3.0", "Artistic-2.0", "BSL-1.0", "CC0-1.0",
        "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-2.0",
        "CC-BY-NC-3.0", "CC-BY-NC-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-3.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-2.0",
        "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0", "CDLA-Sharing-1.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0",
        "C-UDA-1.0", "WTFPL", "ECL-2.0", "EPL-1.0", "EPL-2.0", "etalab-2.0", "EUPL-1.1", "EUPL-1.2", "ISC", "MS-PL",
        "MPL-2.0", "OSL-3.0", "OFL-1.1", "NCSA", "Zlib", "PostgreSQL",
    )},
}  # fmt: skip
_PIPELINES = {"sequence_classification": "text-classification", "token_classification": "token-classification"}


def card_fields(name: str, card: AdapterCard, verdict: LicenceVerdict) -> dict[str, Any]:
    """Return the front matter of an adapter's model card, in the order in which it is written.

    Args:
        name: Its name in the library, with or without version.
        card: Its card.
        verdict: Its effective licence, as `public_verdict` gives it.
    """
    base = base_on_hub(card)
    results = [result for evaluation in card.evaluations if (result := _result(card, evaluation)) is not None]
    found: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "library_name": library_name(card),
        "pipeline_tag": _pipeline(card),
        **_licence(verdict),
        "datasets": _unique(data.source for data in card.data if _is_hub_data(data.source)),
        "metrics": _unique(metric for evaluation in card.evaluations for metric in evaluation.metrics),
        "instance_prompt": ", ".join(card.trigger_words) if is_image(card) else None,
        "tags": _unique((*card.tags, *_tags(card, base))),
        "model-index": [{"name": name.partition("@")[0], "results": results}] if results else None,
    }
    return {key: value for key, value in found.items() if value}


def is_image(card: AdapterCard) -> bool:
    """Say whether the adapter is for a pipeline that makes images."""
    return card.components != (MODEL_COMPONENT,)


def library_name(card: AdapterCard) -> str:
    """Return the library that loads the adapter."""
    return "diffusers" if is_image(card) else "peft"


def base_on_hub(card: AdapterCard) -> str | None:
    """Return the repository of the base: where it came from, what its author names, or else its name."""
    kind, _, place = card.base.source.partition(":")
    stated = (name for name in card.stated_bases if "/" in name and public_name(name) == name)
    named = public_name(card.base.name) if card.base.components else ""  # else it is the name of a family
    candidates = (place if kind == "hub" else "", *stated, named)
    return next((found for found in candidates if _REPOSITORY.fullmatch(found)), None)


def _pipeline(card: AdapterCard) -> str | None:
    if card.head is not None:
        return _PIPELINES[card.head.kind]
    if is_image(card):
        return "text-to-image"
    return "text-generation" if card.task in {"causal_lm", "preference"} else None


def _licence(verdict: LicenceVerdict) -> dict[str, str]:
    keys = {key for source in verdict.sources for key, _ in source.terms}
    if keys == {UNKNOWN_LICENCE}:
        return {"license": "unknown"}
    if len(keys) == 1 and (known := _HUB_LICENCES.get(next(iter(keys)))) is not None:
        return {"license": known}
    return {"license": "other", "license_name": verdict.expression, "license_link": ATTRIBUTION_NAME}


def _result(card: AdapterCard, evaluation: Evaluation) -> dict[str, Any] | None:
    """Return the result on one dataset; figures that are no number have no place there."""
    metrics = [
        {"type": name, "name": name.replace("_", " "), "value": metric.value}
        for name, metric in evaluation.metrics.items()
        if math.isfinite(metric.value)
    ]
    if not metrics:
        return None
    source = public_name(evaluation.data.source)
    dataset = {"type": source, "name": source, "revision": evaluation.data.hash}
    return {"task": {"type": _pipeline(card) or card.task}, "dataset": dataset, "metrics": metrics}


def _tags(card: AdapterCard, base: str | None) -> Iterable[str]:
    yield from ("lora" if "lora" in card.method else card.method, card.method_kind or card.method, "haori")
    if is_image(card):
        yield from (f"{library_name(card)}-lora", "text-to-image")
    if card.base.family:
        yield card.base.family
    if base:
        yield f"base_model:adapter:{base}"


def _is_hub_data(source: str) -> bool:
    name = source.removeprefix("hub:")
    plain = _REPOSITORY.fullmatch(name) and "/" in name and public_name(name) == name
    return bool(plain) and not Path(source).exists()


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value.removeprefix("hub:") for value in values))
