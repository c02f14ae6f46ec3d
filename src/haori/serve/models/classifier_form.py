"""What follows the encoder in transformers' own classifier: which weights it has, and the logits that it computes.

The classifier's class does the computing itself, with its encoder replaced by what the encoder has computed already,
so every architecture's pooling, dense layers and activations are its own. Whether that gives what the whole classifier
gives is measured once: some call their encoder in a way of their own.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from haori.core.errors import BaseError

__all__ = ["PROBE_LABELS", "ClassifierForm", "HiddenStates"]

PROBE_LABELS = 3  # no other width in a head is as small, so where a shape says 3, the number of labels stands
_TOLERANCE = {torch.float32: 1e-4}  # of logits near 1


class HiddenStates(NamedTuple):
    """What an encoder computed for some rows: ids and mask (B T), states (B T D), and its pooler's output (B D)."""

    ids: Tensor
    mask: Tensor
    states: Tensor
    pooled: Tensor | None

    def rows(self, rows: slice) -> "HiddenStates":
        """Return those of some rows, in fp32."""
        pooled = None if self.pooled is None else self.pooled[rows].float()
        return HiddenStates(self.ids[rows], self.mask[rows], self.states[rows].float(), pooled)


class ClassifierForm:
    """The head that transformers puts behind one encoder, for any number of labels.

    Args:
        classifier: The classifier for `PROBE_LABELS` labels without weights; it is changed.
        encoder: The encoder with its weights.
        probe: Token ids, B T.
        name: What errors call the base.

    Attributes:
        names: Full names of all parameters of the classifier.
        linears: (D_out, D_in) of the head's linear modules, for `PROBE_LABELS` labels.
        poolers: Full names of the parameters of the encoder's own pooler, which only a classifier uses.

    Raises:
        BaseError: The head computes something else from given hidden states than within the classifier.
    """

    def __init__(self, classifier: Any, encoder: Any, probe: Tensor, *, name: str) -> None:
        self._prefix = f"{classifier.base_model_prefix}."
        self.names = tuple(key for key, _ in classifier.named_parameters(remove_duplicate=False))
        self.poolers = tuple(key for key in self.names if key.startswith(f"{self._prefix}pooler."))
        self._computed = _Computed()
        self._classifier = classifier.eval()
        setattr(classifier, classifier.base_model_prefix, encoder)
        own = {key: value for key, value in classifier.named_parameters() if not key.startswith(self._prefix)}
        self._shapes = {key: tuple(value.shape) for key, value in own.items()}
        self.linears = {
            key: (module.out_features, module.in_features)
            for key, module in classifier.named_modules()
            if isinstance(module, nn.Linear) and not key.startswith(self._prefix)
        }
        try:
            self._measure(encoder, probe, name)
        finally:
            setattr(classifier, classifier.base_model_prefix, self._computed)

    def inner(self, name: str) -> str | None:
        """Return the name in the encoder of a parameter or module of the classifier; None if it is of the head."""
        return name.removeprefix(self._prefix) if name.startswith(self._prefix) else None

    def shapes(self, labels: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of the head's own parameters."""
        return {
            key: tuple(labels if width == PROBE_LABELS else width for width in shape)
            for key, shape in self._shapes.items()
        }

    def logits(self, head: Mapping[str, Tensor], hidden: HiddenStates) -> Tensor:
        """Return the logits, B by labels; used from one thread at a time.

        Args:
            head: The head's own parameters.
            hidden: What the encoder computed.
        """
        self._computed.output = _output(hidden)
        given = {"input_ids": hidden.ids, "attention_mask": hidden.mask}
        found: Tensor = functional_call(self._classifier, dict(head), (), given).logits
        return found

    @torch.inference_mode()
    def _measure(self, encoder: Any, probe: Tensor, name: str) -> None:
        draw = torch.Generator().manual_seed(0)
        head = {key: torch.randn(shape, generator=draw) / shape[-1] ** 0.5 for key, shape in self._shapes.items()}
        given: dict[str, Any] = {"input_ids": probe, "attention_mask": torch.ones_like(probe)}
        dtype = encoder.dtype
        try:
            alike = {key: value.to(dtype) for key, value in head.items()}
            wanted = functional_call(self._classifier, alike, (), given).logits.float()
            output = encoder(**given)
            pooled = getattr(output, "pooler_output", None)
            hidden = HiddenStates(probe, given["attention_mask"], output.last_hidden_state, pooled)
            setattr(self._classifier, self._prefix[:-1], self._computed)
            found = self.logits(head, hidden.rows(slice(None)))
        except (RuntimeError, AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
            raise BaseError(f"The base {name!r} gives no classifier its hidden states ({error}).") from None
        if found.shape != wanted.shape or (found - wanted).abs().max() > _TOLERANCE.get(dtype, 0.1):
            kind = type(self._classifier).__name__
            raise BaseError(f"The base {name!r} calls its encoder in a way of its own where it classifies ({kind}).")


class _Computed(nn.Module):
    """Stands where the encoder was."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _output(hidden: HiddenStates) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=hidden.states, pooler_output=hidden.pooled)
