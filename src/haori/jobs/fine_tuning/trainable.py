"""Says, before a job is there, whether a base can be fine-tuned on text at all."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

from haori.bases import Base
from haori.core.errors import InputError

__all__ = ["NotTrainableError", "require_text_base", "text_bases"]


class NotTrainableError(InputError):
    """What a client calls the model means nothing that can be fine-tuned on text."""


def require_text_base(name: str, spec: str, served: Base | None) -> None:
    """Refuse a base that does not go on from text, such as an encoder or an image base.

    A base of the catalogue that is not installed is judged by its entry: nothing is fetched here.

    Args:
        name: What the base is called.
        spec: What it is found by.
        served: The base that the server answers with.

    Raises:
        NotTrainableError: It writes no text.
        BaseError: It cannot be used.
    """
    from haori.bases.architectures import continues_text
    from haori.bases.catalogue import CATALOGUE
    from haori.bases.find import find_base
    from haori.bases.registry import read_record

    if served is not None and name == served.name:
        base = served
    elif name in CATALOGUE and read_record(name) is None:
        if CATALOGUE[name].continues_text:
            return
        raise NotTrainableError(_sentence(name, "an encoder"))
    else:
        base = find_base(spec)
    if base.pipeline is not None or len(base.components) > 1:
        raise NotTrainableError(_sentence(name, f"an image base ({base.pipeline or ', '.join(base.components)})"))
    if not continues_text(base):
        raise NotTrainableError(_sentence(name, f"a {base.fingerprint.architecture}"))


def text_bases(known: Mapping[str, str], served: Base | None) -> Sequence[str]:
    """Return the names of the bases that can be trained on text, of those known by name with their specs."""
    found: list[str] = []
    for name, spec in sorted(known.items()):
        with suppress(InputError):
            require_text_base(name, spec, served)
            found.append(name)
    return found


def _sentence(name: str, what: str) -> str:
    return (
        f"'model' cannot be {name!r}: it is {what}, and fine-tuning jobs learn from conversations, which need a base "
        "that writes text, such as smollm2-135m-instruct; other tasks are trained with `haori train`."
    )
