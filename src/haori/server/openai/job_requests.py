"""What a request for a fine-tuning job may hold, and the order that it makes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat

from haori.jobs.fine_tuning.recipe import Hyperparameters, Wanted
from haori.jobs.fine_tuning.service import Order
from haori.server.errors import ApiError
from haori.server.openai.request_fields import RequestPart

__all__ = ["CreateJob", "order_of"]

_METHODS = ("supervised", "dpo")
_Text = Annotated[str, Field(max_length=512)]
_Key = Annotated[str, Field(min_length=1, max_length=64)]


class _Hyperparameters(RequestPart):
    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] | None = None
    learning_rate_multiplier: Literal["auto"] | Annotated[FiniteFloat, Field(gt=0)] | None = None


class _DpoHyperparameters(_Hyperparameters):
    beta: Literal["auto"] | Annotated[FiniteFloat, Field(gt=0)] | None = None


class _Supervised(RequestPart):
    hyperparameters: _Hyperparameters | None = None


class _Dpo(RequestPart):
    hyperparameters: _DpoHyperparameters | None = None


class _Method(RequestPart):
    type: str
    supervised: _Supervised | None = None
    dpo: _Dpo | None = None
    reinforcement: Any = None


class CreateJob(RequestPart):
    """A fine-tuning job; `lora` and `recipe` are sent by `extra_body`."""

    model: str = Field(min_length=1, max_length=255, description="A base, or a model to go on from.")
    training_file: str
    validation_file: str | None = None
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    metadata: dict[_Key, _Text] | None = Field(default=None, max_length=16)
    hyperparameters: _Hyperparameters | None = None
    method: _Method | None = None
    integrations: list[dict[str, Any]] | None = None
    lora: dict[str, Any] | None = Field(default=None, description="rank, alpha, dropout and targets.")
    recipe: dict[str, Any] | None = Field(default=None, description="Further keys of the recipe, nested or dotted.")


def order_of(asked: CreateJob, key: str | None = None) -> Order:
    """Return what is to be trained.

    Raises:
        ApiError: A method or an integration is none that is served, or hyperparameters are given twice.
    """
    if asked.integrations:
        kind = str(asked.integrations[0].get("type", ""))[:40]
        message = (
            f"The integration {kind!r} is not served: nothing is sent elsewhere. The figures are in the job's events "
            "and in its result file; take 'integrations' out."
        )
        raise ApiError(400, message, param="integrations", code="unsupported_field")
    method: str = _method(asked.method)
    given = _hyperparameters(asked, method)
    metadata: Mapping[str, str] = asked.metadata or {}
    wanted = Wanted(
        name="", base="", method="dpo" if method == "dpo" else "supervised", hyperparameters=Hyperparameters(**given),
        seed=asked.seed or 0, lora=asked.lora or {}, recipe=asked.recipe or {},
    )  # fmt: skip
    return Order(
        wanted=wanted, model=asked.model, training_file=asked.training_file, validation_file=asked.validation_file,
        suffix=asked.suffix, request={"metadata": dict(metadata)}, key=key,
    )  # fmt: skip


def _method(asked: _Method | None) -> str:
    if asked is None:
        return "supervised"
    if asked.type not in _METHODS or asked.reinforcement is not None:
        kind = asked.type if asked.type not in _METHODS else "reinforcement"
        what = "graders, which may run code of the caller, are not" if kind == "reinforcement" else "it is not"
        message = (
            f"The method {kind[:40]!r} is not served: {what}. Use supervised or dpo; loops of your own over rewards "
            "are written against /api/v1."
        )
        raise ApiError(400, message, param="method.type", code="unsupported_method")
    other = "dpo" if asked.type == "supervised" else "supervised"
    if getattr(asked, other) is not None:
        raise ApiError(400, f"'method.type' is {asked.type}, and {other!r} is given too; take it out.",
                       param=f"method.{other}", code="invalid_value")  # fmt: skip
    return asked.type


def _hyperparameters(asked: CreateJob, method: str) -> dict[str, Any]:
    of_method = None if asked.method is None else getattr(asked.method, method)
    found: dict[str, Any] = {}
    for part in (asked.hyperparameters, None if of_method is None else of_method.hyperparameters):
        for name, value in (part.model_dump() if part is not None else {}).items():
            if value is None:
                continue
            if found.get(name, value) != value:
                message = f"'hyperparameters.{name}' and the one in 'method' are not the same; give it once."
                raise ApiError(400, message, param=f"hyperparameters.{name}", code="invalid_value")
            found[name] = float(value) if name in ("beta", "learning_rate_multiplier") and value != "auto" else value
    return found
