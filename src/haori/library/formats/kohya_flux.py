"""kohya's naming of image transformers: sd-scripts for Flux.1, musubi-tuner and others for the newer ones.

A module's name is its path in the base's own code (for Flux that of Black Forest Labs) with underscores, behind
`lora_unet_`; `lora_te1_` is the CLIP text encoder and `lora_te3_` the T5 one, since sd-scripts counts SDXL's second one
in between.
"""

from haori.library.formats.named_file import NamedFile, Slot
from haori.library.formats.transformer_places import ALL_NAMES, OWN_NAMES

__all__ = ["FORMAT"]

FORMAT = NamedFile(
    name="kohya-flux",
    title="kohya for Flux and other transformers",
    prefixes={
        "lora_unet_": Slot("transformer", "transformer"),
        "lora_te1_": Slot("text_encoder", "clip"),
        "lora_te3_": Slot("text_encoder_2", "t5"),
        "lora_te_": Slot("text_encoder", "clip"),
    },
    maps=ALL_NAMES,
    joint="_",
    written=OWN_NAMES,
)
