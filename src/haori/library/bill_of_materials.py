"""An adapter's lineage as a CycloneDX ML-BOM, a JSON document that supply-chain tools read.

The adapter is the described component, of type machine-learning-model: its files with hashes, licences, model card with
measurements, and as its pedigree the base and the adapters it was made from. Base, data and parents are components of
their own, joined by dependencies. No folder of this machine is named.

Source: CycloneDX 1.6 (ECMA-424), https://cyclonedx.org/docs/1.6/json.
"""

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.hashing import hash_data, hash_file, short
from haori.core.records import AdapterCard, BaseReference, DataReference, Evaluation, now
from haori.library.cards import CARD_NAME
from haori.library.licences.attribution import public_name, public_verdict
from haori.library.licences.sources import parse_licence
from haori.library.lineage import ancestors

if TYPE_CHECKING:
    from haori.library.store import StoredAdapter

__all__ = ["model_bom"]

_SPEC = "1.6"
_APPROACH = {"causal_lm": "supervised", "classification": "supervised", "preference": "supervised"}

Json = dict[str, Any]


def model_bom(stored: "StoredAdapter") -> str:
    """Return the ML-BOM of a stored adapter and of all that it was made from, as JSON text."""
    before = ancestors(stored)
    everything = {card.id: card for card in before}
    parts: dict[str, Json] = {}
    depends: dict[str, list[str]] = {}
    for card in (stored.card, *before):
        made_of = [(_base_ref(card.base), _base(card.base)), *((_data_ref(data), _data(data)) for data in card.data)]
        made_of += [
            (_ref(identity), _adapter(everything[identity]) if identity in everything else _lost(identity))
            for identity in card.parents
        ]
        for ref, component in made_of:
            parts.setdefault(ref, component)
        depends[_ref(card.id)] = list(dict.fromkeys(ref for ref, _ in made_of))
    parts.pop(_ref(stored.card.id), None)
    described = _adapter(stored.card, name=stored.name)
    described["components"] = list(_files(stored.path))
    described["properties"] += _verdict(stored.card, before)
    document = {
        "$schema": f"http://cyclonedx.org/schema/bom-{_SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": _SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": now(),
            "tools": {"components": [{"type": "application", "name": "haori", "version": version("haori")}]},
            "component": described,
        },
        "components": list(parts.values()),
        "dependencies": [{"ref": ref, "dependsOn": refs} for ref, refs in depends.items()]
        + [{"ref": ref} for ref in parts if ref not in depends],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _adapter(card: AdapterCard, name: str | None = None) -> Json:
    full = name or (card.names[-1] if card.names else short(card.id))
    bare, _, number = full.partition("@")
    found: Json = {
        "type": "machine-learning-model",
        "bom-ref": _ref(card.id),
        "name": bare,
        "version": number or short(card.id),
        "licenses": _licences(card.licence),
        "pedigree": {"ancestors": [_brief(_base(card.base)), *(_brief(_lost(parent)) for parent in card.parents)]},
        "modelCard": _model_card(card),
        "properties": list(_properties(card)),
    }
    if card.description:
        found["description"] = card.description
    if card.downloaded_from and re.match(r"https?://\S+$", card.downloaded_from):
        found["externalReferences"] = [{"type": "distribution", "url": card.downloaded_from}]
    if re.fullmatch(r"[0-9a-f]{64}", sha := card.file_hashes.get("sha256", "").removeprefix("sha256:").lower()):
        found["hashes"] = [{"alg": "SHA-256", "content": sha}]
    return _filled(found)


def _model_card(card: AdapterCard) -> Json:
    parameters = {
        "approach": {"type": _APPROACH[card.task]} if card.task in _APPROACH and card.origin == "trained" else None,
        "task": card.task,
        "architectureFamily": card.base.family,
        "modelArchitecture": ", ".join(sorted({of.architecture for of in card.base.components.values()})),
        "datasets": [{"ref": _data_ref(data)} for data in card.data],
    }
    metrics = [metric for evaluation in card.evaluations for metric in _metrics(evaluation)]
    return _filled({
        "modelParameters": _filled(parameters),
        "quantitativeAnalysis": {"performanceMetrics": metrics} if metrics else None,
    })  # fmt: skip


def _metrics(evaluation: Evaluation) -> Iterator[Json]:
    for name, metric in evaluation.metrics.items():
        found: Json = {"type": name, "value": repr(metric.value), "slice": public_name(evaluation.data.source)}
        if metric.low is not None and metric.high is not None:
            found["confidenceInterval"] = {"lowerBound": repr(metric.low), "upperBound": repr(metric.high)}
        yield found


def _properties(card: AdapterCard) -> Iterator[Json]:
    facts: dict[str, Any] = {
        "id": card.id, "origin": card.origin, "created": card.created, "method": card.method_kind or card.method,
        "rank": card.rank, "alpha": card.alpha, "target-modules": " ".join(card.target_modules), "seed": card.seed,
        "format": card.format, "components": " ".join(card.components), "names": " ".join(card.names),
        "trigger-words": ", ".join(card.trigger_words), "template": card.template_hash,
    }  # fmt: skip
    if card.recipe_data is not None:
        facts["recipe"] = hash_data(card.recipe_data)
    if card.run is not None:
        facts |= {"run:started": card.run.started, "run:steps": card.run.steps, "run:seconds": card.run.seconds}
    if (made := card.combination) is not None:
        of = " + ".join(f"{weight:g} {short(identity)}" for identity, weight in made.weights.items())
        facts |= {"combination": f"{made.kind} {made.method}", "combination:of": of or public_name(made.tuned or "")}
        facts["combination:energy-kept"] = repr(made.energy)
    if card.verification is not None:
        facts["proof"] = f"{'passed' if card.verification.passed else 'failed'} {card.verification.time}"
    facts |= {f"made-with:{name}": number for name, number in card.versions.items()}
    yield from (_property(name, value) for name, value in facts.items() if value not in (None, ""))


def _verdict(card: AdapterCard, before: Sequence[AdapterCard]) -> list[Json]:
    verdict = public_verdict(card, before)
    answers = {"commercial-use": verdict.commercial, "redistribution": verdict.redistribution, "credit": verdict.credit}
    found = [_property(f"licence:{name}", answer) for name, answer in answers.items()]
    found += [_property("licence:effective", verdict.expression)]
    return found + [_property("licence:condition", said) for said in (*verdict.conflicts, *verdict.conditions)]


def _base(base: BaseReference) -> Json:
    kind, _, place = base.source.partition(":")
    facts: dict[str, str | None] = {f"fingerprint:{name}:{part}": value for name, of in base.components.items()
             for part, value in (("structure", of.structure), ("weights", of.weights))}  # fmt: skip
    facts |= {"family": base.family, "quantization": base.quantization}
    found: Json = {
        "type": "machine-learning-model",
        "bom-ref": _base_ref(base),
        "name": public_name(base.name),
        "version": base.revision or base.id,
        "licenses": _licences(base.licence),
        "properties": [_property(name, value) for name, value in facts.items() if value],
    }
    if kind == "hub" and re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        found["purl"] = f"pkg:huggingface/{place}" + (f"@{base.revision.lower()}" if base.revision else "")
        found["externalReferences"] = [{"type": "distribution", "url": f"https://huggingface.co/{place}"}]
    return _filled(found)


def _data(data: DataReference) -> Json:
    rows = [_property(f"rows:{split}", count) for split, count in data.rows.items()]
    found: Json = {
        "type": "data",
        "bom-ref": _data_ref(data),
        "name": public_name(data.source),
        "licenses": _licences(data.licence),
        "data": [{"type": "dataset", "name": public_name(data.source)}],
        "properties": [_property("content", data.hash), _property("format", data.format), *rows],
    }
    if data.attribution:
        found["authors"] = [{"name": data.attribution}]
    return _filled(found)


def _lost(identity: str) -> Json:
    return {"type": "machine-learning-model", "bom-ref": _ref(identity), "name": short(identity)}


def _brief(component: Json) -> Json:
    """Return a component as a pedigree names it: without the reference, which may occur once only."""
    return {key: component[key] for key in ("type", "name", "version", "purl", "licenses") if key in component}


def _files(folder: Path) -> Iterator[Json]:
    """Yield the files of an adapter; one in a mounted tree is a single file."""
    for path in [folder] if folder.is_file() else sorted(folder.iterdir()):
        if path.is_file() and path.name != CARD_NAME and not path.name.startswith("."):
            digest = hash_file(path).removeprefix("sha256:")
            yield {"type": "file", "name": path.name, "hashes": [{"alg": "SHA-256", "content": digest}]}


def _licences(licence: str | None) -> list[Json]:
    return [] if licence is None else [{"expression": parse_licence(licence).render()}]


def _property(name: str, value: Any) -> Json:
    return {"name": f"haori:{name}", "value": str(value)}


def _ref(identity: str) -> str:
    return f"adapter:{identity}"


def _base_ref(base: BaseReference) -> str:
    return f"base:{hash_data([base.name, base.id, base.revision])}"


def _data_ref(data: DataReference) -> str:
    return f"data:{hash_data([public_name(data.source), data.hash])}"


def _filled(found: Json) -> Json:
    return {key: value for key, value in found.items() if value not in (None, "", [], {})}
