"""Single-file checkpoints of Stable Diffusion 1, 2 and XL, as AUTOMATIC1111's web UI and ComfyUI keep them.

A file is told by its header alone, and converted once into a pipeline in the layout of diffusers; configurations are
shipped here, so no hub is asked. What a file lacks, or holds besides, is said before anything is read.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from haori.bases.conversion_steps import conversion_steps
from haori.bases.diffusion.clip_vocabulary import clip_tokenizer
from haori.bases.diffusion.extra import require_diffusers
from haori.bases.load_errors import LOAD_ERRORS, first_line
from haori.bases.quiet import quiet_diffusers
from haori.core.errors import BaseError, FileFormatError
from haori.core.safetensors_header import SafetensorsHeader, read_safetensors_header

__all__ = ["Checkpoint", "convert_checkpoint", "read_checkpoint"]

CONFIGS = Path(__file__).parent / "checkpoint_configs"
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_CONTEXT = re.compile(r"model\.diffusion_model\..*attn2\.to_k\.weight")
_KINDS = {768: "sd15", 1024: "sd2", 2048: "sdxl"}
_TEXT = {
    "sd15": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
_PADS = {"sd15": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}
_LATENTS = 4
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ADAPTER = re.compile(r"(^|[._])(lora|lycoris)_|\.lora\.|\.(hada|lokr|oft)_")
# What training leaves in a checkpoint: running averages, tables of the noise, losses, and marks without a value.
_LEFTOVER = re.compile(
    r"model_ema\.|first_stage_model\.(loss|model_ema)|cond_stage_model\.|conditioner\.|denoiser\.|v_pred$|ztsnr$|"
    r"((sqrt_|log_)?(one_minus_)?(recip(m1)?_)?alphas_|alphas|betas|posterior_|sqrt_|log_one|logvar|scale_factor)"
)
# Transformers of other families, by a module that only they have.
_OTHERS = (
    (r"(^|\.)double_blocks\.0\.", "FLUX"),
    (r"(^|\.)joint_blocks\.0\.", "Stable Diffusion 3"),
    (r"(^|\.)transformer_blocks\.0\.img_mlp", "Qwen-Image"),
    (r"(^|\.)noise_refiner\.0\.", "Z-Image"),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's header says.

    Attributes:
        kind: `sd15`, `sd2` or `sdxl`.
        prediction: `epsilon` or `v_prediction`.
        zero_snr: Whether its last step is nothing but noise.
        dtype: Of its UNet, as torch names it.
        weights: How many it holds of each component.
        unread: Names of weights that belong to no component and are no leftovers of training.
        licence: What its header says, if anything.
    """

    kind: str
    prediction: str
    zero_snr: bool
    dtype: str
    weights: Mapping[str, int]
    unread: tuple[str, ...]
    licence: str | None


def read_checkpoint(path: Path) -> Checkpoint:
    """Tell a checkpoint by its header.

    Raises:
        BaseError: It is an adapter, a part of a model, or of a family that is not read from one file.
        FileFormatError: It is a pickle, truncated or malformed.
    """
    header = read_safetensors_header(path)
    names = header.tensors
    widths = {entry.shape[1] for name, entry in names.items() if _CONTEXT.fullmatch(name) and len(entry.shape) == 2}
    kind = _KINDS.get(next(iter(widths))) if len(widths) == 1 else None
    if kind is None:
        raise BaseError(_no_checkpoint(path, header))
    first = names.get(f"{_UNET}input_blocks.0.0.weight")
    if first is None or len(first.shape) != 4 or first.shape[1] != _LATENTS:
        reads = first.shape[1] if first is not None and len(first.shape) == 4 else "no"
        raise BaseError(
            f"{str(path)!r} is a checkpoint whose UNet reads {reads} channels, such as those for inpainting; give one "
            f"for text to image, which reads {_LATENTS}."
        )
    if first.dtype not in _FLOATS:
        raise BaseError(f"{str(path)!r} is stored in {first.dtype}; give the checkpoint in 16 or 32 bits.")
    for prefix in (_VAE, *_TEXT[kind]):
        if not any(name.startswith(prefix) for name in names):
            what = "autoencoder" if prefix == _VAE else "text encoder"
            raise BaseError(
                f"{str(path)!r} lacks its {what} (no weights under {prefix!r}); give a whole checkpoint, or the "
                "pipeline's folder."
            )
    places: dict[str, tuple[str, ...]] = {"unet": (_UNET,), "vae": tuple(f"{_VAE}{part}" for part in _VAE_PARTS)}
    places |= {f"text_encoder{'' if at == 0 else f'_{at + 1}'}": (text,) for at, text in enumerate(_TEXT[kind])}
    read = tuple(prefix for prefixes in places.values() for prefix in prefixes)
    return Checkpoint(
        kind=kind,
        prediction=_prediction(path, header, kind),
        zero_snr="ztsnr" in names,
        dtype=_FLOATS[first.dtype],
        weights={name: _count(header, prefixes) for name, prefixes in places.items()},
        unread=tuple(sorted(name for name in names if not name.startswith(read) and not _LEFTOVER.match(name))),
        licence=header.metadata.get("modelspec.license"),
    )


def convert_checkpoint(path: Path, out: Path, label: str) -> None:
    """Write a checkpoint as a pipeline's folder, in its own precision.

    Args:
        path: The file.
        out: A folder that is there, and empty.
        label: What the progress display calls it.

    Raises:
        BaseError: As for `read_checkpoint`, or the parts do not fit their configurations.
        DownloadError: CLIP's vocabulary is not on this machine and cannot be fetched.
        FileFormatError: The file is truncated or malformed.
        MissingExtraError: diffusers is not installed.
    """
    require_diffusers()
    import diffusers
    import torch

    found = read_checkpoint(path)
    settings = out / "configs"  # for the time of the conversion
    with conversion_steps(label, 4) as (step, say), quiet_diffusers():
        step("its tokenizer")
        _write_settings(found, settings)
        _check_sizes(path, found, settings)
        step("reading")
        index = json.loads((settings / "model_index.json").read_text(encoding="utf-8"))
        kind: Any = getattr(diffusers, index["_class_name"])
        try:
            pipeline = kind.from_single_file(
                str(path), config=str(settings), local_files_only=True, dtype=getattr(torch, found.dtype)
            )
        except LOAD_ERRORS as error:
            raise BaseError(f"{str(path)!r} cannot be converted: {first_line(error)}.") from error
        if found.unread:
            shown = ", ".join(found.unread[:3])
            say(f"{len(found.unread)} weights belong to none of its parts and are left out, such as {shown}.")
        step("checking")
        _check_finite(path, pipeline)
        step("writing")
        pipeline.save_pretrained(out)
    shutil.rmtree(settings)
    for file in out.rglob("*"):
        # mkstemp-like modes of some writers would hide the model from other users of the machine.
        file.chmod(0o755 if file.is_dir() else 0o644)


def _write_settings(found: Checkpoint, folder: Path) -> None:
    """Write configurations and tokenizers as from_single_file takes them."""
    shutil.copytree(CONFIGS / found.kind, folder)
    for at, pad in enumerate(_PADS[found.kind]):
        clip_tokenizer(pad).save_pretrained(folder / ("tokenizer" if at == 0 else f"tokenizer_{at + 1}"))
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text(encoding="utf-8")) | {"prediction_type": found.prediction}
    if found.zero_snr:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(scheduler, indent=2) + "\n", encoding="utf-8")


def _check_sizes(path: Path, found: Checkpoint, settings: Path) -> None:
    """Refuse a file whose parts hold fewer or more weights than their configurations have."""
    for file in sorted(settings.glob("*/config.json")):
        name, config = file.parent.name, json.loads(file.read_text(encoding="utf-8"))
        stored, wanted = found.weights[name], _parameters(file.parent, config)
        # OpenCLIP's encoders bring a last layer and a projection that are not read.
        if stored < wanted or (stored > wanted and not name.startswith("text_encoder")):
            raise BaseError(
                f"{str(path)!r} holds {stored:,} weights of its {name}, and the family's bases have {wanted:,}; it is "
                "damaged or of another shape, and cannot be converted."
            )


def _parameters(folder: Path, config: dict[str, Any]) -> int:
    """Return the weights of a model with this configuration."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if "architectures" in config:
            reader: Any = getattr(transformers, config["architectures"][0])
            model = reader(reader.config_class.from_pretrained(folder))
        else:
            model = getattr(diffusers, config["_class_name"]).from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def _check_finite(path: Path, pipeline: Any) -> None:
    for name, part in pipeline.components.items():
        for key, weight in part.named_parameters() if hasattr(part, "named_parameters") else ():
            if not weight.isfinite().all():
                raise FileFormatError(f"{str(path)!r} holds NaN or infinity in {key!r} of its {name}; it is damaged.")


def _prediction(path: Path, header: SafetensorsHeader, kind: str) -> str:
    """Say what the UNet predicts: as the file states it; Stable Diffusion 2 comes in both forms."""
    stated = header.metadata.get("modelspec.prediction_type", "")
    if stated in {"v", "epsilon"}:
        return "v_prediction" if stated == "v" else "epsilon"
    if "v_pred" in header.tensors:
        return "v_prediction"
    if kind != "sd2":
        return "epsilon"
    sizes = set(re.findall(r"(?<!\d)(512|768)(?!\d)", path.stem))
    if len(sizes) == 1:
        return "v_prediction" if sizes == {"768"} else "epsilon"
    raise BaseError(
        f"{str(path)!r} is a Stable Diffusion 2 checkpoint, and neither its header nor its name says whether it "
        "predicts noise (the form for 512 pixels) or velocity (768); put 512 or 768 into its file name."
    )


def _count(header: SafetensorsHeader, prefixes: tuple[str, ...]) -> int:
    return sum(
        prod(entry.shape)
        for name, entry in header.tensors.items()
        if name.startswith(prefixes) and not name.endswith("position_ids")
    )


def _no_checkpoint(path: Path, header: SafetensorsHeader) -> str:
    names = header.tensors
    if any(_ADAPTER.search(name) for name in names):
        return f"{str(path)!r} holds an adapter (LoRA or the like), not a base; add it with `haori library add`."
    for pattern, family in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            return (
                f"{str(path)!r} holds the transformer of {family}; its text encoders, their tokenizers and its "
                "autoencoder are not in one file. Give the whole pipeline's folder, in the layout of diffusers."
            )
    places = ((path.parent.parent, "model_index.json"), (path.parent, "config.json"))
    folder = next((str(place) for place, index in places if (place / index).is_file()), None)
    beside = f"; name its folder instead, {folder!r}" if folder else ""
    return (
        f"{str(path)!r} is no checkpoint of Stable Diffusion 1, 2 or XL (no UNet under {_UNET!r} that reads text of a "
        f"width of theirs){beside}. A base is a checkpoint, a model's or pipeline's folder, a GGUF file or a hub id."
    )
