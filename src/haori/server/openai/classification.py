"""vLLM's `/classify`: the likeliest label of each text, and the probability of every label."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator

from haori.serve.embedding.classified import Classified, ClassifierInputs
from haori.server.lifecycle import service_of
from haori.server.openai.encoding import check_inputs, encode, encoder_of
from haori.server.openai.replying import ERRORS
from haori.server.openai.request_fields import RequestPart, misplaced

__all__ = ["ClassificationRequest", "router"]

router = APIRouter()


class ClassificationRequest(RequestPart):
    """Texts to classify."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "cache_salt": (), "mm_processor_kwargs": (), "padding": ("do_not_pad",), "priority": (0,),
    }  # fmt: skip

    model: str | None = Field(
        default=None, min_length=1, max_length=1000,
        description="An adapter that classifies; without one the base, if it is a classifier itself.",
    )  # fmt: skip
    input: str | list[str] | list[int] | list[list[int]] = Field(
        description="One text or several, or the token ids of one or several."
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, description="Cut what is longer to so many tokens; -1 for as many as the base reads. "
        "Without it, what is too long is refused.",
    )  # fmt: skip
    truncation_side: Literal["left", "right"] | None = Field(
        default=None, description="The side that is cut off; by default the tokenizer's."
    )
    add_special_tokens: bool | None = Field(
        default=None, description="Whether the tokenizer puts its own tokens around a text; true by default."
    )
    use_activation: bool | None = Field(
        default=None, description="False for logits in place of probabilities; true by default."
    )
    request_id: str | None = Field(default=None, min_length=1, max_length=200, description="Comes back in `id`.")
    messages: Any = Field(default=None, description="Not for classifiers; give `input`.")
    user: str | None = Field(default=None, description="Taken, without effect.")

    @model_validator(mode="before")
    @classmethod
    def _no_messages(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("messages") is not None:
            raise misplaced("messages", "'{place}' is not for classifiers, which read plain text; give 'input'.")
        return given

    @property
    def given(self) -> Sequence[str] | Sequence[Sequence[int]]:
        """Return the inputs as a list of texts, or of lists of token ids."""
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if self.input and isinstance(self.input[0], int) else self.input  # type: ignore[return-value]

    @property
    def inputs(self) -> ClassifierInputs:
        """Return what is asked for, as an encoder takes it."""
        kept: dict[str, Literal["start", "end"]] = {"left": "end", "right": "start"}
        return ClassifierInputs(
            self.given,
            special_tokens=self.add_special_tokens is not False,
            truncate=self.truncate_prompt_tokens,
            keep=kept[self.truncation_side] if self.truncation_side else None,
            activated=self.use_activation is not False,
        )


class ClassificationItem(BaseModel):
    """What one input is."""

    index: int
    label: str = Field(description="The likeliest label.")
    probs: list[float] = Field(description="Of every label, in the order of the head; they sum to 1, unless several "
                               "labels may hold at once.")  # fmt: skip
    num_classes: int


class ClassificationUsage(BaseModel):
    """Token counts, in vLLM's form."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0] = 0
    prompt_tokens_details: None = None


class ClassificationReply(BaseModel):
    """The reply to a classification request."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As asked for.")
    data: list[ClassificationItem]
    usage: ClassificationUsage


@router.post("/classify", responses=ERRORS)
async def classify(asked: ClassificationRequest, request: Request) -> ClassificationReply:
    """Classify texts."""
    model = service_of(request).base.name if asked.model is None else asked.model
    encoder = encoder_of(request, model, otherwise="classifies nothing", code="classification_not_served")
    inputs = asked.inputs
    check_inputs(request, inputs.given)
    found = await encode(request, model, lambda mix: encoder.classify(inputs, mix))
    count = sum(found.tokens)
    return ClassificationReply(
        id=f"classify-{asked.request_id or secrets.token_hex(16)}",
        created=int(time.time()),
        model=model,
        data=_items(found),
        usage=ClassificationUsage(prompt_tokens=count, total_tokens=count),
    )


def _items(found: Classified) -> list[ClassificationItem]:
    return [
        ClassificationItem(
            index=index, label=found.labels[scores.index(max(scores))], probs=list(scores), num_classes=len(scores)
        )
        for index, scores in enumerate(found.scores)
    ]
