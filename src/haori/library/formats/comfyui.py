"""ComfyUI's naming: the keys of its own models, `diffusion_model.double_blocks.0.img_attn.qkv` and the like.

ai-toolkit, musubi-tuner and others write it too, with the names of the base's own code or those of diffusers behind the
prefix, and some leave out the prefix. Text encoders are `text_encoders.clip_l.transformer.text_model...`.
"""

from haori.library.formats.named_file import NamedFile, Slot
from haori.library.formats.transformer_places import ALL_NAMES, OWN_NAMES

__all__ = ["FORMAT"]

FORMAT = NamedFile(
    name="comfyui",
    title="ComfyUI",
    prefixes={
        "diffusion_model.": Slot("transformer", "image"),
        "text_encoders.clip_l.transformer.": Slot("text_encoder", "clip"),
        "text_encoders.clip_g.transformer.": Slot("text_encoder_2", "clip"),
        "text_encoders.t5xxl.transformer.": Slot("text_encoder_2", "t5"),
        "model.diffusion_model.": Slot("transformer", "image"),
        "": Slot("transformer", "image"),
    },
    maps=ALL_NAMES,
    written=OWN_NAMES,
    shared=frozenset({""}),
    bundles_words=False,
)
