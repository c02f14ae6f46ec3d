import pytest

from haori.core.records import DataReference
from haori.library import effective_licence
from tests.library_samples import base_reference, card_of, written_adapter


def data(licence: str | None) -> DataReference:
    return DataReference(source="rows.jsonl", hash="h", format="messages", rows={"train": 1}, licence=licence)


@pytest.fixture
def make(tmp_path):
    written_adapter(tmp_path / "a")

    def card(base: str | None, *datasets: str | None, **fields):
        return card_of(tmp_path / "a", base_reference(licence=base), data=tuple(map(data, datasets)), **fields)

    return card


@pytest.mark.parametrize(
    ("base", "datasets", "expression", "commercial"),
    [
        ("Apache-2.0", [], "Apache-2.0", "yes"),
        ("apache-2.0", ["mit"], "Apache-2.0 AND MIT", "yes"),
        ("Apache-2.0", ["Apache-2.0", "MIT"], "Apache-2.0 AND MIT", "yes"),
        ("Apache-2.0", ["CC-BY-NC-4.0"], "Apache-2.0 AND CC-BY-NC-4.0", "no"),
        ("Apache-2.0", ["CC-BY-NC-4.0", None], "Apache-2.0 AND CC-BY-NC-4.0 AND LicenseRef-scancode-unknown", "no"),
        ("Apache-2.0", [None], "Apache-2.0 AND LicenseRef-scancode-unknown", "unknown"),
        (None, ["MIT"], "LicenseRef-scancode-unknown AND MIT", "unknown"),
        ("llama3.1", ["MIT"], "LicenseRef-scancode-llama-3.1-license-2024 AND MIT", "conditions"),
        ("llama3.1 AND Apache-2.0", [], "LicenseRef-scancode-llama-3.1-license-2024 AND Apache-2.0", "conditions"),
        ("gemma", [], "LicenseRef-scancode-gemma-tou-2024-04-01", "conditions"),
        ("bigcode-openrail-m", [], "LicenseRef-scancode-bigcode-open-rail-m-v1", "conditions"),
        ("flux-1-dev-non-commercial-license", [], "LicenseRef-scancode-flux-1-nc", "no"),
        ("MIT", ["CC-BY-SA-4.0"], "MIT AND CC-BY-SA-4.0", "conditions"),
        ("MIT", ["CC-BY-ND-4.0"], "MIT AND CC-BY-ND-4.0", "conditions"),
        ("MIT", ["CC0-1.0"], "MIT AND CC0-1.0", "yes"),
        ("MIT", ["GPL-3.0-only WITH Classpath-exception-2.0"], None, "conditions"),
        ("MIT OR CC-BY-NC-4.0", [], "MIT OR CC-BY-NC-4.0", "yes"),
        ("MIT", ["my own words"], "MIT AND LicenseRef-my-own-words", "unknown"),
        ("MIT", ["Apache-2.0 AND ("], None, "unknown"),
    ],
)
def test_what_applies_together(make, base, datasets, expression, commercial):
    verdict = effective_licence(make(base, *datasets))
    assert verdict.commercial == commercial
    assert expression is None or verdict.expression == expression
    assert len(verdict.reasons) == 1 + len(datasets)
    assert verdict.reasons[0].startswith("base tiny: ")


def test_reasons_name_the_duty(make):
    verdict = effective_licence(make("llama3.1", "CC-BY-4.0"))
    assert "Built with Llama" in verdict.reasons[0]
    assert verdict.reasons[1] == "data rows.jsonl: CC-BY-4.0 (credit the source)."


def test_parents_count_and_unknown_ones_too(make):
    parent = make("MIT", licence="CC-BY-NC-4.0").with_fields(names=("old@1",))
    child = make("MIT", parents=(parent.id,))
    assert effective_licence(child, [parent]).commercial == "no"
    assert "parent old@1" in effective_licence(child, [parent]).reasons[1]
    assert effective_licence(child).commercial == "unknown"


def test_a_trained_card_gets_the_effective_licence(make):
    assert make("MIT", "CC-BY-4.0").licence == "MIT AND CC-BY-4.0"
    assert make("MIT", "CC-BY-4.0", licence="MIT").licence == "MIT"


def test_an_added_card_needs_its_authors_terms(make):
    added = make("MIT").with_fields(origin="added", licence=None)
    assert effective_licence(added).commercial == "unknown"
    assert effective_licence(added.with_fields(licence="apache-2.0")).expression == "MIT AND Apache-2.0"
