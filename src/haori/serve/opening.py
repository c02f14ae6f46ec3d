"""Opens a base for serving: loads it, takes the fast runner if it understands the model, and starts the engine.

Whether the fast runner understood a model is measured: it must give the logits that the model itself gave for a short
probe. If it does not, or the model is of another kind, the slow runner serves it and the reason is said.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from haori.core.errors import BaseError, InputError
from haori.serve.adapter_tiers import PinnedAdapters
from haori.serve.adapter_weights import AdapterWeights, read_adapter_weights
from haori.serve.engine import TextEngine
from haori.serve.llama_runner import LlamaRunner
from haori.serve.llama_weights import read_llama, why_not_llama
from haori.serve.native.calls import native_kernels
from haori.serve.openmp import let_workers_go
from haori.serve.reference_runner import ReferenceRunner
from haori.serve.runner import Run, Runner
from haori.serve.scheduler import EngineLimits
from haori.serve.weight import WeightFormat

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library import AdapterFiles

__all__ = ["OpenedRunner", "open_engine", "open_runner"]

_PROBE_TOKENS = 16
# Difference of logits allowed, root mean square, as a share of their standard deviation: what rounding does to them.
_TOLERANCES: dict[WeightFormat, float] = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.2, "int4": 0.7}


@dataclass(frozen=True)
class OpenedRunner:
    """A runner with what belongs to it.

    Attributes:
        runner: Computes logits.
        tensors: The base, as reading adapters sees it.
        dtype: Of activations and adapters.
        form: Format of the weights.
        vocabulary: Width of the logits.
        slow_because: Why the slow runner was taken, or None.
    """

    runner: Runner
    tensors: "BaseFiles"
    dtype: torch.dtype
    form: WeightFormat
    vocabulary: int
    slow_because: str | None


class BaseFiles:
    """The weights of a base on disk, and which of its linear layers take updates."""

    def __init__(self, folder: Path, linears: dict[str, tuple[int, int]]) -> None:
        from haori.core.safetensors_header import read_safetensors_header

        self._linears = linears
        self._open: dict[Path, Any] = {}  # DoRA reads every weight it changes
        self._file_of = {
            name: path
            for path in sorted(folder.glob("*.safetensors"))
            for name in read_safetensors_header(path).tensors
        }

    @property
    def names(self) -> Collection[str]:
        """Full names of all parameters."""
        return self._file_of.keys()

    def linear(self, name: str) -> tuple[int, int] | None:
        """Return (D_out, D_in) of a linear module that takes updates."""
        return self._linears.get(name)

    def tensor(self, name: str) -> Tensor:
        """Read one parameter."""
        from safetensors import safe_open

        path = self._file_of[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor


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
        pinned: Adapters that are never put out of memory.
        say: Takes sentences for people.

    Raises:
        BaseError: The base cannot be loaded, or generates no text.
        InputError: The format is unknown.
    """
    from haori.bases import load_tokenizer
    from haori.bases.generation import stop_tokens

    limits = replace(limits, context_length=min(limits.context_length, base.context_length))
    tokenizer = load_tokenizer(base)
    stops: set[int] = set()

    def look(model: Any) -> None:
        stops.update(stop_tokens(model, tokenizer))

    opened = open_runner(base, limits, weights=weights, cache_bytes=cache_bytes, look=look)
    if opened.slow_because is not None:
        say(f"{base.name} is served by the slow runner, one request at a time: {opened.slow_because}.")

    let_workers_go()  # this thread has loaded the model; the engine's own computes

    def read(adapter: str) -> AdapterWeights:
        return read_adapter_weights(files_of(adapter), opened.tensors, adapter=adapter, dtype=opened.dtype)

    return TextEngine(
        base, tokenizer, opened.runner, read,
        stop_tokens=frozenset(stops), limits=limits, vocabulary=opened.vocabulary, pinned=pinned,
    )  # fmt: skip


def open_runner(
    base: "Base",
    limits: EngineLimits,
    *,
    weights: str = "auto",
    cache_bytes: int,
    look: Callable[[Any], None] = lambda _: None,
) -> OpenedRunner:
    """Load a base into a runner.

    Args:
        base: The base.
        limits: Its context length is what counts here.
        weights: Format of the weights.
        cache_bytes: Memory for keys and values.
        look: Is shown the model while it is whole.
    """
    from haori.bases import load_model

    form = _format(weights)
    model: Any = load_model(base, dtype="fp32" if form == "fp32" else "bf16", device="cpu")
    if not model.can_generate():
        raise BaseError(f"The base {base.name!r} is an encoder and generates no text; it can serve embeddings only.")
    look(model)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not model.get_output_embeddings()
    }
    tensors = BaseFiles(base.path, linears)
    probe = torch.arange(_PROBE_TOKENS) * 37 % vocabulary
    with torch.no_grad():
        wanted = model(input_ids=probe[None]).logits[0, -1].float()
    reason = why_not_llama(model)
    dtype = model.dtype
    if reason is None:
        laid_out = read_llama(model, form, limits.context_length)
        del model
        kernels = native_kernels() if dtype == torch.bfloat16 else None
        runner = LlamaRunner(laid_out, cache_bytes=cache_bytes, kernels=kernels)
        difference = _difference(runner, probe.tolist(), wanted)
        if difference <= _TOLERANCES[form]:
            return OpenedRunner(runner, tensors, dtype, form, vocabulary, None)
        reason = f"the fast runner's logits are off by {difference:.2g} standard deviations"
        model = load_model(base, dtype="fp32" if form == "fp32" else "bf16", device="cpu")
    slow = ReferenceRunner(model, cache_bytes=cache_bytes)
    return OpenedRunner(slow, tensors, dtype, "fp32" if form == "fp32" else "bf16", vocabulary, reason)


def _format(weights: str) -> WeightFormat:
    from haori.bases.dtype import choose_dtype

    if weights == "auto":
        return "fp32" if choose_dtype("auto", "cpu").name == "fp32" else "bf16"
    for known in _TOLERANCES:
        if weights == known:
            return known
    raise InputError(f"Weights cannot be {weights!r}; choose auto, {', '.join(_TOLERANCES)}.")


def _difference(runner: LlamaRunner, probe: list[int], wanted: Tensor) -> float:
    """Return how far the runner's logits are from the model's, in standard deviations; the probe comes in pieces."""
    place = runner.cache.open(len(probe))
    if place is None:
        raise InputError("The memory for keys and values (--kv-memory) is too small for a single request.")
    try:
        half = len(probe) // 2
        runner.step([Run(place, 0, probe[:half], (), wants_logits=False)])
        runner.step([Run(place, half, probe[half:-1], (), wants_logits=False)])
        found = runner.step([Run(place, len(probe) - 1, probe[-1:], ())])[0].float()
    finally:
        runner.cache.close(place)
    difference = (found - wanted).square().mean().sqrt() / wanted.std()
    return float(difference) if torch.isfinite(difference) else float("inf")
