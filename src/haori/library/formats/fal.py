"""fal's naming, of a PEFT model around Black Forest Labs' code: `base_model.model.double_blocks.0.img_attn.qkv`."""

from haori.library.formats.named_file import NamedFile, Slot
from haori.library.formats.transformer_places import ALL_NAMES

__all__ = ["FORMAT"]

FORMAT = NamedFile(
    name="fal",
    title="fal",
    prefixes={"base_model.model.": Slot("transformer", "transformer")},
    maps=ALL_NAMES,
)
