"""Puts a stored adapter on a base: checks that the two belong together, then loads it through PEFT.

Adapter weights are kept in fp32 (PEFT's `autocast_adapter_dtype=True`) whatever the base's dtype. Training keeps
fp32 masters over a 16-bit base and saves them as fp32, so only this setting makes a reloaded adapter compute what the
live one did, bit for bit; with the base's dtype the saved values would be rounded on loading.

Initialisations that change the base's own weights (PiSSA, OLoRA, CorDA) do so again on loading, as in stock PEFT:
with such an adapter `disable_adapter()` shows the changed base, not the original.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError, MismatchError
from haori.core.records import AdapterCard, BaseReference
from haori.library.adapter_components import changed_components, needed_components
from haori.library.adapter_files import AdapterFiles, inspect_adapter
from haori.library.cards import read_card

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from haori.bases import Base

__all__ = ["attach", "attach_files", "check_base", "check_keys", "prepare_words"]

_PREFIX = "base_model.model."
# Parameters that PEFT shares between layers: they are stored once and reported missing in each layer.
_SHARED = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")


def attach(
    base: "Base",
    folder: Path,
    *,
    card: AdapterCard | None = None,
    dtype: str = "auto",
    device: str | None = None,
    allow_different_weights: bool = False,
    trainable: bool = False,
) -> "PeftModel":
    """Load `base` and put the adapter in `folder` on it.

    Args:
        base: The base model.
        folder: A PEFT folder.
        card: The adapter's card; by default the card.json in `folder`, if there is one.
        dtype: Dtype of the base; the adapter itself is fp32.
        device: Where to load; chosen by `bases` when not given.
        allow_different_weights: Accept a base of the same structure whose weights are not those it was made on.
        trainable: Leave the adapter's parameters trainable.

    Raises:
        FileFormatError: The adapter's files are unusable.
        MismatchError: The adapter was made for another base, or does not fit this one.
    """
    from haori.bases import load_model

    files = inspect_adapter(folder)
    card = card or read_card(folder)
    if card is not None:
        check_base(card, base.reference(), allow_different_weights=allow_different_weights)
    needed = needed_components(base, changed_components(base.components, files))
    model = load_model(base, dtype=dtype, device=device, head=files.head, components=needed)
    return attach_files(model, files, base_name=base.name, trainable=trainable)


def check_base(card: AdapterCard, base: BaseReference, *, allow_different_weights: bool = False) -> None:
    """Refuse a base that the adapter was not made for, by the fingerprints of the components that it changes.

    Raises:
        MismatchError: A component is missing, its structure differs, or its weights do and `allow_different_weights`
            is not set.
    """
    found = card.base.compare(base, card.components)
    wrong = {name: how for name, how in found.items() if how != "same"}
    if allow_different_weights:
        wrong = {name: how for name, how in wrong.items() if how != "other weights"}
    # What makes an adapter unusable is said before what may be allowed.
    name, how = min(wrong.items(), key=lambda item: item[1] == "other weights", default=("", "same"))
    if how == "same":
        return
    label = card.names[-1] if card.names else card.id.removeprefix("sha256:")[:12]
    pair = f"made for {_describe(card.base, name)}; {_describe(base, name)} was given"
    where = "" if list(card.base.components) == list(base.components) == [name] else f" of the component {name!r}"
    if how == "missing":
        raise MismatchError(
            f"The adapter {label!r} was {pair}. It changes the component {name!r}, which that base does not have, so "
            "it cannot be used there; choose the base it was made for."
        )
    if how == "other structure":
        raise MismatchError(
            f"The adapter {label!r} was {pair}. The two differ in architecture or layer shapes{where}, so the adapter "
            "cannot be used there; choose the base it was made for, or train it again."
        )
    raise MismatchError(
        f"The adapter {label!r} was {pair}. They have the same structure but other weights{where}, so results will "
        "differ from those measured; allow it with --allow-different-weights if that is what you want."
    )


def attach_files(
    model: "PreTrainedModel", files: AdapterFiles, *, base_name: str, trainable: bool = False
) -> "PeftModel":
    """Put an inspected adapter on a loaded model (which it changes in place) as PEFT's `default` adapter.

    A model for pictures is given the adapter's new words first, if it has any.

    Raises:
        MismatchError: A tensor belongs to no module of the model, has the wrong shape, or PEFT finds keys missing or
            left over.
    """
    import torch
    from peft import PeftModel
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    from haori.bases.quiet import quiet_transformers

    if files.peft_type == "ARD_LORA":
        import haori.adapters.ard_lora  # noqa: F401 - makes it known to PEFT
    prepare_words(model, files)
    check_keys(model, files, base_name=base_name)
    where = f"The adapter in {str(files.folder)!r} does not load on {base_name!r}"
    try:
        # What PEFT warns about on loading is checked below, or is not for the user to act on.
        with quiet_transformers():
            config = _configuration(files)
            config.inference_mode = not trainable
            wrapper: type[PeftModel] = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
            # PeftModel.from_pretrained does the same two steps, but drops the report of unexpected keys.
            adapted = wrapper(model, config, "default")
            report = adapted.load_adapter(
                str(files.folder), "default", is_trainable=trainable, torch_device=str(model.device)
            )
    except KeyError as error:
        raise MismatchError(f"{where}: its configuration needs the tensor {error}, which its file lacks.") from error
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise MismatchError(f"{where}: {_first_sentence(error)}.") from error
    missing = [key for key in report.missing_keys if not any(part in key for part in _SHARED)]
    unexpected = [] if config.is_prompt_learning else list(report.unexpected_keys)
    if missing:
        raise MismatchError(f"{where}: {len(missing)} tensors are missing from its file, first {missing[0]!r}.")
    if unexpected:
        raise MismatchError(f"{where}: {len(unexpected)} tensors would be ignored, first {unexpected[0]!r}.")
    return adapted


def prepare_words(model: Any, files: AdapterFiles) -> None:
    """Give a loaded model for pictures the new words of an adapter, as they began.

    Raises:
        MismatchError: A text encoder that reads them is not loaded, or has other new words already.
    """
    if files.words is None:
        return
    from haori.bases.diffusion import put_words

    try:
        put_words(model, files.words)
    except (InputError, IndexError) as error:
        raise MismatchError(f"The adapter in {str(files.folder)!r} does not fit: {_first_sentence(error)}.") from error


def _configuration(files: AdapterFiles) -> "PeftConfig":
    """Build PEFT's configuration as its `from_pretrained` does, from what was read: PEFT takes plain UTF-8 only."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[files.peft_type]
    options = {name: value for name, value in files.config.items() if name != "runtime_config"}
    config: PeftConfig = kind.from_peft_type(**kind.check_kwargs(**options))
    return config


def check_keys(model: "PreTrainedModel", files: AdapterFiles, *, base_name: str) -> None:
    """Check, before any adapter weight is read, that every tensor names a module of the model and has its shape.

    Raises:
        MismatchError: It does not.
    """
    modules = dict(model.named_modules())
    named = [key for key in files.tensors if key.startswith(_PREFIX)]
    owners = {key: _owner(key.removeprefix(_PREFIX), modules) for key in named}
    lost = [key for key, owner in owners.items() if not owner]
    where = f"The adapter in {str(files.folder)!r} does not fit {base_name!r}"
    if named and len(lost) == len(named):
        raise MismatchError(
            f"{where}: none of its {len(named)} tensors belongs to a module of the base; the first is {lost[0]!r}."
        )
    # Replicated layers exist only once PEFT has built them.
    if lost and not files.config.get("layer_replication"):
        raise MismatchError(f"{where}: {len(lost)} of {len(named)} tensors belong to no module, first {lost[0]!r}.")
    for key, owner in owners.items():
        part = key.removeprefix(f"{_PREFIX}{owner}.")
        if owner and (problem := _shape_problem(part, files.tensors[key].shape, modules[owner])):
            raise MismatchError(f"{where}: {problem} in module {owner!r}.")


def _owner(name: str, modules: dict[str, Any]) -> str:
    """Return the module that the tensor `name` belongs to, or the empty string.

    It is the longest dotted prefix that is a module, unless what is left runs through modules that are not there.
    """
    owner, _, rest = name.rpartition(".")
    while owner and owner not in modules:
        owner, _, part = owner.rpartition(".")
        rest = f"{part}.{rest}"
    module = modules.get(owner) if owner else None
    if module is None:
        return ""
    is_container = any(True for _ in module.children()) and not any(True for _ in module.parameters(recurse=False))
    return "" if is_container and "." in rest else owner


def _shape_problem(part: str, shape: tuple[int, ...], module: Any) -> str | None:
    """Compare the free side of a LoRA factor, or a whole stored weight, with the module it belongs to."""
    sides = {
        "lora_A.weight": (1, getattr(module, "in_features", None), "inputs"),
        "lora_B.weight": (0, getattr(module, "out_features", None), "outputs"),
        "lora_embedding_A": (1, getattr(module, "num_embeddings", None), "tokens"),
        "lora_embedding_B": (0, getattr(module, "embedding_dim", None), "dimensions"),
        "lora_magnitude_vector": (0, getattr(module, "out_features", None), "outputs"),
    }
    if part in sides:
        axis, expected, unit = sides[part]
        if expected is not None and (len(shape) <= axis or shape[axis] != expected):
            return f"{part} of shape {list(shape)} does not match the base's {expected} {unit}"
    elif part in {"weight", "base_layer.weight"}:
        weight = getattr(module, "weight", None)
        if weight is not None and weight.is_floating_point() and tuple(weight.shape) != shape:
            return f"the stored weight of shape {list(shape)} does not match the base's {list(weight.shape)}"
    return None


def _describe(base: BaseReference, name: str) -> str:
    """Describe a base by the component `name`, or by its components where it has no such one."""
    of = base.components.get(name)
    if of is None:
        return f"{base.name!r} (components {', '.join(sorted(base.components))})"
    said = f"{of.architecture}, fingerprint {of.id}"
    return f"{base.name!r} ({said})" if len(base.components) == 1 else f"{base.name!r} ({name}: {said})"


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch reports a size mismatch on the lines after "Error(s) in loading state_dict for ...".
    text = (
        lines[1]
        if len(lines) > 1 and lines[0].startswith("Error(s) in loading")
        else (lines or [type(error).__name__])[0]
    )
    return text[:300].rstrip(".")
