"""Reads the body of a request so that nothing in it is ignored in silence.

A field that is not served is refused by its name unless its value switches it off; an unknown field is refused with the
nearest name. Where the caller is lenient, both become warnings. A few that change no picture are taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from fastapi import Body
from pydantic import BaseModel, ConfigDict, ValidationError

from haori.core.errors import nearest
from haori.server.errors import ApiError, describe_problem

__all__ = ["JsonObject", "PictureBody", "Read", "read_body"]

JsonObject = Annotated[dict[str, Any], Body(description="Fields by name, as the guide lists them.")]
_OFF: tuple[Any, ...] = (None, False, [], {}, "", "none", "None")


class PictureBody(BaseModel):
    """What a route takes. Numbers may be written as text, as some clients do; null stands for what is left out."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not served, with the values that say nothing, beside those that switch off."""
    without_effect: ClassVar[Mapping[str, str]] = {}
    """Fields that are taken whatever they are, and why they change nothing."""


T = TypeVar("T", bound=PictureBody)


@dataclass(frozen=True)
class Read:
    """A body that was read.

    Attributes:
        given: As it was sent.
        warnings: What was left out, a sentence each.
    """

    given: Mapping[str, Any]
    warnings: list[str]


def read_body(model: type[T], given: Mapping[str, Any], *, lenient: bool) -> tuple[T, Read]:
    """Return the fields of a body.

    Args:
        model: What the route takes.
        given: The JSON object, or the fields of a form.
        lenient: Warn of what cannot be used.

    Raises:
        ApiError: There is such a field (unless lenient), or a value is of the wrong kind.
    """
    kept: dict[str, Any] = {}
    warnings: list[str] = []
    for name, value in given.items():
        if name in model.model_fields:
            if value is not None:
                kept[name] = value
        elif name not in model.without_effect and (problem := _problem(model, name, value)):
            if not lenient:
                raise ApiError(400, problem, param=ascii(name)[1:-1][:100], code="unsupported_field")
            warnings.append(f"{problem} It was left out.")
    try:
        return model.model_validate(kept), Read(given, warnings)
    except ValidationError as error:
        problems = [{**found, "loc": ("body", *found["loc"])} for found in error.errors(include_url=False)]
        message, param, code = describe_problem(problems)
        raise ApiError(400, message, param=param, code=code) from None


def _problem(model: type[PictureBody], name: str, value: Any) -> str | None:
    shown = ascii(name)[1:-1][:100]
    if name in model.unserved:
        silent = (*_OFF, *model.unserved[name])
        return None if value in silent else f"{shown!r} is not supported by this server; take it out."
    known = [*model.model_fields, *model.unserved, *model.without_effect]
    return f"There is no field {shown!r}; {nearest(shown, known) or 'take it out.'}"
