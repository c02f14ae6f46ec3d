"""The ML-BOM: valid by CycloneDX's strict schema, and true to the cards and files."""

import hashlib
import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from haori.core.records import BaseReference, DataReference, Evaluation, Fingerprint, Metric, Permissions
from haori.library import Library
from tests.command_line import haori
from tests.library_samples import card_of, written_adapter


def data(source: str, licence: str | None = None, attribution: str | None = None) -> DataReference:
    digest = "sha256:" + hashlib.sha256(source.encode()).hexdigest()
    return DataReference(source=source, hash=digest, format="messages", rows={"train": 7, "validation": 1},
                         licence=licence, attribution=attribution)  # fmt: skip


BASE = BaseReference(
    name="org/model", source="hub:org/model", revision="0123ABC", licence="llama3.1", family="llama",
    components={"model": Fingerprint(architecture="LlamaForCausalLM", structure="s", weights="w")},
)  # fmt: skip


@pytest.fixture
def library(tmp_path, haori_home):
    kept, parents = Library(), ()
    evaluation = Evaluation(
        data=data("/home/me/test.jsonl"), time="2026-01-01T00:00:00+00:00",
        metrics={"accuracy": Metric(value=0.875, low=0.75, high=1.0), "loss": Metric(value=float("inf"))},
    )  # fmt: skip
    permissions = Permissions(no_credit=False, commercial_use=("Image",), derivatives=True, different_licence=False)
    fields = {
        "grand": {"data": (data("/home/me/grand.jsonl", "CC-BY-NC-4.0", "Ada"),), "permissions": permissions,
                  "downloaded_from": "https://example.org/x.safetensors", "file_hashes": {"sha256": "A" * 64}},
        "parent": {"data": (data("hub:org/set", "CC-BY-4.0 OR MIT"), data("no licence"))},
        "child": {"evaluations": (evaluation,), "description": 'Says "ja"', "trigger_words": ("ohwx dog",), "seed": 7},
    }  # fmt: skip
    for seed, (name, given) in enumerate(fields.items()):
        folder = written_adapter(tmp_path / name, seed=seed)
        stored = kept.add(folder, name, card_of(folder, BASE, parents=parents, **given))
        parents = (stored.card.id,)
    return kept


def problem(text: str):
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def written(capsys, name: str, path) -> dict:
    done = haori(capsys, "library", "lineage", name, "--bom", path)
    assert done.code == 0, done.err
    text = path.read_text()
    assert problem(text) is None, problem(text)
    return json.loads(text)


def test_every_generation_is_in_a_valid_document(capsys, library, tmp_path):
    bom = written(capsys, "child", tmp_path / "bom.json")
    described = bom["metadata"]["component"]
    assert (described["type"], described["name"], described["version"]) == ("machine-learning-model", "child", "1")
    names = {(part["type"], part["name"]) for part in bom["components"]}
    assert names == {
        ("machine-learning-model", "org/model"), ("machine-learning-model", "parent"),
        ("machine-learning-model", "grand"), ("data", "grand.jsonl"), ("data", "org/set"), ("data", "no licence"),
    }  # fmt: skip
    assert "/home/me" not in json.dumps(bom)
    assert described["pedigree"]["ancestors"][0]["name"] == "org/model"


def test_references_are_unique_and_lead_somewhere(capsys, library, tmp_path):
    bom = written(capsys, "child", tmp_path / "bom.json")
    refs = [part["bom-ref"] for part in (bom["metadata"]["component"], *bom["components"])]
    assert len(set(refs)) == len(refs)
    graph = {entry["ref"]: entry.get("dependsOn", []) for entry in bom["dependencies"]}
    assert set(graph) == set(refs)
    assert {ref for refs in graph.values() for ref in refs} <= set(refs)
    of = {part["bom-ref"]: part["name"] for part in (bom["metadata"]["component"], *bom["components"])}
    edges = {(of[ref], of[other]) for ref, others in graph.items() for other in others}
    assert edges == {
        ("child", "org/model"), ("child", "parent"), ("parent", "org/model"), ("parent", "grand"),
        ("parent", "org/set"), ("parent", "no licence"), ("grand", "org/model"), ("grand", "grand.jsonl"),
    }  # fmt: skip


def test_what_it_says_is_what_the_files_and_cards_say(capsys, library, tmp_path):
    bom = written(capsys, "child", tmp_path / "bom.json")
    described = bom["metadata"]["component"]
    stored = library.get("child")
    files = {file["name"]: file["hashes"][0]["content"] for file in described["components"]}
    assert files == {
        name: hashlib.sha256((stored.path / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    metrics = {one["type"]: one for one in described["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["accuracy"]["value"] == "0.875"
    assert metrics["accuracy"]["confidenceInterval"] == {"lowerBound": "0.75", "upperBound": "1.0"}
    assert metrics["accuracy"]["slice"] == "test.jsonl"
    facts = {one["name"]: one["value"] for one in described["properties"]}
    assert facts["haori:licence:commercial-use"] == "no"  # a grandparent's data
    assert facts["haori:seed"] == "7"
    assert facts["haori:trigger-words"] == "ohwx dog"
    part = {one["name"]: one for one in bom["components"]}
    assert part["grand.jsonl"]["licenses"] == [{"expression": "CC-BY-NC-4.0"}]
    assert part["grand.jsonl"]["authors"] == [{"name": "Ada"}]
    assert "licenses" not in part["no licence"]
    assert part["org/model"]["licenses"] == [{"expression": "LicenseRef-scancode-llama-3.1-license-2024"}]
    assert part["org/model"]["purl"] == "pkg:huggingface/org/model@0123abc"
    assert part["grand"]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert part["grand"]["externalReferences"][0]["url"] == "https://example.org/x.safetensors"


def test_a_removed_parent_keeps_its_id(capsys, library, tmp_path):
    identity = library.get("parent").card.id
    library.remove("parent")
    bom = written(capsys, "child", tmp_path / "bom.json")
    assert f"adapter:{identity}" in {part["bom-ref"] for part in bom["components"]}
    assert "grand" not in {part["name"] for part in bom["components"]}


def test_of_a_family_alone(capsys, library, tmp_path):
    family = BaseReference(name="sd15", source="family:sd15", components={}, family="sd15")
    folder = written_adapter(tmp_path / "style", seed=9)
    library.add(folder, "style", card_of(folder, family, components=("unet",)))
    bom = written(capsys, "style", tmp_path / "bom.json")
    assert bom["metadata"]["component"]["modelCard"]["modelParameters"]["architectureFamily"] == "sd15"


def test_the_validator_refuses_what_is_not_in_the_schema(capsys, library, tmp_path):
    bom = written(capsys, "child", tmp_path / "bom.json")
    bom["metadata"]["component"]["modelCard"]["modelParameters"]["rank"] = 4
    assert problem(json.dumps(bom)) is not None
