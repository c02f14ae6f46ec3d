"""What Together's client asks for, and the order of a job that it makes.

Options that change nothing at the value that the client sends by itself are taken at that value; at any other, what
cannot be done is refused by its name.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, FiniteFloat

from haori.core.errors import InputError
from haori.jobs.fine_tuning.recipe import Hyperparameters, Wanted
from haori.jobs.fine_tuning.service import FineTuning, Order
from haori.server.errors import ApiError
from haori.server.openai.request_fields import RequestPart

__all__ = ["AskEstimate", "AskPreview", "CreateFineTune", "order_of"]

_NO_STOP = 1_000_000  # validations without improvement: more than any run has
_PATIENCE = 2  # as Together's API has it
_Ratio = Annotated[FiniteFloat, Field(ge=0, lt=1)]
_Epochs = Annotated[int, Field(ge=1, le=1000)]
_Evaluations = Annotated[int, Field(ge=0, le=10_000)]


class _SchedulerArguments(RequestPart):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"min_lr_ratio": (), "num_cycles": (0.5,)}


class _Scheduler(RequestPart):
    lr_scheduler_type: Literal["cosine", "linear"]
    lr_scheduler_args: _SchedulerArguments | None = None


class _TrainingType(RequestPart):
    type: str
    lora_r: int | None = Field(default=None, ge=1)
    lora_alpha: FiniteFloat | None = Field(default=None, gt=0)
    lora_dropout: _Ratio | None = None
    lora_trainable_modules: str | None = None


class _TrainingMethod(RequestPart):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dpo_normalize_logratios_by_length": (), "dpo_reference_free": (), "rpo_alpha": (), "simpo_gamma": (),
    }  # fmt: skip
    method: str
    train_on_inputs: bool | Literal["auto"] | None = None
    dpo_beta: FiniteFloat | None = Field(default=None, ge=0)


class _Multimodal(RequestPart):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"train_vision": ()}


class AskEstimate(RequestPart):
    """A job whose price is asked for."""

    training_file: str
    validation_file: str | None = None
    model: str | None = Field(default=None, max_length=255)
    from_checkpoint: str | None = Field(default=None, max_length=512)
    n_epochs: _Epochs = 1
    n_evals: _Evaluations | None = None
    training_type: _TrainingType | None = None
    training_method: _TrainingMethod | None = None


class CreateFineTune(AskEstimate):
    """A fine-tuning job."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "gradient_accumulation_steps": (1,), "early_stopping_min_delta": (), "early_stopping_warmup_evals": (),
        "wandb_key": (), "wandb_api_key": (), "wandb_base_url": (), "wandb_project_name": (), "wandb_name": (),
        "wandb_entity": (), "from_hf_model": (), "hf_model_revision": (), "hf_api_token": (), "hf_output_repo_name": (),
    }  # fmt: skip
    suffix: str | None = Field(default=None, max_length=64)
    packing: bool | None = Field(default=None, description="Taken, without effect: rows are batched by their length.")
    max_seq_length: int | None = Field(default=None, ge=1)
    n_checkpoints: int | None = Field(default=None, ge=1, le=1000)
    batch_size: Literal["max"] | Annotated[int, Field(ge=1, le=65536)] | None = None
    learning_rate: FiniteFloat | None = Field(default=None, gt=0, lt=1)
    lr_scheduler: _Scheduler | None = None
    warmup_ratio: _Ratio | None = None
    max_grad_norm: FiniteFloat | None = Field(default=None, gt=0)
    weight_decay: FiniteFloat | None = Field(default=None, ge=0)
    random_seed: int | None = Field(default=None, ge=0, lt=1 << 31)
    early_stopping_enabled: bool | None = None
    early_stopping_patience: int | None = Field(default=None, ge=1)
    multimodal_params: _Multimodal | None = None
    train_on_inputs: bool | Literal["auto"] | None = Field(default=None, description="As in training_method.")


class AskPreview(RequestPart):
    """Rows of a file, and the base that they are rendered for."""

    model: str
    training_file: str
    top_k: int = Field(default=5, ge=1, le=50)
    train_on_inputs: bool | Literal["auto"] | None = None
    training_method: str | None = None


def order_of(asked: AskEstimate, tuning: FineTuning, owner: str, key: str | None = None) -> Order:
    """Return what is to be trained.

    Args:
        asked: The request.
        tuning: Where jobs to go on from are found.
        owner: The account.
        key: Idempotency key.

    Raises:
        ApiError: A way of training is none that is served, or values contradict one another.
        JobNotFoundError: There is no such job to go on from.
    """
    method = asked.training_method or _TrainingMethod(method="sft")
    if method.method not in ("sft", "dpo"):
        raise _refused("training_method.method", f"cannot be {method.method[:40]!r}; use sft or dpo")
    of_pairs = method.method == "dpo"
    validation = asked.validation_file or None
    if asked.n_evals and validation is None:
        raise _refused("n_evals", f"is {asked.n_evals} and there is no 'validation_file' to measure on; give one")
    recipe: dict[str, Any] = {} if validation is None else {"training.patience": _NO_STOP}
    if asked.n_evals:
        recipe["training.evaluations_per_epoch"] = -(-asked.n_evals // asked.n_epochs)
    found: dict[str, Any] = {"n_epochs": asked.n_epochs}
    if of_pairs and method.dpo_beta:
        found["beta"] = float(method.dpo_beta)
    checkpoints, seed, suffix = None, 0, None
    if isinstance(asked, CreateFineTune):
        recipe |= _keys(asked, of_pairs=of_pairs)
        if isinstance(asked.batch_size, int):
            found["batch_size"] = asked.batch_size
        checkpoints, seed, suffix = asked.n_checkpoints, asked.random_seed or 0, asked.suffix or None
    if not of_pairs and _trains_on_inputs(asked, method):
        recipe["data.train_on"] = "all"
    wanted = Wanted(
        name="", base="", method="dpo" if of_pairs else "supervised", hyperparameters=Hyperparameters(**found),
        seed=seed, lora=_lora(asked.training_type), recipe=recipe, checkpoints=checkpoints,
    )  # fmt: skip
    kept = {"n_evals": asked.n_evals, "from_checkpoint": asked.from_checkpoint or None}
    return Order(
        wanted=wanted, model=_start(asked, tuning, owner), training_file=asked.training_file,
        validation_file=validation, suffix=suffix, request={"metadata": {}, "fine_tune": kept}, key=key,
    )  # fmt: skip


def _keys(asked: CreateFineTune, *, of_pairs: bool) -> dict[str, Any]:
    """Return the keys of the recipe that options become."""
    found: dict[str, Any] = {
        "optimizer.lr": asked.learning_rate, "optimizer.max_grad_norm": asked.max_grad_norm,
        "optimizer.weight_decay": asked.weight_decay, "schedule.warmup_ratio": asked.warmup_ratio,
    }  # fmt: skip
    found = {key: float(value) for key, value in found.items() if value is not None}
    if asked.lr_scheduler is not None:
        found["schedule.kind"] = asked.lr_scheduler.lr_scheduler_type
    if asked.max_seq_length is not None:
        found["data.max_length"] = asked.max_seq_length
        if not of_pairs:
            found["data.too_long"] = "truncate"
    if asked.early_stopping_enabled:
        if not asked.validation_file:
            raise _refused("early_stopping_enabled", "needs a 'validation_file' to measure on; give one")
        found["training.patience"] = asked.early_stopping_patience or _PATIENCE
    elif asked.early_stopping_patience is not None:
        raise _refused("early_stopping_patience", "has an effect with 'early_stopping_enabled' only; give both")
    return found


def _trains_on_inputs(asked: AskEstimate, method: _TrainingMethod) -> bool:
    given = {method.train_on_inputs, getattr(asked, "train_on_inputs", None)}
    return True in given


def _lora(given: _TrainingType | None) -> dict[str, Any]:
    if given is None:
        return {}
    if given.type != "Lora":
        raise _refused("training_type.type", f"cannot be {given.type[:40]!r}: adapters are trained; use Lora")
    found = {"rank": given.lora_r, "alpha": given.lora_alpha, "dropout": given.lora_dropout}
    modules = [name.strip() for name in (given.lora_trainable_modules or "").split(",") if name.strip()]
    targets: Any = modules[0] if len(modules) == 1 else modules
    return {name: value for name, value in found.items() if value is not None} | (
        {"targets": targets} if modules else {}
    )


def _start(asked: AskEstimate, tuning: FineTuning, owner: str) -> str:
    """Return the base, or the model to go on from: what a job made, or a checkpoint of it."""
    given = asked.from_checkpoint or ""
    if bool(asked.model) == bool(given):
        raise _refused("model", "and 'from_checkpoint' say what training starts from; give one of them")
    if not given:
        assert asked.model
        return asked.model
    head, _, last = given.rpartition(":")
    named, step = (head, last) if head and last.isascii() and last.isdigit() else (given, "")
    if named.startswith("ftjob-"):
        job = tuning.find(named, owner)
        if job.state != "succeeded" or job.result is None:
            raise InputError(f"'from_checkpoint' cannot be {given[:120]!r}: that job is {job.state}.")
        named = str(job.result["model"])
    return f"{named}:ckpt-step-{step}" if step else named


def _refused(field: str, why: str) -> ApiError:
    return ApiError(400, f"{field!r} {why}.", param=field, code="invalid_value")
