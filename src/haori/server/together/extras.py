"""What Together's client asks beside jobs: limits of a base, a price, rows as the model sees them, and downloads."""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from haori.core.errors import InputError, OverloadedError
from haori.data.tokenise import resolve_max_length
from haori.jobs.fine_tuning.preview import PreviewedRow, preview
from haori.jobs.queue.estimate import Estimate, estimate
from haori.server.access import Caller, caller_of
from haori.server.errors import ApiError
from haori.server.jobs_service import JobService
from haori.server.lifecycle import jobs_of
from haori.server.openai.fine_tuning_extras import ARCHIVE, archive_reply
from haori.server.openai.replying import ERRORS
from haori.server.together.requests import AskEstimate, AskPreview, order_of

__all__ = ["router"]

router = APIRouter()

_FINE_TUNED = "ft"  # what the client makes of the name of a fine-tuned model, up to its first colon
_FORMATS = {"messages": "conversation", "sharegpt": "conversation", "text": "general"}


class LoraLimits(BaseModel):
    """What an adapter may be."""

    default_rank: int = 16
    max_rank: int = Field(default=1 << 16, description="A recipe has no limit of its own.")
    min_batch_size: int = 1
    max_batch_size: int = 65536
    max_batch_size_dpo: int = 65536
    target_modules: list[str]


class ModelLimits(BaseModel):
    """What a job on a base may be."""

    model_name: str
    lora_training: LoraLimits
    full_training: None = None
    supports_full_training: Literal[False] = False
    supports_vision: Literal[False] = False
    supports_tools: bool = True
    supports_reasoning: Literal[False] = False
    merge_output_lora: Literal[True] = True
    default_gradient_accumulation_steps: Literal[1] = 1
    max_num_epochs: int = 1000
    max_num_evals: int = 10_000
    max_num_checkpoints: int = 1000
    min_learning_rate: float = 0.0
    max_learning_rate: float = 1.0
    min_max_seq_length: int = 1
    max_seq_length_sft: int
    max_seq_length_dpo: int


class PriceEstimate(BaseModel):
    """What a job is likely to cost and to take."""

    estimation_available: Literal[True] = True
    allowed_to_proceed: bool
    reason: str | None = Field(description="Why the account may not have the job now.")
    estimated_total_price: float | None = Field(description="By the table of prices; None without one for the base.")
    estimated_train_token_count: int
    estimated_eval_token_count: int
    user_limit: int | None = Field(description="Tokens that the account may train in 30 days; None without a limit.")
    estimate: Estimate


class PreviewRow(BaseModel):
    """A row token by token; labels are -100 where nothing is trained."""

    input_ids: list[int]
    labels: list[int]
    tokens: list[str]
    num_tokens: int
    num_trained_tokens: int
    trained_spans: list[list[int]] = Field(description="From the first token up to but not including the second.")
    truncated: Literal[False] = Field(default=False, description="A job cuts rows only if it gives max_seq_length.")
    too_long: bool = Field(description="Longer than max_seq_length: a job leaves it out, unless it is told to cut it.")


class Preview(BaseModel):
    """The first rows of a file."""

    dataset_format: str
    model: str
    train_on_inputs: bool
    max_seq_length: int
    rows: list[PreviewRow]


@router.get("/v1/fine-tunes/models/limits", responses=ERRORS)
def model_limits(request: Request, model_name: str) -> ModelLimits:
    """Say what a job on a base may be; the client asks before each job."""
    from haori.bases import find_base

    caller, jobs = caller_of(request), jobs_of(request)
    base = find_base(_base_of(model_name, caller, jobs))
    length = base.context_length
    lora = LoraLimits(target_modules=["all-linear", "attention"])
    return ModelLimits(model_name=model_name, lora_training=lora, max_seq_length_sft=length, max_seq_length_dpo=length)


def _base_of(name: str, caller: Caller, jobs: JobService) -> str:
    """Return the spec of the base that a name means: a model, a job to go on from, or any fine-tuned model."""
    tuning = jobs.fine_tuning
    if name.startswith("ftjob-"):
        name = tuning.find(name, caller.account).spec["base"]
    if name == _FINE_TUNED and tuning.served is not None:
        name = tuning.served.name
    return tuning.resolve_start(name, caller.account, caller.may_use)[1]


@router.post("/v1/fine-tunes/estimate-price", responses=ERRORS)
def estimate_price(asked: AskEstimate, request: Request) -> PriceEstimate:
    """Say what a job is likely to cost and to take, and whether the account may have it now."""
    caller, jobs = caller_of(request), jobs_of(request)
    caller.need("train")
    order = order_of(asked, jobs.fine_tuning, caller.account)
    spec, tokens = jobs.fine_tuning.planned(order, caller.account, may_use=caller.may_use)
    measured = 0
    if order.validation_file is not None:
        validation = jobs.files.find(order.validation_file, caller.account)
        measured = jobs.fine_tuning.tokens_of(validation) * (asked.n_evals or 0)
    rows = jobs.files.find(order.training_file, caller.account).summary
    assert rows is not None
    reason = None
    with jobs.database.reading() as connection:
        try:
            caller.quotas.check_job(connection, caller.account, rows=rows.rows, tokens=tokens)
        except (InputError, OverloadedError) as error:
            reason = str(error)
    found = estimate(jobs.store, base=spec, tokens=tokens)
    return PriceEstimate(
        allowed_to_proceed=reason is None, reason=reason, estimated_total_price=found.price,
        estimated_train_token_count=tokens, estimated_eval_token_count=measured, user_limit=caller.quotas.tokens,
        estimate=found,
    )  # fmt: skip


@router.post("/v1/fine-tunes/preview", responses=ERRORS)
def preview_rows(asked: AskPreview, request: Request) -> Preview:
    """Show the first rows of a file token by token, with what is trained."""
    from haori.bases import find_base, load_tokenizer

    caller, jobs = caller_of(request), jobs_of(request)
    if asked.training_method not in (None, "sft"):
        raise _refused("training_method", asked.training_method, "sft alone is shown")
    if asked.train_on_inputs is True:
        raise _refused("train_on_inputs", True, "rows are shown as they are trained by default")
    file = jobs.files.find(asked.training_file, caller.account)
    if file.summary is None or file.summary.kind != "text":
        raise _refused("training_file", asked.training_file, "it must hold conversations to be shown token by token")
    base = find_base(jobs.fine_tuning.resolve_start(asked.model, caller.account, caller.may_use)[1])
    tokenizer = load_tokenizer(base)
    rows = preview(jobs.files.path(file), file.filename, tokenizer, asked.top_k, base.context_length)
    kinds = {_FORMATS.get(name, "instruction") for name in file.summary.format.split("+")}
    return Preview(
        dataset_format=kinds.pop() if len(kinds) == 1 else "conversation", model=asked.model, train_on_inputs=False,
        max_seq_length=resolve_max_length("auto", base.context_length),
        rows=[_row(row, [tokenizer.decode([token]) for token in row.input_ids]) for row in rows],
    )  # fmt: skip


def _row(row: PreviewedRow, tokens: list[str]) -> PreviewRow:
    return PreviewRow(
        input_ids=list(row.input_ids), labels=list(row.labels), tokens=tokens, num_tokens=len(row.input_ids),
        num_trained_tokens=sum(span.end - span.start for span in row.trained_spans),
        trained_spans=[[span.start, span.end] for span in row.trained_spans], too_long=row.too_long,
    )  # fmt: skip


@router.get("/v1/finetune/download", responses={**ERRORS, 200: ARCHIVE}, response_class=Response)
def download(
    request: Request, ft_id: str, checkpoint: Literal["adapter", "merged", "model_output_path"] = "adapter",
    checkpoint_step: int = 0,
) -> Response:  # fmt: skip
    """Return what a job made: the adapter as PEFT files, or merged into its base; of a step, the adapter as it was."""
    caller, jobs = caller_of(request), jobs_of(request)
    job = jobs.fine_tuning.find(ft_id, caller.account)
    if checkpoint_step:
        return archive_reply(jobs, job, caller, "adapter", checkpoint_step)
    return archive_reply(jobs, job, caller, "adapter" if checkpoint == "adapter" else "merged")


def _refused(field: str, given: object, why: str) -> ApiError:
    return ApiError(400, f"{field!r} cannot be {str(given)[:80]!r}: {why}.", param=field, code="invalid_value")
