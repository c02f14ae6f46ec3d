"""The proof of new words: what their vectors alone do to the predictions, text encoder by text encoder.

Beside an adapter the effect of a few vectors may be small, and a fault in them would pass as a small share of the
whole. So each text encoder's vectors are measured with everything else of the adapter off, against the vectors as they
began.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from haori.core.records import Check
from haori.library.adapter_components import only_modules
from haori.library.proof.checks import check_effect, check_reloaded
from haori.library.proof.logits import Probe, compare_logits, live_probe_logits

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from haori.core.new_words import NewWords

__all__ = ["check_words", "word_predictions"]

_MEASURED = "noise predictions"
# Of the effect of all the vectors: a tenth of the way that a vector went may make much less than a tenth of it, since
# norms even out the sizes of embeddings.
_SHARE = 0.005


def word_predictions(adapted: "PeftModel", words: "NewWords", probes: Sequence[Probe]) -> "dict[str, list[Tensor]]":
    """Return the predictions on probes that hold a new word, with the vectors of one text encoder alone, by its name.

    Args:
        adapted: The base with the adapter.
        words: The adapter's new words.
        probes: Inputs; those without any of the words are left out.
    """
    telling = _telling(words, probes)
    found = {}
    for encoder in words.first:
        with _only_words(adapted, encoder):
            found[encoder] = live_probe_logits(adapted, telling)
    return found


def check_words(
    adapted: "PeftModel",
    words: "NewWords",
    probes: Sequence[Probe],
    live: "Mapping[str, Sequence[Tensor]] | None",
) -> list[Check]:
    """Check that the vectors of each text encoder do something, and what they did in the live model.

    Args:
        adapted: The base with the adapter as it was read from disk.
        words: Its new words.
        probes: Inputs that hold the words.
        live: What `word_predictions` gave for the same probes on the model still in memory.
    """
    with _only_words(adapted, None):
        begun = live_probe_logits(adapted, _telling(words, probes))
    checks = []
    for encoder, alone in word_predictions(adapted, words, probes).items():
        subject = f"embedding of the new words in {encoder!r} alone"
        effect = check_effect(alone, begun, subject=subject, measured=_MEASURED)
        checks.append(effect.with_fields(name=f"words of {encoder}"))
        if live is not None:
            moved = compare_logits(alone, begun).rms
            same = check_reloaded(alone, live.get(encoder), moved, measured=_MEASURED, share=_SHARE)
            checks.append(same.with_fields(name=f"reload of {encoder}'s words"))
    return checks


def _telling(words: "NewWords", probes: Sequence[Probe]) -> list[Probe]:
    """Return the probes that hold a new word, or all where none does."""
    found: list[Probe] = [
        probe
        for probe in probes
        if isinstance(probe, Mapping)
        and any(bool((probe[f"tokens_{name}"] >= first).any()) for name, first in words.first.items())
    ]
    return found or list(probes)


def _only_words(adapted: "PeftModel", encoder: str | None) -> AbstractContextManager[None]:
    """Run a block with the new words of one text encoder, or of none, and nothing else of the adapter."""
    from haori.bases.diffusion import WORD_ROWS

    return only_modules(adapted, lambda name: name.endswith(WORD_ROWS) and name.partition(".")[0] == encoder)
