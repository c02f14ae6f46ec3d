"""Opens a base for serving: loads it, chooses the fast runner if it supports the model, and starts the engine.

Whether the fast runner computes what the model does is measured: its logits are compared with the model's own on a
short probe, and on one that is longer than everything that begins late in a text, where that takes a second or so. If
they differ, or the model is of another kind, the slow runner serves it, and the reason is given. The plan and the
model's logits on the short probe are cached: the next start reads the weights without building the model, which takes
transformers several seconds, and is compared with the same logits.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from haori.bases.remembered import recall, remember
from haori.core.errors import BaseError, InputError
from haori.core.records import Record
from haori.serve.adapters.reading import AdapterWeights, read_adapter_weights
from haori.serve.adapters.tiers import PinnedAdapters
from haori.serve.engine.engine import TextEngine
from haori.serve.engine.runner import Run, Runner
from haori.serve.engine.scheduler import EngineLimits
from haori.serve.kernels.native import native_kernels
from haori.serve.kernels.onednn import remember_few_shapes
from haori.serve.kernels.openmp import let_workers_go
from haori.serve.models.base_files import BaseFiles, names_in_files
from haori.serve.models.llama_config import long_probe_tokens
from haori.serve.models.llama_plan import LlamaPlan, plan_llama, why_not_llama
from haori.serve.models.llama_runner import LlamaRunner
from haori.serve.models.llama_weights import lay_out_llama
from haori.serve.models.reference_runner import ReferenceRunner, can_serve, is_transposed
from haori.serve.models.weight import WeightFormat

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library import AdapterFiles

__all__ = ["OpenedRunner", "open_engine", "open_runner"]

_PROBE_TOKENS = 16
_PROBE_WORK = 1e11  # tokens times parameters of the long probe
_CHUNK = 256  # tokens of it in one step
_PROBE_LOGITS = 1024
# Difference of logits allowed, root mean square, as a share of their standard deviation: what rounding does to them.
_TOLERANCES: dict[WeightFormat, float] = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.2, "int4": 0.7}


class _Known(Record):
    """What an earlier start learned about a base, with the probes of that version."""

    probes: Literal[2]
    plan: LlamaPlan
    vocabulary: int
    end_tokens: tuple[int, ...]
    probe: tuple[float, ...]


@dataclass(frozen=True)
class OpenedRunner:
    """A runner with what belongs to it.

    Attributes:
        runner: Computes logits.
        tensors: The base, as reading adapters sees it.
        dtype: Of activations and adapters.
        form: Format of the weights.
        vocabulary: Width of the logits.
        end_tokens: Ids that end an answer by the model's configuration.
        slow_because: Why the slow runner was taken, or None.
    """

    runner: Runner
    tensors: BaseFiles
    dtype: torch.dtype
    form: WeightFormat
    vocabulary: int
    end_tokens: tuple[int, ...]
    slow_because: str | None


def open_engine(
    base: "Base",
    files_of: "Callable[[str], AdapterFiles]",
    limits: EngineLimits,
    *,
    weights: str = "auto",
    cache_bytes: int,
    pinned: PinnedAdapters = tuple,
    say: Callable[[str], None] = lambda _: None,
) -> TextEngine:
    """Load a base and start an engine over it.

    Args:
        base: The base.
        files_of: Finds an adapter's files by its content id.
        limits: What the engine takes on; its context length is lowered to the base's.
        weights: `auto`, `fp32`, `bf16`, `int8` or `int4`.
        cache_bytes: Memory for keys and values.
        pinned: Adapters that are never evicted.
        say: Takes sentences for people.

    Raises:
        BaseError: The base cannot be loaded, or generates no text.
        InputError: The format is unknown.
    """
    from haori.bases import load_tokenizer, stop_tokens

    limits = replace(limits, context_length=min(limits.context_length, base.context_length))
    tokenizer = load_tokenizer(base)
    opened = open_runner(base, limits, weights=weights, cache_bytes=cache_bytes)
    if opened.slow_because is not None:
        say(f"{base.name} is served by the slow runner, one request at a time: {opened.slow_because}.")

    let_workers_go()  # this thread has loaded the model; the engine's own computes

    def read(files: "AdapterFiles", adapter: str) -> AdapterWeights:
        return read_adapter_weights(files, opened.tensors, adapter=adapter, dtype=opened.dtype)

    engine = TextEngine(
        base, tokenizer, opened.runner, files_of, read,
        stop_tokens=frozenset(stop_tokens(opened.end_tokens, tokenizer)), limits=limits,
        vocabulary=opened.vocabulary, pinned=pinned,
    )  # fmt: skip
    if find_spec("llguidance") is not None:
        threading.Thread(target=engine.prepare_constraints, name="haori-constraints", daemon=True).start()
    return engine


def open_runner(base: "Base", limits: EngineLimits, *, weights: str = "auto", cache_bytes: int) -> OpenedRunner:
    """Load a base into a runner.

    Args:
        base: The base.
        limits: Only its context length is used here.
        weights: Format of the weights.
        cache_bytes: Memory for keys and values.

    Raises:
        BaseError: The base cannot be loaded, or generates no text.
        InputError: The format is unknown, or the memory too small.
    """
    remember_few_shapes()
    form = _format(weights)
    dtype = torch.float32 if form == "fp32" else torch.bfloat16
    topic = f"llama-{'fp32' if form == 'fp32' else 'bf16'}"
    known = recall(topic, base, _Known)
    if known is not None:
        tensors = _files_of_plan(base, known.plan)
        runner = _fast_runner(known.plan, tensors.tensor, form, dtype, limits, cache_bytes)
        probe = _probe(known.vocabulary, _PROBE_TOKENS)
        if _difference(runner, probe, known.vocabulary, torch.tensor(known.probe)) <= _TOLERANCES[form]:
            return OpenedRunner(runner, tensors, dtype, form, known.vocabulary, known.end_tokens, None)
        del runner
    return _open_by_model(base, limits, form, dtype, cache_bytes, topic)


def _open_by_model(
    base: "Base", limits: EngineLimits, form: WeightFormat, dtype: torch.dtype, cache_bytes: int, topic: str
) -> OpenedRunner:
    """Load the model itself, and check whether the fast runner computes the same."""
    from haori.bases import end_tokens, load_model

    number_format: WeightFormat = "fp32" if form == "fp32" else "bf16"
    model: Any = load_model(base, dtype=number_format, device="cpu")
    if not model.can_generate():
        raise BaseError(f"The base {base.name!r} is an encoder and generates no text; it can serve embeddings only.")
    vocabulary, ends = int(model.get_output_embeddings().weight.shape[0]), tuple(end_tokens(model))
    reason = why_not_llama(model)
    if reason is None:
        probes = [_probe(vocabulary, length) for length in _probe_lengths(model, limits)]
        wanted = [_model_logits(model, probe, vocabulary) for probe in probes]
        plan = plan_llama(model)
        tensors = _files_of_plan(base, plan)
        own = tensors.are_there  # else transformers renames them when it loads
        if not own:
            tensors = _files_of_model(base, model, plan.linears)
        tensor_of = tensors.tensor if own else dict(model.named_parameters(remove_duplicate=False)).__getitem__
        del model
        runner = _fast_runner(plan, tensor_of, form, dtype, limits, cache_bytes)
        difference = max(
            _difference(runner, probe, vocabulary, logits) for probe, logits in zip(probes, wanted, strict=True)
        )
        if difference <= _TOLERANCES[form]:
            if own:
                known = _Known(
                    probes=2, plan=plan, vocabulary=vocabulary, end_tokens=ends, probe=tuple(wanted[0].tolist())
                )
                remember(topic, base, known)
            return OpenedRunner(runner, tensors, dtype, form, vocabulary, ends, None)
        reason = f"the fast runner's logits are off by {difference:.2g} standard deviations"
        model = load_model(base, dtype=number_format, device="cpu")
    slow = _slow_runner(base, model, vocabulary, cache_bytes)
    tensors = _files_of_model(base, model, slow.linears)
    return OpenedRunner(slow, tensors, dtype, number_format, vocabulary, ends, reason)


def _files_of_plan(base: "Base", plan: LlamaPlan) -> BaseFiles:
    """Return the base's weights, named in the files as in the model."""
    embedding = f"{plan.embedding}.weight"
    names = {name: name for name in plan.parameters}
    names.setdefault(plan.head_name, embedding)
    head = plan.head_name.removesuffix(".weight")
    return BaseFiles(base.path, plan.linears, names=names, tables=(embedding, plan.head_name), head=head)


def _files_of_model(base: "Base", model: Any, linears: dict[str, tuple[int, int]]) -> BaseFiles:
    """Return the base's weights by the names of its model, wherever the files name them otherwise."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = [f"{name}.weight" for name, module in model.named_modules() if any(module is end for end in ends)]
    transposed = [name for name in linears if is_transposed(model.get_submodule(name))]
    names = names_in_files(model, base.path)
    head = next((n for n, module in model.named_modules() if module is ends[1] and f"{n}.weight" in names), None)
    return BaseFiles(base.path, linears, names=names, transposed=transposed, tables=tables, head=head)


def _slow_runner(base: "Base", model: Any, vocabulary: int, cache_bytes: int) -> ReferenceRunner:
    """Open the slow runner, and check that its logits token by token are the model's at once.

    Raises:
        BaseError: It does not: the model keeps what came before in a way of its own.
    """
    if not can_serve(model):
        raise BaseError(
            f"The base {base.name!r} is a {type(model).__name__}, which keeps what it has read in a state that belongs "
            "to no request, so it cannot be served; haori chat, generate-text and evaluate use it."
        )
    probe = _probe(vocabulary, _PROBE_TOKENS)
    wanted = _model_logits(model, probe, vocabulary)
    runner = ReferenceRunner(model, cache_bytes=cache_bytes)
    # Two ways of rounding send a token to other experts: that is far from a state that was lost, but not near.
    if (off := _difference(runner, probe, vocabulary, wanted)) > (1e-3 if model.dtype == torch.float32 else 1.0):
        raise BaseError(
            f"The base {base.name!r} ({type(model).__name__}) gives other logits token by token than at once (off by "
            f"{off:.2g} standard deviations), so it cannot be served; haori generate-text and evaluate use it."
        )
    return runner


def _fast_runner(
    plan: LlamaPlan,
    tensor_of: Callable[[str], Tensor],
    form: WeightFormat,
    dtype: torch.dtype,
    limits: EngineLimits,
    cache_bytes: int,
) -> LlamaRunner:
    laid_out = lay_out_llama(plan, tensor_of, form, dtype, limits.context_length)
    kernels = native_kernels() if dtype == torch.bfloat16 else None
    return LlamaRunner(laid_out, cache_bytes=cache_bytes, kernels=kernels)


def _probe_lengths(model: Any, limits: EngineLimits) -> list[int]:
    """Return the lengths of the short probe and, if there is one to be made, of the long one."""
    length = min(long_probe_tokens(model.config) + _PROBE_TOKENS, limits.context_length)
    parameters = sum(value.numel() for value in model.parameters())
    is_needed = long_probe_tokens(model.config) > 0 and length > _PROBE_TOKENS
    return [_PROBE_TOKENS, length] if is_needed and length * parameters <= _PROBE_WORK else [_PROBE_TOKENS]


def _probe(vocabulary: int, length: int) -> list[int]:
    return [number * 37 % vocabulary for number in range(length)]


def _model_logits(model: Any, probe: list[int], vocabulary: int) -> Tensor:
    """Return what the model itself gives after a probe, for the ids that are compared."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([probe]), use_cache=False).logits[0, -1].float()
    return logits[_sample(vocabulary)]


def _sample(vocabulary: int) -> Tensor:
    """Return the ids whose logits are compared."""
    return torch.arange(0, vocabulary, max(vocabulary // _PROBE_LOGITS, 1))


def _format(weights: str) -> WeightFormat:
    from haori.bases.dtype import choose_dtype

    if weights == "auto":
        return "fp32" if choose_dtype("auto", "cpu").name == "fp32" else "bf16"
    for known in _TOLERANCES:
        if weights == known:
            return known
    raise InputError(f"Weights cannot be {weights!r}; choose auto, {', '.join(_TOLERANCES)}.")


def _difference(runner: Runner, probe: list[int], vocabulary: int, wanted: Tensor) -> float:
    """Return the difference of the logits to the model's, in standard deviations, after prefill and a decode step."""
    slot = runner.cache.open(len(probe))
    if slot is None:
        if len(probe) > _PROBE_TOKENS:
            return 0.0  # so long a text will not be served either
        raise InputError("The memory for keys and values (--kv-memory) is too small for a single request.")
    last = len(probe) - 1
    try:
        starts = [0, *range(len(probe) // 2 % _CHUNK or _CHUNK, last, _CHUNK)]
        for start, stop in zip(starts, [*starts[1:], last], strict=True):
            runner.step([Run(slot, start, probe[start:stop], (), wants_logits=False)])
        logits = runner.step([Run(slot, last, probe[last:], ())])[0].float()
    finally:
        runner.cache.close(slot)
    difference = (logits[_sample(vocabulary)] - wanted).square().mean().sqrt() / wanted.std()
    return float(difference) if torch.isfinite(difference) else float("inf")
