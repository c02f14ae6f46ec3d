"""Chooses the next token of every running request in one step, from the logits of the whole batch.

The order is vLLM's: constraint, logit bias, `min_tokens`, penalties (repetition, frequency, presence), temperature,
min-p, top-k, top-p. Each row's token is what it would be if the row were alone, bit for bit given equal logits, and a
row that cannot be sampled fails alone. Works on any device; knows nothing about models, text or HTTP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from haori.core.errors import InputError
from haori.serve.engine.unforeseen import fault_of, unforeseen
from haori.serve.request import Fault, Sampling, TokenLogprob
from haori.serve.sampling.draw import Filters, draw
from haori.serve.sampling.logprobs import token_logprobs
from haori.serve.sampling.penalties import Penalties

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Choice", "Constraint", "SamplerState", "choose"]

_LEAST_TEMPERATURE = 1e-5
"""Below this the likeliest token is taken: dividing logits by less says nothing more."""

_ROWS_PER_PART = 8
"""On a CPU so many rows are worked on at once, so that they stay in its cache: 3 to 4 times as fast as 64."""

_GREATEST_BIAS = 100.0

_NOT_NUMBERS = "The model's logits for this request are not numbers; its adapter or strength may be at fault."
_NOTHING_ALLOWED = "No token may follow here: constraint, logit_bias and penalties rule out every one; relax them."


class Constraint(Protocol):
    """Restricts the next token of an answer; `constraints.Matcher` is one."""

    @property
    def finished(self) -> bool:
        """Say whether the answer is complete and nothing can follow."""

    def allowed(self) -> "Tensor":
        """Return (V,) bool on the CPU: which tokens may come next; may raise a HaoriError."""

    def accept(self, token: int) -> None:
        """Advance by a token; may raise a HaoriError."""


@dataclass(frozen=True)
class Choice:
    """The next token of one row; -1 with a sentence in `error`, and its `fault`, where none could be chosen."""

    token: int
    logprob: TokenLogprob | None = None
    error: str | None = None
    fault: Fault = "engine"


class SamplerState:
    """The sampling state of one request.

    Args:
        sampling: The request's settings.
        prompt: Token ids, for the repetition penalty.
        vocabulary: Width of the model's logits.
        stop_tokens: Ids that end an answer.
        constraint: What the answer must look like, if anything.

    Raises:
        InputError: `logit_bias` names an id outside the vocabulary, or a bias that is not a number.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocabulary: int,
        stop_tokens: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        _check_bias(sampling.logit_bias, vocabulary)
        self.sampling = sampling
        self._stop_tokens = frozenset() if sampling.ignore_eos else stop_tokens
        self._constraint = constraint
        self._penalties = Penalties(sampling, prompt) if Penalties.wanted(sampling) else None
        self._generator: torch.Generator | None = None
        self._number: float | None = None
        self.accepted = 0
        self.ended = False

    @property
    def greedy(self) -> bool:
        """Say whether the likeliest token is taken."""
        return self.sampling.temperature < _LEAST_TEMPERATURE

    @property
    def edits(self) -> bool:
        """Say whether the next logits are changed before a token is chosen."""
        return bool(self._constraint or self.sampling.logit_bias or self._penalties or self._too_short)

    @property
    def filters(self) -> Filters:
        """Return what the row samples from."""
        wanted = self.sampling
        return Filters(wanted.temperature, wanted.top_k, wanted.top_p, wanted.min_p)

    @property
    def _too_short(self) -> bool:
        return self.accepted < self.sampling.min_tokens and bool(self._stop_tokens)

    def accept(self, token: int) -> None:
        """Advance by a token; `choose` does this with the token that it returns.

        `ended` is then set after a stop token (unless they are ignored) and when a constraint is fulfilled.

        Raises:
            InputError: The constraint does not allow the token.
        """
        if self._constraint:
            self._constraint.accept(token)
        if self._penalties:
            self._penalties.accept(token)
        self._number = None
        self.accepted += 1
        self.ended = token in self._stop_tokens or bool(self._constraint and self._constraint.finished)

    def edit(self, logits: "Tensor") -> None:
        """Apply constraint, bias, `min_tokens` and penalties to the row's logits, (V,) float32, in place."""
        import torch

        if self._constraint:
            logits.masked_fill_(~self._constraint.allowed().to(logits.device), -math.inf)
        if self.sampling.logit_bias:
            ids = torch.tensor(list(self.sampling.logit_bias), device=logits.device)
            logits[ids] += logits.new_tensor(list(self.sampling.logit_bias.values()))
        if self._too_short:
            self._postpone_stop(logits)
        if self._penalties:
            self._penalties.apply(logits)

    def uniform(self) -> float:
        """Return the random number of the request's next token, in [0, 1); the same until that is accepted."""
        import torch

        if self._number is not None:
            return self._number
        if self._generator is None:
            self._generator = torch.Generator()
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        self._number = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        return self._number

    def _postpone_stop(self, logits: "Tensor") -> None:
        """Rule stop tokens out, unless a constraint leaves nothing else."""
        import torch

        stops = torch.tensor([token for token in self._stop_tokens if token < len(logits)], device=logits.device)
        kept = logits[stops]
        logits[stops] = -math.inf
        if float(logits.max()) == -math.inf:
            logits[stops] = kept


def choose(logits: "Tensor", states: Sequence[SamplerState]) -> list[Choice]:
    """Choose and accept the next token of every row.

    A row whose logits are not numbers (NaN or +inf anywhere, or -inf everywhere), or on whose account anything is
    raised, gets an error and its state stays as it was; the other rows go on.

    Args:
        logits: (N, V), in any floating type; left unchanged.
        states: One for each row.
    """
    choices = [Choice(-1)] * len(states)
    plain = [row for row, state in enumerate(states) if state.greedy and not state.edits]
    if plain:
        values, tokens = (logits if len(plain) == len(states) else logits[plain]).max(-1)
        for row, token, finite in zip(plain, tokens.tolist(), values.isfinite().tolist(), strict=True):
            choices[row] = Choice(token) if finite else Choice(-1, error=_NOT_NUMBERS)
    others = sorted(set(range(len(states))).difference(plain))
    for rows in _parts(others, states, logits):
        for row, choice in zip(rows, _choose_apart(logits, rows, states), strict=True):
            choices[row] = choice
    _add_logprobs(choices, logits, states)
    return [_accepted(choice, state) for choice, state in zip(choices, states, strict=True)]


def _parts(rows: list[int], states: Sequence[SamplerState], logits: "Tensor") -> list[list[int]]:
    """Put rows that are filtered alike together, a few at a time on a CPU."""

    def kind(row: int) -> tuple[bool, bool, bool]:
        wanted = states[row].sampling
        return states[row].greedy, wanted.top_k > 0, wanted.top_p < 1.0

    size = _ROWS_PER_PART if logits.device.type == "cpu" else len(rows)
    alike = (list(group) for _, group in groupby(sorted(rows, key=kind), key=kind))
    return [group[start : start + size] for group in alike for start in range(0, len(group), size)]


def _choose_apart(logits: "Tensor", rows: list[int], states: Sequence[SamplerState]) -> list[Choice]:
    """Choose for a part of the rows; if that raises, for each alone."""
    try:
        return _choose_part(logits[rows].float(), [states[row] for row in rows])
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
        if len(rows) == 1:
            return [_failed(error)]
    return [choice for row in rows for choice in _choose_apart(logits, [row], states)]


def _choose_part(logits: "Tensor", states: Sequence[SamplerState]) -> list[Choice]:
    """Choose for a few rows, (N, V) float32, which are used up."""
    choices = [Choice(-1, error=None if finite else _NOT_NUMBERS) for finite in logits.amax(-1).isfinite().tolist()]
    edited = [row for row, state in enumerate(states) if state.edits and choices[row].error is None]
    for row in edited:
        try:
            states[row].edit(logits[row])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
            choices[row] = _failed(error)
    if edited:
        for row, finite in enumerate(logits.amax(-1).isfinite().tolist()):
            if not finite and choices[row].error is None:
                choices[row] = Choice(-1, error=_NOTHING_ALLOWED, fault="request")
    fine = [row for row, choice in enumerate(choices) if choice.error is None]
    sampled = [row for row in fine if not states[row].greedy]
    greedy = [row for row in fine if states[row].greedy]
    tokens = logits[greedy].argmax(-1).tolist() if greedy else []
    if sampled:
        wanted = [states[row] for row in sampled]
        part = logits if len(sampled) == len(states) else logits[sampled]
        tokens += draw(part, [state.filters for state in wanted], [state.uniform() for state in wanted])
    for row, token in zip(greedy + sampled, tokens, strict=True):
        choices[row] = Choice(token)
    return choices


def _add_logprobs(choices: list[Choice], logits: "Tensor", states: Sequence[SamplerState]) -> None:
    """Complete the choices of rows that ask for log-probabilities."""
    wanted = {row: state.sampling.logprobs for row, state in enumerate(states) if choices[row].error is None}
    asking = [row for row, top in wanted.items() if top is not None]
    for start in range(0, len(asking), _ROWS_PER_PART):
        rows = asking[start : start + _ROWS_PER_PART]
        tokens = [choices[row].token for row in rows]
        for row, logprob in zip(
            rows, token_logprobs(logits[rows], tokens, [wanted[row] or 0 for row in rows]), strict=True
        ):
            choices[row] = Choice(choices[row].token, logprob)


def _accepted(choice: Choice, state: SamplerState) -> Choice:
    if choice.error is not None:
        return choice
    try:
        state.accept(choice.token)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
        return _failed(error)
    return choice


def _failed(error: BaseException) -> Choice:
    return Choice(-1, error=unforeseen(error), fault=fault_of(error))


def _check_bias(biases: dict[int, float], vocabulary: int) -> None:
    for token, bias in biases.items():
        if not 0 <= token < vocabulary:
            raise InputError(
                f"logit_bias names token {token}; this model's tokens are 0 to {vocabulary - 1:,}. Give ids of its "
                "tokenizer."
            )
        if not abs(bias) <= _GREATEST_BIAS:
            raise InputError(f"The logit_bias of token {token} is {bias}; it must be from -100 to 100.")
