"""OMI's naming, which OneTrainer writes: `transformer.double_blocks.0.img_attn.qkv.0`, `clip_l.` and `t5.`.

Modules have the names of the base's own code, and the parts of a fused one are numbered. OneTrainer's own checkpoints
have diffusers' names with dots, behind `lora_transformer.`.
"""

from collections.abc import Mapping
from dataclasses import replace

from haori.library.formats.block_map import BlockMap, Place
from haori.library.formats.named_file import NamedFile, Slot
from haori.library.formats.transformer_places import OWN_NAMES

__all__ = ["FORMAT"]

_OWN: Mapping[str, BlockMap] = {family: names.and_numbered() for family, names in OWN_NAMES.items()}
_FLUX1 = replace(_OWN["flux1"], others={**_OWN["flux1"].others, "img_in.proj": Place(("x_embedder",))})
_NAMES = {**_OWN, "flux1": _FLUX1}

FORMAT = NamedFile(
    name="omi",
    title="OMI, of OneTrainer",
    prefixes={
        "transformer.": Slot("transformer", "transformer"),
        "lora_transformer.": Slot("transformer", "transformer"),
        "unet.": Slot("unet", "image"),
        "clip_l.": Slot("text_encoder", "clip"),
        "clip_g.": Slot("text_encoder_2", "clip"),
        "t5.": Slot("text_encoder_2", "t5"),
    },
    maps={family: names.and_diffusers() for family, names in _NAMES.items()},
    shared=frozenset({"transformer.", "unet."}),
)
