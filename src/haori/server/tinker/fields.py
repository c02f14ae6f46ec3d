"""The JSON that clients send, checked: a field that is not known may be empty, and is refused by name otherwise."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

__all__ = [
    "CancelFuture",
    "CopyWeights",
    "CreateModel",
    "CreateSamplingSession",
    "CreateSession",
    "Finish",
    "LoadWeights",
    "ModelOnly",
    "OptimStep",
    "PathOnly",
    "Publish",
    "RetrieveFuture",
    "Sample",
    "SaveExternal",
    "SaveForSampler",
    "SaveWeights",
    "SessionOnly",
    "TimeToLive",
]

_MOST_METADATA = 64


class Sent(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    type: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_unknown(cls, given: Any) -> Any:
        if isinstance(given, dict):
            known = set(cls.model_fields) | {
                str(choice)
                for field in cls.model_fields.values()
                if isinstance(field.validation_alias, AliasChoices)
                for choice in field.validation_alias.choices
            }
            for name, value in given.items():
                if name not in known and value not in (None, False, 0, [], {}, ""):
                    text = "'{field}' is not known to this server; leave it out."
                    raise PydanticCustomError("unknown_field", text, {"name": str(name)[:100]})
        return given


class CreateSession(Sent):
    """A client that begins."""

    tags: list[str] = Field(default_factory=list, max_length=64)
    user_metadata: dict[str, Any] | None = Field(default=None, max_length=_MOST_METADATA)
    sdk_version: str | None = Field(default=None, max_length=64)
    project_id: str | None = Field(default=None, max_length=200)
    display_name: str | None = Field(default=None, max_length=1000)


class SessionOnly(Sent):
    """A session."""

    session_id: str = Field(max_length=200)


class Finish(Sent):
    """How a client ended."""

    reason: dict[str, str] | None = Field(default=None, max_length=8)
    detail: str | None = Field(default=None, max_length=4000)


class Lora(Sent):
    """The adapter of a new model."""

    rank: int = Field(ge=1, le=1024)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OnlyAdam(Sent):
    """What asks for an optimizer."""

    type: Literal["adamw"] = "adamw"

    @model_validator(mode="before")
    @classmethod
    def _no_other(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type", "adamw") != "adamw":
            text = "'{field}' asks for another optimizer than AdamW, which is the only one here; give adamw."
            raise PydanticCustomError("unsupported_field", text, {"name": "type"})
        return given


class Optimizer(OnlyAdam):
    """The kind of optimizer."""


class CreateModel(Sent):
    """A new model."""

    session_id: str = Field(max_length=200)
    model_seq_id: int = Field(ge=0)
    base_model: str = Field(max_length=400)
    user_metadata: dict[str, Any] | None = Field(default=None, max_length=_MOST_METADATA)
    lora_config: Lora | None = None
    optimizer_config: Optimizer = Field(default_factory=Optimizer)


class ModelOnly(Sent):
    """A model."""

    model_id: str = Field(max_length=200)


class Adam(OnlyAdam):
    """A step of AdamW."""

    learning_rate: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    grad_clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class OptimStep(Sent):
    """A step."""

    model_id: str = Field(max_length=200)
    seq_id: int
    params: Adam = Field(validation_alias=AliasChoices("adam_params", "optimizer_params", "optim_params"))


class SaveWeights(Sent):
    """A checkpoint with the optimizer's state."""

    model_id: str = Field(max_length=200)
    seq_id: int
    path: str | None = Field(default=None, max_length=200)
    ttl_seconds: int | None = Field(default=None, ge=1)
    overwrite: bool = False
    user_metadata: dict[str, str] | None = Field(default=None, max_length=_MOST_METADATA)


class SaveForSampler(Sent):
    """A checkpoint of the weights alone, or a sampling session with the weights of this moment."""

    model_id: str = Field(max_length=200)
    seq_id: int
    path: str | None = Field(default=None, max_length=200)
    sampling_session_seq_id: int | None = Field(default=None, ge=0)
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = Field(default=None, ge=1)
    user_metadata: dict[str, str] | None = Field(default=None, max_length=_MOST_METADATA)
    overwrite: bool = False


class SaveExternal(Sent):
    """Weights to be downloaded as files, in the form that PEFT reads."""

    model_id: str = Field(max_length=200)
    seq_id: int
    path: str = Field(max_length=200)
    ttl_seconds: int | None = Field(default=None, ge=1)
    age_encryption_recipients: list[str] | None = None


class CopyWeights(Sent):
    """A checkpoint that is copied into a run of its own."""

    source_path: str = Field(max_length=400)
    session_id: str | None = Field(default=None, max_length=200)
    model_seq_id: int | None = Field(default=None, ge=0)
    destination_project_id: str | None = Field(default=None, max_length=200)
    ttl_seconds: int | None = Field(default=None, ge=1)
    weights_access_token: str | None = None


class LoadWeights(Sent):
    """Weights for a new model (`session_id`), or for one that has done nothing yet (`model_id`)."""

    path: str = Field(max_length=400)
    optimizer: bool
    session_id: str | None = Field(default=None, max_length=200)
    model_seq_id: int | None = Field(default=None, ge=0)
    model_id: str | None = Field(default=None, max_length=200)
    seq_id: int | None = None
    base_model: str | None = Field(default=None, max_length=400)
    user_metadata: dict[str, Any] | None = Field(default=None, max_length=_MOST_METADATA)
    optimizer_config: Optimizer | None = None
    weights_access_token: str | None = None


class CreateSamplingSession(Sent):
    """What to sample from."""

    session_id: str = Field(max_length=200)
    sampling_session_seq_id: int = Field(ge=0)
    base_model: str | None = Field(default=None, max_length=400)
    model_path: str | None = Field(default=None, max_length=400)


class Chunk(Sent):
    """A part of a prompt."""

    type: Literal["encoded_text"] = "encoded_text"
    tokens: list[int]

    @model_validator(mode="before")
    @classmethod
    def _no_picture(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type", "encoded_text") != "encoded_text":
            text = "'{field}' is no text: pictures and sound are not read here; send chunks of encoded_text."
            raise PydanticCustomError("unsupported_field", text, {"name": "type"})
        return given


class Prompt(Sent):
    """A prompt."""

    chunks: list[Chunk] = Field(min_length=1)


class SamplingParams(Sent):
    """How tokens are chosen."""

    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_k: int = Field(default=-1, ge=-1)
    top_p: float = Field(default=1.0, gt=0, le=1)


class TargetTensor(Sent):
    """Token ids whose log-probabilities are wanted at positions of a prompt."""

    data: list[int]
    dtype: Literal["int64"] = "int64"
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=2, max_length=2)
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Sample(Sent):
    """Samples of one prompt."""

    prompt: Prompt
    sampling_params: SamplingParams
    num_samples: int = Field(default=1, ge=1, le=1024)
    sampling_session_id: str | None = Field(default=None, max_length=200)
    seq_id: int | None = Field(default=None, ge=0)
    base_model: str | None = Field(default=None, max_length=400)
    model_path: str | None = Field(default=None, max_length=400)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = Field(default=0, ge=0, le=20)
    topk_sample_logprobs: int = Field(default=0, ge=0, le=20)
    target_prompt_logprobs: TargetTensor | None = None
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    prompt_alt_tokens_k: int = Field(default=0, ge=0)
    record_stability_info: bool | None = None


class RetrieveFuture(Sent):
    """A promise whose answer is wanted."""

    request_id: str = Field(max_length=400)
    allow_metadata_only: bool = False
    model_id: str | None = None


class CancelFuture(Sent):
    """A promise that is no longer wanted."""

    request_id: str = Field(max_length=400)


class PathOnly(Sent):
    """A checkpoint."""

    tinker_path: str = Field(max_length=400)


class Publish(Sent):
    """Nothing: the address says it all."""


class TimeToLive(Sent):
    """How long a checkpoint is kept from now on; None for ever."""

    ttl_seconds: int | None = Field(default=None, ge=1)
