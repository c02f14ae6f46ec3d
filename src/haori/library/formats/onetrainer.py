"""OneTrainer's naming of transformers: diffusers' names with underscores, `lora_transformer_proj_out`.

`lora_te1_` is CLIP's text encoder, `lora_te2_` T5 in files for Flux. LyCORIS's wrapper around a model of diffusers, as
SimpleTuner uses it, writes the same behind `lycoris_`.
"""

from haori.library.formats.named_file import NamedFile, Slot
from haori.library.formats.transformer_places import DIFFUSERS_NAMES

__all__ = ["FORMAT"]

FORMAT = NamedFile(
    name="onetrainer",
    title="OneTrainer",
    prefixes={
        "lora_transformer_": Slot("transformer", "transformer"),
        "lora_te1_": Slot("text_encoder", "clip"),
        "lora_te2_": Slot("text_encoder_2", "clip or t5"),
        "lora_te_": Slot("text_encoder", "clip"),
        "lycoris_": Slot("transformer", "transformer"),
    },
    maps=DIFFUSERS_NAMES,
    joint="_",
    written=DIFFUSERS_NAMES,
)
