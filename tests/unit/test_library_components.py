"""Adapters that change some components of a base fit every base in which these are the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from haori.core.errors import MismatchError
from haori.core.records import AdapterCard, BaseReference, Fingerprint
from haori.library import check_base
from haori.library.cards import id_on_base
from tests.library_samples import base_reference, card_of, written_adapter


def pipeline(name: str = "painter", **components: tuple[str, str]) -> BaseReference:
    """Return a base whose components have (structure, weights)."""
    of = {"unet": ("s", "w"), "vae": ("s", "w"), "text_encoder": ("s", "w"), **components}
    return BaseReference(
        name=name,
        source=f"folder:/{name}",
        components={
            part: Fingerprint(architecture=f"{part.title()}Model", structure=structure, weights=weights)
            for part, (structure, weights) in of.items()
            if structure
        },
    )


@pytest.fixture
def card(tmp_path: Path) -> AdapterCard:
    made = card_of(written_adapter(tmp_path / "adapter"), pipeline(), components=("unet", "text_encoder"))
    assert isinstance(made, AdapterCard)
    return made


@pytest.mark.parametrize("other", [
    pipeline(), pipeline("renamed"), pipeline(vae=("s", "other")), pipeline(vae=("other", "other")),
    pipeline(vae=("", "")), pipeline(image_encoder=("s", "w")),
])  # fmt: skip
def test_only_the_components_that_an_adapter_changes_are_compared(card: AdapterCard, other: BaseReference):
    check_base(card, other)
    assert card.base.is_same(other, card.components)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            pipeline(unet=("s", "x")),
            "(?s)'painter' \\(unet: UnetModel.*same structure but other weights of the component 'unet', so",
        ),
        (pipeline(text_encoder=("s", "x")), "but other weights of the component 'text_encoder', so"),
        (pipeline(unet=("x", "w")), "differ in architecture or layer shapes of the component 'unet', so"),
        (pipeline(text_encoder=("", "")), "\\(components unet, vae\\) was given. It changes the component 'text_enc"),
        # The worse of two is said.
        (pipeline(unet=("s", "x"), text_encoder=("x", "x")), "layer shapes of the component 'text_encoder'"),
        (base_reference(), "It changes the component 'unet', which that base does not have"),
    ],
)
def test_a_base_with_another_component_is_refused_by_its_name(card: AdapterCard, other: BaseReference, said: str):
    with pytest.raises(MismatchError, match=said):
        check_base(card, other)
    assert not card.base.is_same(other, card.components)


def test_other_weights_of_a_component_may_be_allowed_and_other_structure_not(card: AdapterCard):
    check_base(card, pipeline(unet=("s", "x")), allow_different_weights=True)
    with pytest.raises(MismatchError, match="shapes of the component 'text_encoder'"):
        check_base(card, pipeline(unet=("s", "x"), text_encoder=("x", "x")), allow_different_weights=True)


def test_a_model_is_not_named_where_it_is_all_there_is(tmp_path: Path):
    card = card_of(written_adapter(tmp_path / "adapter"))
    with pytest.raises(MismatchError, match="They have the same structure but other weights, so"):
        check_base(card, base_reference(weights="x"))
    with pytest.raises(MismatchError, match="differ in architecture or layer shapes, so"):
        check_base(card, base_reference(structure="x"))


def test_a_card_keeps_its_components(card: AdapterCard):
    written: dict[str, Any] = json.loads(card.model_dump_json())
    assert written["components"] == ["unet", "text_encoder"]
    assert AdapterCard.model_validate(written) == card == card.with_fields(licence=card.licence)


def test_a_card_for_one_model_does_not_mention_components(tmp_path: Path):
    card = card_of(written_adapter(tmp_path / "adapter"))
    assert card.components == ("model",)
    assert "components" not in json.loads(card.model_dump_json())


@pytest.mark.parametrize("components", [(), ("model",), ("unet", "refiner")])
def test_an_adapter_changes_components_that_its_base_has(card: AdapterCard, components: tuple[str, ...]):
    with pytest.raises(ValidationError):
        card.with_fields(components=components)


def test_the_id_on_a_base_depends_on_all_its_components():
    ids = {
        id_on_base("sha256:0", base)
        for base in (pipeline(), pipeline(unet=("s", "x")), pipeline(vae=("x", "w")), base_reference())
    }
    assert len(ids) == 4
    assert id_on_base("sha256:0", pipeline()) == id_on_base("sha256:0", pipeline("renamed"))
