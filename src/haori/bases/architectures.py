"""Says what a base does by the name of its architecture, without loading anything."""

import re

from haori.bases.base import Base

__all__ = ["continues_text", "writes_text"]

_CONTINUES = ("ForCausalLM", "LMHeadModel")
_WRITES = re.compile("CausalLM|LMHead|ConditionalGeneration")


def writes_text(base: Base) -> bool:
    """Say whether a base writes text, as decoders and encoder-decoders do; encoders and classifiers do not.

    Raises:
        BaseError: It has several components.
    """
    return _WRITES.search(base.fingerprint.architecture) is not None


def continues_text(base: Base) -> bool:
    """Say whether a base writes text by going on from what it was given, as GPT-like decoders do.

    Raises:
        BaseError: It has several components.
    """
    return base.fingerprint.architecture.endswith(_CONTINUES)
