"""Loads the frozen model of a base, quietly and without running any code from its folder.

A pipeline of diffusers is loaded as one `haori.bases.diffusion.DiffusionModel` of its components.

A base in 16 or 32 bits may be quantised while it is loaded (bitsandbytes): its linear layers then hold 4 or 8 bits per
weight; embeddings, norms and the output head keep the dtype asked for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from haori.bases.base import Base
from haori.bases.dtype import choose_dtype, default_device, torch_dtype
from haori.bases.heads import begin_head, fresh_modules, head_class, head_modules, labelled_configuration, own_head
from haori.bases.load_errors import LOAD_ERRORS, check_device, explain_load_errors, first_line
from haori.bases.quantising import bitsandbytes_options, compute_alike
from haori.bases.quiet import quiet_transformers
from haori.core.errors import BaseError
from haori.core.quantization import Quantization
from haori.core.records import Head

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["load_model", "load_skeleton", "weight_bytes"]

_SAFE = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}


def load_model(
    base: Base,
    *,
    dtype: str = "auto",
    device: str | None = None,
    quantization: Quantization | None = None,
    head: Head | None = None,
    head_seed: int = 0,
    components: Sequence[str] | None = None,
) -> "PreTrainedModel":
    """Load `base` in evaluation mode with every weight frozen.

    Args:
        base: The base, from `find_base`.
        dtype: `auto`, `fp32`, `bf16` or `fp16`; see `choose_dtype`.
        device: `cpu`, `cuda`, `cuda:1`; None takes the GPU where there is one.
        quantization: Quantise the linear layers to this while loading; those of a head stay as they are.
        head: Load it as a classifier with this head: its own where it has one of these labels, else a fresh one.
        head_seed: Of the weights that a fresh head begins with.
        components: Of a pipeline, those to load; by default the denoiser and all text encoders.

    Raises:
        BaseError: transformers knows no such architecture, or no such head for it, weights are missing or of another
            shape, the base does not fit into memory, or it is stored quantised and asked to be quantised again.
        InputError: The dtype is unknown, or the device is not there.
        MissingExtraError: Quantisation is asked for without bitsandbytes.
    """
    options: dict[str, Any]
    if base.pipeline is not None:
        from haori.bases.diffusion.loading import load_diffusion_model

        # It answers whatever a run asks of a model: modules, config, activation checkpointing.
        options = {"dtype": dtype, "device": device, "quantization": quantization, "components": components}
        return cast("PreTrainedModel", load_diffusion_model(base, **options))
    device_name = device or default_device()
    check_device(device_name)
    number_format = torch_dtype(choose_dtype(dtype, device_name).name)
    model_class = _model_class(base) if head is None else head_class(base, head)
    placed = {} if device_name == "cpu" and quantization is None else {"device_map": {"": device_name}}
    options = {"dtype": number_format, **placed, **_SAFE}
    with explain_load_errors(base, device_name), quiet_transformers():
        if quantization is not None:
            from transformers import BitsAndBytesConfig

            whole = () if head is None else head_modules(load_skeleton(base, head=head))
            options["quantization_config"] = BitsAndBytesConfig(
                **bitsandbytes_options(base, quantization, number_format, whole)
            )
        if head is not None:
            options |= {"config": labelled_configuration(base, head), "ignore_mismatched_sizes": own_head(base) != head}
        model, report = model_class.from_pretrained(base.path, output_loading_info=True, **options)
    # A pooler is a head that many encoder checkpoints leave out; only a classifier uses it.
    fresh = ("pooler",) if head is None else fresh_modules(base, head, model)
    _check_complete(base, report, fresh)
    if head is not None:
        begin_head(model, fresh, head_seed)
    if quantization is not None:
        compute_alike(model)
    frozen: PreTrainedModel = model.requires_grad_(False).eval()
    return frozen


def weight_bytes(model: "torch.nn.Module") -> int:
    """Return the bytes that the weights of a loaded model take, those of quantised layers with their scales."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        nested = getattr(state, "state2", None)
        scales = [getattr(holder, "absmax", None) for holder in (state, nested)]
        eight_bit: Any = getattr(module, "state", None)
        scales += [getattr(weight, "SCB", None), getattr(eight_bit, "SCB", None)]
        total += sum(scale.numel() * scale.element_size() for scale in scales if scale is not None)
    return total


def _check_complete(base: Base, report: dict[str, Any], fresh: tuple[str, ...]) -> None:
    """Refuse weight files that lack a weight outside the modules `fresh`, or hold one of another shape."""
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    missing = sorted(key for key in lacking if not any(f".{name}." in f".{key}" for name in fresh))
    if missing:
        raise BaseError(
            f"The weight files of {base.name!r} lack {len(missing)} of the model's weights, such as {missing[0]!r}; "
            "config.json and the weights do not belong together."
        )


def load_skeleton(
    base: Base, *, head: Head | None = None, components: Sequence[str] | None = None
) -> "PreTrainedModel":
    """Build the modules of `base` without weights or memory, to look at their names and shapes.

    Args:
        base: The base.
        head: Build it as a classifier with this head.
        components: As in `load_model`.

    Raises:
        BaseError: transformers does not know the architecture, or has no head of this kind for it.
    """
    import torch
    from transformers import AutoConfig

    if base.pipeline is not None:
        from haori.bases.diffusion.loading import load_diffusion_skeleton

        pictures: Any = load_diffusion_skeleton(base, components)
        return cast("PreTrainedModel", pictures)
    model_class = _model_class(base) if head is None else head_class(base, head)
    try:
        with quiet_transformers(), torch.device("meta"):
            if head is not None:
                return model_class.from_config(labelled_configuration(base, head), trust_remote_code=False)
            config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
            return model_class.from_config(config, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise BaseError(f"The base {base.name!r} cannot be built: {first_line(error)}.") from error


def _model_class(base: Base) -> Any:
    """Choose by architecture: a causal language model keeps its head, anything else is loaded as an encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = base.fingerprint.architecture
    if not hasattr(transformers, architecture):
        raise BaseError(
            f"The base {base.name!r} is a {architecture}, which transformers {transformers.__version__} does not know; "
            "a newer transformers may."
        )
    causal = architecture in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel
