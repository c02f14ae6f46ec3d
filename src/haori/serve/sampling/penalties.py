"""Counts the tokens of one request and takes penalties off their logits.

Knows the rules of three penalties and nothing about the others: repetition as in CTRL (arXiv 1909.05858) over prompt
and answer, presence and frequency as OpenAI defines them over the answer alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from haori.serve.request import Sampling

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Penalties"]

_ROOM = 64


class Penalties:
    """The penalties of one request, and how often each token stands in its answer.

    Args:
        sampling: `repetition_penalty`, `presence_penalty`, `frequency_penalty`.
        prompt: Token ids.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        import torch

        self._repetition = sampling.repetition_penalty
        self._presence, self._frequency = sampling.presence_penalty, sampling.frequency_penalty
        seen = dict.fromkeys(prompt) if self._repetition != 1.0 else ()
        self._slots = {token: slot for slot, token in enumerate(seen)}
        self._ids = torch.tensor([*self._slots, *[0] * _ROOM])
        self._counts = torch.zeros(len(self._ids))  # in the answer

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        """Say whether any penalty is on."""
        return sampling.repetition_penalty != 1.0 or bool(sampling.presence_penalty or sampling.frequency_penalty)

    def accept(self, token: int) -> None:
        """Count a token of the answer."""
        import torch

        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)])
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def apply(self, logits: "Tensor") -> None:
        """Change the logits of one row, (V,) float32, in place."""
        import torch

        ids = self._ids[: len(self._slots)].to(logits.device)
        counts = self._counts[: len(self._slots)].to(logits.device)
        seen = logits[ids]
        if self._repetition != 1.0:
            seen = torch.where(seen > 0, seen / self._repetition, seen * self._repetition)
        logits[ids] = seen - self._frequency * counts - self._presence * (counts > 0)
