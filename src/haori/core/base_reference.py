"""Identity of a base model: what an adapter was trained on, component by component, by content.

`Record`, the base of every record, is here too; `haori.core.records` gives all of these with the others.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from haori.core.errors import BaseError
from haori.core.hashing import hash_data, short

__all__ = [
    "MODEL_COMPONENT",
    "BaseReference",
    "CheckpointHashes",
    "Difference",
    "Fingerprint",
    "Record",
    "only_component",
]

MODEL_COMPONENT = "model"
"""The component of a base that is one model, such as every base for text."""

Difference = Literal["same", "other weights", "other structure", "missing"]
"""How a component of one base differs from that of another."""

_Component = TypeVar("_Component")


class Record(BaseModel):
    """Base of every record: immutable, unknown fields refused, NaN and infinity kept as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def with_fields(self, **changes: Any) -> Self:
        """Return a copy with fields replaced, validated anew."""
        return type(self).model_validate({**self.model_dump(), **changes})


class Fingerprint(Record):
    """Identity of a base model by content. All hashes are `sha256:<hex>`."""

    architecture: str = Field(description="Class named by the model's configuration, e.g. LlamaForCausalLM.")
    structure: str = Field(description="Hash of the architecture and every weight's name and shape.")
    weights: str = Field(description="Hash of the weight files' bytes.")
    tokenizer: str | None = Field(default=None, description="Hash of the tokenizer's vocabulary and rules.")
    chat_template: str | None = Field(default=None, description="Hash of the chat template, if there is one.")

    @property
    def id(self) -> str:
        """Return the 12 digits shown to people."""
        return short(hash_data([self.structure, self.weights]))

    def compare(self, other: "Fingerprint") -> Literal["same", "other weights", "other structure"]:
        """Say how `other` differs as far as attaching an adapter goes."""
        if self.structure != other.structure:
            return "other structure"
        return "same" if self.weights == other.weights else "other weights"


class CheckpointHashes(Record):
    """What model sites and tools know a single-file checkpoint by; digits in lower case."""

    sha256: str = Field(description="Of the whole file, 64 digits.")
    autov1: str = Field(description="Of its bytes 0x100000 to 0x110000, the first 8 digits.")


class BaseReference(Record):
    """The base that an adapter was trained on.

    A base of one model is written with a `fingerprint`, as ever; one of several components with a fingerprint of each.
    """

    name: str
    source: str = Field(description="Where it came from: folder, hub id, wheel, GGUF file.")
    revision: str | None = None
    components: dict[str, Fingerprint] = Field(
        description="Identity of each component, by its name; none where only the family is known."
    )
    family: str | None = Field(
        default=None, exclude_if=lambda family: family is None,
        description="Kind of base by the shapes of its weights, such as sd15, sdxl or flux1.",
    )  # fmt: skip
    prediction: str | None = Field(
        default=None, exclude_if=lambda prediction: prediction is None,
        description="What the denoiser of a pipeline predicts: epsilon, v_prediction, sample or flow.",
    )  # fmt: skip
    zero_terminal_snr: bool | None = Field(
        default=None, exclude_if=lambda zero: zero is None,
        description="Whether its scheduler's last step is nothing but noise.",
    )  # fmt: skip
    checkpoint: CheckpointHashes | None = Field(
        default=None, exclude_if=lambda hashes: hashes is None, description="Of the single file that it came in."
    )
    licence: str | None = None
    size_bytes: int = 0
    quantization: str | None = Field(default=None, description="None for a base loaded in 16 or 32 bits.")

    @model_validator(mode="after")
    def _check_known(self) -> Self:
        if not self.components and self.family is None:
            raise ValueError("a base has components, or at least a family")
        return self

    @model_validator(mode="before")
    @classmethod
    def _read_one_model(cls, document: Any) -> Any:
        if not isinstance(document, dict) or "fingerprint" not in document:
            return document
        if "components" in document:
            raise ValueError("a base has either a fingerprint or components with a fingerprint each")
        rest = {key: value for key, value in document.items() if key != "fingerprint"}
        return {**rest, "components": {MODEL_COMPONENT: document["fingerprint"]}}

    @model_serializer(mode="wrap")
    def _write_one_model(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = write(self)
        if list(self.components) != [MODEL_COMPONENT]:
            return document
        return {
            "fingerprint" if key == "components" else key: value[MODEL_COMPONENT] if key == "components" else value
            for key, value in document.items()
        }

    @property
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of its only component.

        Raises:
            BaseError: It has several.
        """
        return only_component(self.name, self.components)

    @property
    def id(self) -> str:
        """Return the 12 digits shown to people; those of its only component where it has one, or else its family."""
        if not self.components:
            return str(self.family)
        if len(self.components) == 1:
            return self.fingerprint.id
        return short(hash_data([[name, of.structure, of.weights] for name, of in sorted(self.components.items())]))

    def compare(self, other: "BaseReference", names: Iterable[str]) -> dict[str, Difference]:
        """Say how components of `other` differ, as far as attaching an adapter goes.

        Args:
            other: Another base.
            names: The components to compare: those that the adapter changes.
        """
        found: dict[str, Difference] = {}
        for name in names:
            mine, its = self.components.get(name), other.components.get(name)
            found[name] = "missing" if mine is None or its is None else mine.compare(its)
        return found

    def is_same(self, other: "BaseReference", names: Iterable[str]) -> bool:
        """Say whether these components of `other` are the same by content; without any, whether the family is."""
        if not self.components and not other.components:
            return self.family == other.family
        return set(self.compare(other, names).values()) <= {"same"}


def only_component(name: str, components: Mapping[str, _Component]) -> _Component:
    """Return the only component of a base.

    Raises:
        BaseError: The base `name` has several.
    """
    if len(components) == 1:
        return next(iter(components.values()))
    if not components:
        raise BaseError(
            f"Of the base {name!r} only the family is known, not its weights; what was asked for needs the base itself."
        )
    raise BaseError(
        f"The base {name!r} is not one model: it has the components {', '.join(sorted(components))}, and what was "
        "asked for needs a base of one model, such as smollm2-135m-instruct."
    )
