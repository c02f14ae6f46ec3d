"""How an encoder's hidden states become one vector, read from the files that sentence-transformers writes.

`modules.json` names the steps after the transformer: pooling, perhaps normalisation. A base without that file is
pooled by the mean over its tokens and normalised to length 1. A step that is not known is refused by its name, since
leaving it out would give other vectors than the model's own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from haori.bases.architectures import writes_text
from haori.bases.folder import read_json
from haori.core.errors import BaseError, FileFormatError

if TYPE_CHECKING:
    from haori.bases import Base

__all__ = ["EmbeddingLayout", "is_encoder", "read_embedding_layout"]

_LIMIT_BYTES = 1 << 20
_POOLINGS: dict[str, Literal["mean", "cls"]] = {"mean": "mean", "mean_tokens": "mean", "cls": "cls", "cls_token": "cls"}


@dataclass(frozen=True)
class EmbeddingLayout:
    """What follows the transformer.

    Attributes:
        pooling: The mean over a text's tokens, or the state of its first token.
        normalise: Whether vectors are brought to length 1.
        longest: Longest text in tokens, where the files say.
        lower_case: Whether texts are put in lower case first.
    """

    pooling: Literal["mean", "cls"] = "mean"
    normalise: bool = True
    longest: int | None = None
    lower_case: bool = False


def is_encoder(base: "Base") -> bool:
    """Say whether a base is to be opened for embeddings, by its architecture's name; opening it then makes sure."""
    return not writes_text(base)


def read_embedding_layout(folder: Path, *, name: str) -> EmbeddingLayout:
    """Read the layout of the base in `folder`.

    Args:
        folder: The base's folder.
        name: What errors call the base.

    Raises:
        BaseError: It has a step, a pooling or a prompt that is not known here.
        FileFormatError: One of its files is damaged.
    """
    if not (folder / "modules.json").is_file():
        return EmbeddingLayout()
    steps = _steps(folder / "modules.json")
    kinds = [kind for kind, _ in steps]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise BaseError(
            f"The base {name!r} makes its embeddings by the steps {', '.join(kinds)[:200]}; served are Transformer, "
            "Pooling and Normalize."
        )
    given = _document(folder / "config_sentence_transformers.json").get("default_prompt_name")
    if given is not None:
        raise BaseError(f"The base {name!r} puts a prompt ({given!r}) before every text, which is not served.")
    settings = _document(folder / "sentence_bert_config.json")
    longest = settings.get("max_seq_length")
    return EmbeddingLayout(
        pooling=_pooling(_document(folder / steps[1][1] / "config.json"), name),
        normalise=len(kinds) == 3,
        longest=longest if isinstance(longest, int) and longest > 0 else None,
        lower_case=settings.get("do_lower_case") is True,
    )


def _steps(path: Path) -> list[tuple[str, str]]:
    """Return class name and folder of each step."""
    try:
        with path.open("rb") as file:
            steps = json.loads(file.read(_LIMIT_BYTES))
        found = [(str(step["type"]).rpartition(".")[2], str(step["path"])) for step in steps]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileFormatError(f"{str(path)!r} is damaged: it must list steps with 'type' and 'path'.") from None
    if any(Path(place).name != place for _, place in found):
        raise FileFormatError(f"{str(path)!r} names a folder that is not beside it.")
    return found


def _document(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _pooling(settings: dict[str, Any], name: str) -> Literal["mean", "cls"]:
    # One boolean for each kind; newer files give the kind itself.
    modes = [key.removeprefix("pooling_mode_") for key, value in settings.items()
             if key.startswith("pooling_mode_") and value is True]  # fmt: skip
    if "pooling_mode" in settings:
        modes = [str(settings["pooling_mode"])]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise BaseError(
            f"The base {name!r} pools by {' and '.join(modes)[:200] or 'nothing'}; served are the mean over tokens and "
            "the first token."
        )
    return _POOLINGS[modes[0]]
