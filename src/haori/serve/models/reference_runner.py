"""The slow twin: any transformers causal language model, one sequence at a time.

It is the oracle of the fast runner's tests, and serves models that the fast one does not know. Each linear layer adds
the updates of the sequence's mix by the formula itself; keys and values are in transformers' own cache.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haori.core.errors import MismatchError
from haori.core.model_config import rotary_changes_with_length
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate
from haori.serve.engine.runner import LOGIT_ROWS, Run
from haori.serve.request import AdapterMix

__all__ = ["ReferenceRunner", "can_serve", "is_transposed"]


class _Held:
    """The state of a sequence: its cache, and tokens that were not computed yet."""

    def __init__(self, cache: Any, *, turns_with_length: bool) -> None:
        self.cache = cache
        is_recurrent = any(isinstance(layer, _recurrent_layers()) for layer in cache.layers)
        self._at_once = is_recurrent or turns_with_length
        self._is_begun = False
        self._waiting: list[int] = []

    def splits(self, run: Run) -> list[list[int]]:
        """Return the tokens to compute now, split as the model needs them.

        A recurrent layer starts from nothing when it reads more than one token, and rotary angles that change with
        length are those of the whole prompt: these get the prompt at once, and then token by token.
        """
        if not self._at_once:
            return [list(run.tokens)]
        self._waiting += run.tokens
        if not run.wants_logits:
            return []
        tokens, self._waiting = self._waiting, []
        if self._is_begun:
            return [[token] for token in tokens]
        self._is_begun = True
        return [tokens]


class _Caches:
    """A cache of transformers for each sequence; memory is counted by tokens asked for."""

    def __init__(self, model: Any, budget_bytes: int) -> None:
        self._config = config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(heads, int):
            shared = getattr(config, "num_key_value_heads", None)
            width = getattr(config, "head_dim", None) or config.hidden_size // heads
            size = width * (shared if isinstance(shared, int) else heads)
        else:
            size = config.hidden_size  # of no attention: counted as if it were
        self._turns = rotary_changes_with_length(config)
        self._token_bytes: int = 2 * config.num_hidden_layers * size * model.dtype.itemsize
        self.budget_bytes = budget_bytes
        self.held: dict[int, _Held] = {}
        self._tokens: dict[int, int] = {}
        self._next = 0

    @property
    def used_bytes(self) -> int:
        """Memory held by sequences under way."""
        return sum(self._tokens.values()) * self._token_bytes

    def open(self, tokens: int) -> int | None:
        """Begin a sequence."""
        from transformers import DynamicCache

        if self.used_bytes + tokens * self._token_bytes > self.budget_bytes:
            return None
        self._next += 1
        self.held[self._next] = _Held(DynamicCache(config=self._config), turns_with_length=self._turns)
        self._tokens[self._next] = tokens
        return self._next

    def extend(self, sequence: int, tokens: int) -> bool:
        """Make room for so many tokens."""
        more = max(tokens - self._tokens[sequence], 0)
        if self.used_bytes + more * self._token_bytes > self.budget_bytes:
            return False
        self._tokens[sequence] += more
        return True

    def close(self, sequence: int) -> None:
        """Forget a sequence."""
        del self.held[sequence], self._tokens[sequence]

    def take(self, sequence: int, start: int, stop: int) -> None:
        """Return nothing: the layout of the cache is the model's own."""

    def put(self, sequence: int, start: int, block: Tensor) -> None:
        """Never called, since `take` gives nothing."""
        raise NotImplementedError


class _Bank:
    """The adapters, as they were read.

    Args:
        sites: Names of the linear modules, norm weights and tables that can be changed.
    """

    def __init__(self, sites: Collection[str]) -> None:
        self._sites = frozenset(sites)
        self.held: dict[str, AdapterWeights] = {}

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """Refuse an adapter that this model cannot have."""
        if lost := sorted({*weights.updates, *weights.vectors, *weights.token_rows} - self._sites):
            raise MismatchError(
                f"The adapter {weights.id[:19]} changes {lost[0]!r}, which cannot be changed per request here; merge "
                "it with `haori merge` and serve the merged model."
            )
        return weights

    def put(self, adapter: AdapterWeights) -> None:
        """Keep an adapter."""
        self.held[adapter.id] = adapter

    def drop(self, adapter: str) -> None:
        """Forget an adapter."""
        del self.held[adapter]


class ReferenceRunner:
    """Computes logits with the model's own forward.

    Args:
        model: A causal language model, which gets hooks on its linear layers, norms and embedding.
        cache_bytes: Memory for keys and values.
    """

    def __init__(self, model: Any, *, cache_bytes: int) -> None:
        self.cache = _Caches(model, cache_bytes)
        self._model = model
        self._mix: AdapterMix = ()
        self._outcomes: dict[tuple[int, int], Tensor | Exception] = {}
        self._cache_name = _cache_name(model) or "past_key_values"
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        self._head_tables = [names[id(head)]] + ([names[id(embedding)]] if head.weight is embedding.weight else [])
        self.linears: dict[str, tuple[int, int]] = {}
        sites: list[str] = []
        for name, module in _called(model):
            sites += self._hook(name, module, is_head=module is head)
        self.bank = _Bank(sites)

    @torch.no_grad()
    def step(self, runs: Sequence[Run]) -> Tensor:
        """Compute one step, sequence by sequence; if one raises, the others' outcomes are kept for the next call."""
        keys = [(run.sequence, run.start) for run in runs]
        for key, run in zip(keys, runs, strict=True):
            if key not in self._outcomes:
                self._outcomes[key] = self._outcome(run)
        outcomes = [self._outcomes[key] for key in keys]
        failed = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
        if failed is None or len(runs) == 1:
            for key in keys:
                del self._outcomes[key]
        if failed is not None:
            raise failed
        found = [outcome for run, outcome in zip(runs, outcomes, strict=True) if run.wants_logits]
        return torch.stack([logits for logits in found if isinstance(logits, Tensor)]) if found else torch.empty(0, 0)

    def _outcome(self, run: Run) -> Tensor | Exception:
        """Return the logits after the last token of a run, or what was raised; its cache cannot be taken back."""
        self._mix = run.adapters
        try:
            held = self.cache.held[run.sequence]
            logits = torch.empty(1, 0)  # T V
            splits = held.splits(run)
            position = run.start + len(run.tokens) - sum(map(len, splits))
            for tokens in splits:
                ids = torch.tensor([tokens], device=next(self._model.parameters()).device)
                given = {self._cache_name: held.cache}
                logits = self._model(input_ids=ids, use_cache=True, **given).logits[0]
                if run.take_logits is not None:
                    for start in range(0, len(tokens), LOGIT_ROWS):
                        run.take_logits(position + start, logits[start : start + LOGIT_ROWS])
                position += len(tokens)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is this sequence's alone
            return error
        finally:
            self._mix = ()
        return logits[-1]

    def _hook(self, name: str, module: nn.Module, *, is_head: bool) -> list[str]:
        """Let adapters change a module; return the names of what they can change."""
        if size := _linear_size(module):
            module.register_forward_hook(self._linear_hook(name))
            if is_head:
                module.register_forward_hook(self._head_hook())
                return [f"{name}.weight", name]
            self.linears[name] = size
            return [name]
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(self._embedding_hook(f"{name}.weight"))
            return [f"{name}.weight"]
        own = dict(module.named_parameters(recurse=False))
        if list(module.children()) or not own:
            return []
        self._wrap_norm(name, module)
        return [f"{name}.{part}" for part, value in own.items() if value.dim() == 1]

    def _head_hook(self) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            result = output
            for adapter, strength in self._mix:
                tables = self.bank.held[adapter].token_rows
                found = next((tables[name] for name in self._head_tables if name in tables), None)
                if found is not None:
                    ids, rows = found
                    result = result.clone()
                    result[..., ids] += strength * (inputs[0] @ rows.to(inputs[0].dtype).T)
            return result

        return hook

    def _linear_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            result = output
            for adapter, strength in self._mix:
                update = self.bank.held[adapter].updates.get(name)
                if update is not None:
                    result = result + strength * _update(update, inputs[0], output, module.bias)
            return result

        return hook

    def _embedding_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            result = output
            for adapter, strength in self._mix:
                for key, (ids, rows) in self.bank.held[adapter].token_rows.items():
                    if key == name:
                        hit, which = (inputs[0][..., None] == ids).nonzero()[:, 1:].unbind(1)
                        result = result.clone()
                        result[0, hit] += strength * rows[which].to(result.dtype)
            return result

        return hook

    def _wrap_norm(self, name: str, module: nn.Module) -> None:
        """Let the weight and the bias of a norm be those of the mix while it runs."""
        stock = module.forward
        held = dict(module.named_parameters(recurse=False))

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            for part, base in held.items():
                value: Tensor = base
                for adapter, strength in self._mix:
                    change = self.bank.held[adapter].vectors.get(f"{name}.{part}")
                    value = value if change is None else value + strength * change.to(base.dtype)
                setattr(module, part, nn.Parameter(value.detach(), requires_grad=False))
            try:
                normed: Tensor = stock(x, *args, **kwargs)
            finally:
                for part, base in held.items():
                    setattr(module, part, base)
            return normed

        module.forward = forward


def can_serve(model: Any) -> bool:
    """Say whether a model takes its cache as an argument, so that each request can have its own."""
    return _cache_name(model) is not None


def is_transposed(module: nn.Module) -> bool:
    """Say whether a linear module keeps its weight as (D_in, D_out), as those of GPT-2 do."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _linear_size(module: Any) -> tuple[int, int] | None:
    """Return (D_out, D_in) of a linear module, or None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.weight.shape[1], module.weight.shape[0]) if is_transposed(module) else None


def _cache_name(model: Any) -> str | None:
    """Return the argument by which a model takes its cache: that of attention, or that of Mamba."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in known), None)


def _recurrent_layers() -> tuple[type, ...]:
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    return (LinearAttentionCacheLayerMixin,)


@torch.no_grad()
def _called(model: Any) -> list[tuple[str, nn.Module]]:
    """Return the modules that are called; the model reads the weights of others itself, so no hook would act on them.

    An expert to which no token of the short row is routed may be called later.
    """
    seen: set[int] = set()
    hooks = [module.register_forward_pre_hook(lambda module, _: seen.add(id(module))) for module in model.modules()]
    try:
        model(input_ids=torch.tensor([[0, 1, 2]], device=next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [(name, module) for name, module in model.named_modules() if id(module) in seen or "expert" in name]


def _update(update: ModuleUpdate, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return what an adapter at strength 1 adds to y = W x + bias."""
    change = torch.zeros_like(y)
    if update.output_scale is not None:
        plain = y if bias is None else y - bias
        change = (update.output_scale.to(y.dtype) - 1) * plain
    if update.a is not None and update.b is not None:
        change = change + (x @ update.a.to(x.dtype).T) @ update.b.to(x.dtype)
    if update.bias is not None:
        change = change + update.bias.to(y.dtype)
    return change
