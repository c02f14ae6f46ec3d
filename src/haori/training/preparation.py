"""Everything a run needs before the first step, checked in the order of cost: names, base, targets, data."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import BaseError, MissingExtraError, RecipeError
from haori.core.methods import FullMethod, HeadMethod, LoraMethod, LowRankMethod, Method, QloraMethod
from haori.library.adapter_names import check_no_base_name
from haori.tasks.recipe import Recipe
from haori.tasks.registry import check_components, task_of
from haori.tasks.task import Choice, Objective, Split, Task
from haori.training.auto import resolve
from haori.training.batches import count_steps, epoch_steps
from haori.training.continuing import Origin, find_origin, locate_origin
from haori.training.memory import size_in_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from haori.bases import Base

_RESIDUAL = ("pissa", "olora")

__all__ = ["Prepared", "adapted_model", "planned_steps", "prepare", "total_parameters"]


class Prepared(NamedTuple):
    """A run that may start."""

    recipe: Recipe
    choices: tuple[Choice, ...]
    base: "Base"
    task: Task
    processor: Any
    split: Split
    train: Objective
    validation: Objective | None
    targets: tuple[str, ...]
    device: str
    origin: Origin | None = None
    """The adapter that training goes on from."""


def prepare(recipe: Recipe) -> Prepared:
    """Find the base, check the targets against its structure, load the data, and resolve `auto` values.

    Raises:
        HaoriError: Anything that would make the run fail or be worthless.
    """
    from haori.adapters.insertion import in_layers
    from haori.adapters.methods import check_method, check_plan
    from haori.bases import choose_dtype, default_device, find_base, resolve_targets

    device = default_device()
    if recipe.training.dtype == "fp16" and device == "cpu":
        raise RecipeError("'training.dtype' cannot be 'fp16' on a CPU; use bf16, fp32 or auto.")
    _check_residual(recipe)
    _check_trackers(recipe)
    base = find_base(recipe.base, revision=recipe.revision)
    if not isinstance(recipe.method, FullMethod):
        check_no_base_name(recipe.name, base.name)
    if base.quantization:
        raise BaseError(
            f"The base {base.name!r} is quantised ({base.quantization}); train on its 16- or 32-bit weights."
        )
    if recipe.from_ is not None:
        locate_origin(recipe.from_)
    task = task_of(recipe.task)
    check_components(base, task.components, f"the task {task.kind}", task.example)
    task.check(recipe, base)
    skeleton: Any = task.skeleton(base, recipe)
    method = recipe.method
    targets: tuple[str, ...] = ()
    if isinstance(method, HeadMethod) and task.head(recipe) is None:
        raise RecipeError(f"'method.kind' cannot be 'head' here: {task.title} has no head of its own to train.")
    if not isinstance(method, FullMethod | HeadMethod):
        targets = in_layers(resolve_targets(skeleton, task.target(recipe, base)), method.layers)
    processor = task.processor(base, recipe)
    if recipe.from_ is None:
        check_method(skeleton, processor, method, targets)
    split = task.rows(recipe, base, processor)
    recipe, of_task = task.resolve(recipe, split, base, device)
    head = task.head(recipe)
    skeleton = task.skeleton(base, recipe) if head is not None else skeleton
    origin = find_origin(recipe, base, skeleton, head, processor)
    if origin is not None:
        recipe = recipe.model_copy(update={"method": origin.method, "from_": origin.name})
        targets = origin.targets
    dtype = choose_dtype(recipe.training.dtype, device)
    if recipe.training.dtype == "auto" and (reason := _reason_for_32_bits(recipe.method)):
        dtype = dtype._replace(name="fp32", reason=reason)
    resolved, choices = resolve(recipe, len(split.train), base.parameters, (dtype.name, dtype.reason))
    train = task.objective(split.train, processor, resolved)
    validation = task.measured(split.validation, processor, resolved) if len(split.validation) else None
    check_plan(skeleton, resolved.method, targets, count_steps(train.costs, resolved.training))
    _check_calibration(resolved, train.costs)
    choices = (*choices, *of_task, *_notes(resolved.method, skeleton, resolved.training.dtype))
    return Prepared(resolved, choices, base, task, processor, split, train, validation, targets, device, origin)


def adapted_model(prepared: Prepared, device: str) -> "nn.Module":
    """Load the base and turn it into the model to train, as the recipe says."""
    from haori.adapters.insertion import Insertion
    from haori.adapters.loading import loading_of
    from haori.adapters.methods import insert_method

    recipe = prepared.recipe
    loading = loading_of(recipe.method, recipe.training.dtype)
    base: Any = prepared.task.model(
        prepared.base, recipe, dtype=loading.dtype, device=device, quantization=loading.quantization
    )
    if prepared.origin is not None:
        model: nn.Module = prepared.origin.attach(base, prepared.task.peft_type(recipe), prepared.base.name)
    else:
        batches = _FirstBatches(prepared, device)
        insertion = Insertion(recipe.training.seed, planned_steps(prepared), batches, prepared.task.peft_type(recipe))
        model = insert_method(base, prepared.processor, recipe.method, prepared.targets, insertion)
    if recipe.training.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model


def total_parameters(prepared: Prepared, trainable: int) -> int:
    """Return the weights of the base and, where others than its own are trained, those."""
    return prepared.base.parameters + (0 if isinstance(prepared.recipe.method, FullMethod) else trainable)


def planned_steps(prepared: Prepared) -> int:
    """Return the number of optimizer steps of a run that nothing ends early."""
    return count_steps(prepared.train.costs, prepared.recipe.training)


class _FirstBatches:
    """The microbatches of the first epoch, collated anew at every iteration."""

    def __init__(self, prepared: Prepared, device: str) -> None:
        self.prepared, self.device = prepared, device

    def __iter__(self) -> "Iterator[Mapping[str, Tensor]]":
        objective = self.prepared.train
        for step in epoch_steps(objective.costs, self.prepared.recipe.training, 0):
            for rows in step:
                yield objective.inputs(objective.batch(rows, self.device))


def _reason_for_32_bits(method: Method) -> str | None:
    """Say why the base must not be in 16 bits, if so.

    PEFT keeps what is trained of the base itself in the base's dtype, where AdamW's small steps would be rounded away.
    """
    if isinstance(method, FullMethod):
        return None
    if isinstance(method, HeadMethod):
        return "a head trained in full needs 32 bits"
    if method.modules_to_save or method.trainable_tokens or method.train_norms:
        return "modules and tokens trained in full need 32 bits"
    if isinstance(method, LowRankMethod) and method.bias != "none":
        return "biases trained in full need 32 bits"
    if isinstance(method, LoraMethod) and method.init in _RESIDUAL:
        return "what the start takes out of the base's weights must be put back without rounding"
    return None


def _check_residual(recipe: Recipe) -> None:
    method, dtype = recipe.method, recipe.training.dtype
    if isinstance(method, LoraMethod) and method.init in _RESIDUAL and dtype not in {"auto", "fp32"}:
        raise RecipeError(
            f"The start {method.init!r} takes a part out of the base's weights, and in {dtype} what is left would be "
            "rounded: the stored adapter would not be what was trained. Use training.dtype=fp32 or another start."
        )


def _check_calibration(recipe: Recipe, costs: "Sequence[int]") -> None:
    """Check that the batches a start is computed from are large enough."""
    from haori.adapters.lora_starts import eva_tokens, too_few_tokens

    method = recipe.method
    if isinstance(method, LoraMethod) and method.init == "eva":
        micros = [rows for step in epoch_steps(costs, recipe.training, 0) for rows in step]
        if max(sum(costs[row] for row in rows) for rows in micros) < eva_tokens(method):
            raise RecipeError(too_few_tokens(eva_tokens(method)))


def _notes(method: Method, skeleton: "PreTrainedModel", dtype: str) -> tuple[Choice, ...]:
    """Say what a method does on this base that its settings alone do not show."""
    quantised = (_quantised(method, skeleton, dtype),) if isinstance(method, QloraMethod) else ()
    return (*quantised, *_untouched_experts(skeleton, method))


def _untouched_experts(skeleton: "PreTrainedModel", method: Method) -> tuple[Choice, ...]:
    """Say that `all-linear` leaves out the experts of a mixture, where these are no linear modules."""
    from haori.adapters.insertion import expert_parameters

    experts = expert_parameters(skeleton)
    if isinstance(method, FullMethod | HeadMethod) or method.target != "all-linear" or not experts:
        return ()
    share = sum(experts.values()) / sum(parameter.numel() for parameter in skeleton.parameters())
    reason = (
        f"the experts are NOT adapted: {len(experts)} parameters such as {next(iter(experts))}, {share:.0%} of the "
        "weights, hold all experts of a layer in one and are no linear modules; attention and what else is linear is"
    )
    return (Choice("method.target", method.target, reason),)


def _quantised(method: QloraMethod, skeleton: "PreTrainedModel", dtype: str) -> Choice:
    """Say what quantising saves."""
    from haori.adapters.qlora import base_bytes

    before, after, label = base_bytes(skeleton, method, dtype)
    sizes = f"{size_in_words(after)} instead of {size_in_words(before)} in {dtype}"
    reason = f"{label}: the base's weights take {sizes}"
    return Choice("method.bits", method.bits, reason)


def _check_trackers(recipe: Recipe) -> None:
    for tracker in recipe.training.trackers:
        if find_spec(tracker) is None:
            raise MissingExtraError(f"The tracker {tracker!r} is not installed; run `pip install {tracker}`.")
