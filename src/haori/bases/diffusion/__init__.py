"""Image bases: pipelines of diffusers as models to train, one small adapter per family.

Importing this package imports neither torch nor diffusers; names are resolved when they are first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.bases.diffusion.components import load_component
    from haori.bases.diffusion.configs import read_configs
    from haori.bases.diffusion.families import FAMILIES, family_of
    from haori.bases.diffusion.family import Family, PictureSize
    from haori.bases.diffusion.loading import load_diffusion_model, load_diffusion_skeleton
    from haori.bases.diffusion.model import DiffusionModel, DiffusionOutput
    from haori.bases.diffusion.new_words import WORD_ROWS, check_reads_words, put_words, word_modules
    from haori.bases.diffusion.noising import Noising, TimestepSampling, noising_of, prediction_of
    from haori.bases.diffusion.pipelines import pipeline_of
    from haori.bases.diffusion.processor import PipelineProcessor

__all__ = [
    "FAMILIES",
    "WORD_ROWS",
    "DiffusionModel",
    "DiffusionOutput",
    "Family",
    "Noising",
    "PictureSize",
    "PipelineProcessor",
    "TimestepSampling",
    "check_reads_words",
    "family_of",
    "load_component",
    "load_diffusion_model",
    "load_diffusion_skeleton",
    "noising_of",
    "pipeline_of",
    "prediction_of",
    "put_words",
    "read_configs",
    "word_modules",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "components": ("load_component",),
        "configs": ("read_configs",),
        "families": ("FAMILIES", "family_of"),
        "family": ("Family", "PictureSize"),
        "loading": ("load_diffusion_model", "load_diffusion_skeleton"),
        "model": ("DiffusionModel", "DiffusionOutput"),
        "new_words": ("WORD_ROWS", "check_reads_words", "put_words", "word_modules"),
        "noising": ("Noising", "TimestepSampling", "noising_of", "prediction_of"),
        "pipelines": ("pipeline_of",),
        "processor": ("PipelineProcessor",),
    },
)
