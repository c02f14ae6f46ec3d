"""The slow twin: any transformers causal language model, one sequence at a time.

It is the oracle of the fast runner's tests, and serves models that the fast one does not know. Each linear layer adds
the updates of the sequence's mix by the formula itself; keys and values are in transformers' own cache.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from haori.core.errors import MismatchError
from haori.serve.adapter_weights import AdapterWeights, ModuleUpdate
from haori.serve.request import AdapterMix
from haori.serve.runner import Run

__all__ = ["ReferenceRunner"]


class _Caches:
    """A cache of transformers for each sequence; memory is counted by tokens asked for."""

    def __init__(self, token_bytes: int, budget_bytes: int) -> None:
        self._token_bytes = token_bytes
        self.budget_bytes = budget_bytes
        self.held: dict[int, Any] = {}
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
        self.held[self._next] = DynamicCache()
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
        """Nothing can be taken out: the cache's layout is the model's own."""

    def put(self, sequence: int, start: int, block: Tensor) -> None:
        """Never called, since `take` gives nothing."""
        raise NotImplementedError


class _Bank:
    """The adapters, as they were read."""

    def __init__(self, model: Any) -> None:
        self._linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._vectors = {name for name, value in model.named_parameters() if value.dim() == 1}
        self.held: dict[str, AdapterWeights] = {}

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """Refuse an adapter that this model cannot have."""
        lost = sorted((set(weights.updates) - self._linears) | (set(weights.vectors) - self._vectors))
        if lost:
            raise MismatchError(f"The adapter {weights.id[:19]} changes {lost[0]!r}, which this model does not have.")
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
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
        self.cache = _Caches(size, cache_bytes)
        self.bank = _Bank(model)
        self._model = model
        self._mix: AdapterMix = ()
        self._outcomes: dict[tuple[int, int], Tensor | Exception] = {}
        for name, module in model.named_modules():
            self._hook(name, module)

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
        ids = torch.tensor([list(run.tokens)], device=next(self._model.parameters()).device)
        self._mix = run.adapters
        try:
            cache = self.cache.held[run.sequence]
            logits: Tensor = self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        except Exception as error:  # noqa: BLE001 - whatever it was, it is this sequence's alone
            return error
        finally:
            self._mix = ()
        return logits

    def _hook(self, name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.register_forward_hook(self._linear_hook(name))
        elif isinstance(module, nn.Embedding):
            module.register_forward_hook(self._embedding_hook(f"{name}.weight"))
        elif not list(module.children()) and dict(module.named_parameters(recurse=False)):
            self._wrap_norm(name, module)

    def _linear_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            x = inputs[0]
            result = output
            for adapter, strength in self._mix:
                weights = self.bank.held[adapter]
                update = weights.updates.get(name)
                if update is not None:
                    result = result + strength * _update(update, x, output, module.bias)
                for key, (ids, rows) in weights.token_rows.items():
                    if module.weight is self._model.get_parameter(key):  # a head that is tied to the embedding
                        result = result.clone()
                        result[..., ids] += strength * (x @ rows.to(x.dtype).T)
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
