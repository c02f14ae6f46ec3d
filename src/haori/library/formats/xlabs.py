"""XLabs's naming: processors of Flux.1's attention, `double_blocks.0.processor.qkv_lora1.down.weight`.

`1` is the image's stream and `2` the text's. There is no alpha: the scale is 1. In a single block the processor stands
for the query, key and value of `linear1` alone, not for its MLP.
"""

import re

from haori.library.formats.bfl_names import XLABS
from haori.library.formats.named_file import NamedFile, Slot

__all__ = ["FORMAT"]

_FACTOR = re.compile(r"(\.processor\.(?:qkv|proj)_lora[12]?)\.(down|up)\.weight$")


def _respelled(key: str) -> str:
    return _FACTOR.sub(r"\1.lora.\2.weight", key)


FORMAT = NamedFile(
    name="xlabs",
    title="XLabs for Flux.1",
    prefixes={"": Slot("transformer", "transformer"), "diffusion_model.": Slot("transformer", "transformer")},
    maps={"flux1": XLABS},
    respell=_respelled,
)
