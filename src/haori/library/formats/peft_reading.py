"""Reads what PEFT saves into the neutral form: a folder with its configuration, or a weight file alone.

Exact for LoRA with all that PEFT lets it have (rsLoRA, patterns, DoRA, biases, embeddings, convolutions, GPT-2's
transposed layers), AdaLoRA, LoHa, LoKr and ARD-LoRA; scales as PEFT 0.21 computes them. What a method's file does not
tell without the weights of the base (VeRA, IA3, OFT, ...) is refused.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import FileFormatError
from haori.core.records import MODEL_COMPONENT
from haori.core.safetensors_header import read_safetensors_header
from haori.library.adapter_files import CONFIG_NAME, WEIGHTS_NAME, inspect_adapter
from haori.library.config_values import PatternValues
from haori.library.formats.bundled_words import named_rows
from haori.library.formats.format import Source
from haori.library.formats.peft_components import canonical_name, component_folders, component_of
from haori.library.update_shapes import fault_of, weight_shape
from haori.library.updates import AdapterUpdates, Kind, ModuleUpdate
from haori.library.word_files import word_encoder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CONFIG_KEY", "CONV1D_MODELS", "CONV1D_NAMES", "PREFIX", "config_of", "read_peft"]

PREFIX = "base_model.model."
CONFIG_KEY = "adapter_config"
"""Under which the neutral form's metadata keep the configuration of the folder, as JSON."""

CONV1D_NAMES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""Layers of GPT-2 and its kin, whose weights are kept as [in, out]; in other models they are ordinary ones."""

CONV1D_MODELS = frozenset({"decision_transformer", "gpt2", "imagegpt"})
"""Types of models (`model_type`) in which they are."""

_KINDS: dict[str, Kind] = {"LORA": "lora", "ADALORA": "lora", "ARD_LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_FACTORS = {
    "lora": {
        ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A": "A", ".lora_B": "B", ".lora_E": "E",
        ".lora_B.bias": "bias", ".lora_embedding_A": "rows_A", ".lora_embedding_B": "rows_B",
        ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude", ".alpha": "alpha",
    },
    "loha": {f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {f".lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}  # fmt: skip
# Each set of parts that a module may have, beside what is optional.
_LAYOUTS = {
    "lora": [{"A", "B"}, {"rows_A", "rows_B"}, {"A", "B", "E"}],
    "loha": [{"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}],
    "lokr": [
        first | second
        for first in ({"w1"}, {"w1_a", "w1_b"})
        for second in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
    ],
}
_OPTIONAL = frozenset({"bias", "magnitude", "alpha"})
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out"})
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# Options of LoRA with which the change is no product of A and B, or belongs to other weights than those of the base.
_VARIANTS = {
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "kasa_config": "it changes the base's own weights (KaSA)",
    "layer_replication": "it repeats layers of the base",
    "monteclora_config": "its factors are drawn at random (MonteCLoRA)",
    "target_parameters": "it changes single parameters (target_parameters)",
    "trainable_token_indices": "it holds rows of an embedding as they are, not what is added to them",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "use_qalora": "it pools the inputs of a quantised base (QA-LoRA)",
    "velora_config": "it keeps compressed activations (VeLoRA)",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft(source: Source) -> AdapterUpdates:
    """Read a PEFT folder, or a weight file as PEFT names its tensors, into the neutral form.

    A file alone says nothing of alpha unless it has `.alpha` tensors: without them the scale is 1, as everywhere.
    A folder of folders holds one adapter of a pipeline, a PEFT folder for each of its components.

    Raises:
        FileFormatError: A key is not known, parts do not fit, or the method cannot be told from its file.
    """
    path = source.path
    if folders := component_folders(path):
        return _joined({name: read_peft(replace(source, path=folder)) for name, folder in folders.items()})
    if not path.is_dir() and path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file():
        path = path.parent
    where = f"The adapter in {str(path)!r}"
    words = None
    if path.is_dir():
        files = inspect_adapter(path)
        source = Source(path / WEIGHTS_NAME, files.tensors, source.metadata, source.base_config)
        config, words = dict(files.config), files.words
        _refuse_variants(where, config)
    else:
        config = {"peft_type": "LORA", "lora_alpha": None}
    if config["peft_type"] == "ARD_LORA":
        from haori.adapters.ard_lora import to_lora

        plain, tensors = to_lora(path)
        config = {**config, **plain.to_dict(), "peft_type": "LORA"}
    else:
        _check_dtypes(where, source)
        tensors = source.load()
    metadata = dict(source.metadata)
    if path.is_dir():
        metadata[CONFIG_KEY] = json.dumps(config, default=_listed)
    kernels = _kernels(where, path) if config["peft_type"] == "ADALORA" else {}
    bundled: dict[str, Tensor] = {}
    if words is not None:
        for key, encoder in [(key, encoder) for key in tensors if (encoder := word_encoder(key)) is not None]:
            bundled |= named_rows(words, encoder, tensors.pop(key))
    found = _Reader(where, config, tensors, source.base_config, kernels).read(metadata)
    return replace(found, extra={**found.extra, **bundled})


def _joined(parts: Mapping[str, AdapterUpdates]) -> AdapterUpdates:
    """Join the adapters of single components, each named by the folder that it was in."""
    modules: dict[str, ModuleUpdate] = {}
    extra: dict[str, Tensor] = {}
    for component, part in parts.items():
        modules |= {_within(component, name): update for name, update in part.modules.items()}
        extra |= {_within(component, name): tensor for name, tensor in part.extra.items()}
    return AdapterUpdates(modules, {}, "peft", None, extra)


def _within(component: str, name: str) -> str:
    return canonical_name(component, name.partition(".")[2])


def config_of(updates: AdapterUpdates) -> dict[str, Any]:
    """Return the PEFT configuration that an adapter was read with; nothing if it was none of PEFT's."""
    try:
        config = json.loads(updates.metadata.get(CONFIG_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


class _Part(NamedTuple):
    module: str
    part: str


class _Reader:
    """Sorts the tensors of one adapter by module, and makes an update of each module's."""

    def __init__(
        self,
        where: str,
        config: Mapping[str, Any],
        tensors: "Mapping[str, Tensor]",
        base: Mapping[str, Any] | None,
        kernels: Mapping[str, list[int]],
    ) -> None:
        self.where, self.config, self.tensors, self.base = where, config, tensors, base
        self.method = str(config["peft_type"])
        self.is_folder = config.get("lora_alpha", 0) is not None  # and has a configuration
        self.kind: Kind = _KINDS[self.method]
        self.kernels = kernels
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.extra: dict[str, Tensor] = {}

    def read(self, metadata: Mapping[str, str]) -> AdapterUpdates:
        """Return the adapter."""
        component = component_of(self.config)
        whole = {}
        for key, tensor in self.tensors.items():
            if (found := self._part(key)) is None:
                whole[key] = tensor
            elif found.part in self.parts.setdefault(found.module, {}):
                raise FileFormatError(f"{self.where} holds {found.part!r} of {found.module!r} twice.")
            else:
                self.parts[found.module][found.part] = tensor
        for key, tensor in whole.items():
            self.extra[canonical_name(component, self._whole_name(key))] = tensor
        self._ranks = PatternValues(self.config.get("rank_pattern"), self.config.get("r", 8), self.parts.keys())
        self._alphas = PatternValues(self.config.get("alpha_pattern"), self._alpha(), self.parts.keys())
        modules = {canonical_name(component, name): self._update(name, parts) for name, parts in self.parts.items()}
        found_modules = {name: update for name, update in modules.items() if update is not None}
        if not found_modules and not self.extra:
            raise FileFormatError(f"{self.where} holds no update of any module.")
        return AdapterUpdates(found_modules, metadata, "peft", None, self.extra)

    def _part(self, key: str) -> _Part | None:
        name = key.removeprefix(PREFIX)
        if name != key:
            for suffix, part in _FACTORS[self.kind].items():
                if name.endswith(suffix) and len(name) > len(suffix) and (part != "alpha" or not self.is_folder):
                    return _Part(name.removesuffix(suffix), part)
        return None

    def _whole_name(self, key: str) -> str:
        """Return the name of a tensor that is kept whole, without prefix; refuse what is none."""
        name = key.removeprefix(PREFIX)
        module, _, parameter = name.rpartition(".")
        saved = self.config.get("modules_to_save") or ()
        parents = [name[:at] for at, letter in enumerate(name) if letter == "."]
        if name != key and any(parent.endswith(tuple(saved)) for parent in parents if saved):
            return name
        if name != key and parameter == "weight":  # PEFT keeps a copy of every embedding that is adapted or resized
            owner = module.removesuffix(".base_layer")
            if owner.rpartition(".")[2] in _EMBEDDINGS or (owner != module and owner in self.parts):
                return name
        if name.endswith(".bias") and self.config.get("bias", "none") != "none":
            raise FileFormatError(
                f"{self.where} holds the trained bias {key!r} as it is, not what is added to it, which cannot be told "
                "without the base; merge it with `haori merge`."
            )
        raise FileFormatError(f"{self.where} holds {key[:200]!r}, which is no part of a {self.method.lower()} adapter.")

    def _alpha(self) -> Any:
        default = {"lora": 8, "loha": 8, "lokr": 8}[self.kind]
        return self.config.get("lora_alpha" if self.kind == "lora" else "alpha", default)

    def _update(self, name: str, parts: "dict[str, Tensor]") -> ModuleUpdate | None:
        """Return the update of one module; None where AdaLoRA left it no rank."""
        if ".base_layer" in name:  # PEFT wraps so what it adapts inside nn.MultiheadAttention
            raise FileFormatError(
                f"{self.where} changes {name!r}, a part of PyTorch's own attention, whose weights have no names of "
                "their own; merge it with `haori merge`."
            )
        required = parts.keys() - _OPTIONAL
        if required not in _LAYOUTS[self.kind] or ("E" in parts) != (self.method == "ADALORA"):
            raise FileFormatError(
                f"{self.where} holds of {name!r} {', '.join(sorted(parts))}, which is no whole update."
            )
        if self.is_folder and ("magnitude" in parts) != bool(self.config.get("use_dora")):
            raise FileFormatError(
                f"{self.where} and its configuration differ on whether {name!r} has a magnitude (DoRA)."
            )
        if self.method == "ADALORA":
            if parts["A"].shape[0] == 0:
                return None
            update = self._of_adalora(name, parts)
        elif self.kind == "lora":
            update = self._of_lora(name, parts)
        else:
            update = self._of_lycoris(name, parts)
        fault = fault_of(update)
        outputs = (weight_shape(update) or (0,))[-1 if self._is_transposed(name) else 0]
        if fault is None and update.bias is not None and update.bias.numel() != outputs:
            fault = f"the bias of shape {list(update.bias.shape)} does not fit {outputs} outputs"
        if fault is not None:
            raise FileFormatError(f"{self.where} holds of {name!r} what makes no {self.kind} update: {fault}.")
        return update

    def _of_lora(self, name: str, parts: "dict[str, Tensor]") -> ModuleUpdate:
        alpha = self._alphas.of(name)
        if "alpha" in parts:
            alpha = _single(self.where, name, parts["alpha"])
        a, b = (parts["A"], parts["B"]) if "A" in parts else (parts["rows_A"], parts["rows_B"])
        magnitude, bias = parts.get("magnitude"), parts.get("bias")
        if a.dim() < 2 or b.dim() < 2:
            raise FileFormatError(f"{self.where} holds factors of {name!r} with fewer than two dimensions.")
        if "rows_A" in parts or self._is_transposed(name):  # kept as [in, out], so W gains (B A)^T = A^T B^T
            a, b = b.T.contiguous(), a.T.contiguous()
            magnitude = None if magnitude is None else magnitude.reshape(1, -1)
        elif magnitude is not None:
            magnitude = magnitude.flatten()
        update = ModuleUpdate(
            "lora", {"A": a, "B": b}, None if alpha is None else float(alpha), bool(self.config.get("use_rslora")),
            magnitude,
        )  # fmt: skip
        if bias is None:
            return update
        return ModuleUpdate(
            "lora", update.factors, update.alpha, update.rslora, magnitude, (bias.double() * update.scale).float()
        )

    def _of_adalora(self, name: str, parts: "dict[str, Tensor]") -> ModuleUpdate:
        """Multiply the singular values E into A; PEFT divides by the rank at the start, and by a little more."""
        a, b, e = parts["A"], parts["B"], parts["E"]
        rank, kernel = a.shape[0], self.kernels.get(f"{PREFIX}{name}")
        if a.dim() != 2 or b.dim() != 2 or tuple(e.shape) != (rank, 1):
            raise FileFormatError(f"{self.where} holds singular values of {name!r} that do not fit its factors.")
        alpha, first = self._alpha(), self.config.get("init_r", 12)
        scale = (alpha if alpha > 0 else float(rank)) / (first + 1e-5)
        a = a.float() * e.float()
        if self._is_transposed(name):
            a, b = b.T.contiguous(), a.T.contiguous()
        if kernel is not None:
            if a.shape[1] % math.prod(kernel):
                raise FileFormatError(f"{self.where} holds factors of {name!r} that do not fit its kernel {kernel}.")
            a, b = a.reshape(rank, -1, *kernel), b.reshape(*b.shape, *[1] * len(kernel))
        return ModuleUpdate("lora", {"A": a, "B": b}, scale * rank)

    def _of_lycoris(self, name: str, parts: "dict[str, Tensor]") -> ModuleUpdate:
        """LoHa and LoKr; PEFT scales by alpha / r even where nothing of LoKr is factored."""
        rank, alpha = self._ranks.of(name), float(self._alphas.of(name))
        update = ModuleUpdate(self.kind, parts, alpha)
        if update.rank is None:
            scaled = (parts["w1"].double() * (alpha / rank)).float()
            return ModuleUpdate(self.kind, {**parts, "w1": scaled})
        if update.rank != rank:
            raise FileFormatError(
                f"{self.where} gives {name!r} the rank {rank}, and its tensors have {update.rank}; correct 'r' or "
                "'rank_pattern' in its configuration."
            )
        return update

    def _is_transposed(self, name: str) -> bool:
        if name.rpartition(".")[2] not in CONV1D_NAMES:
            return False
        if self.base is not None:
            return self.base.get("model_type") in CONV1D_MODELS
        return bool(self.config.get("fan_in_fan_out"))


def _kernels(where: str, folder: Path) -> dict[str, list[int]]:
    """Return the kernels of AdaLoRA's convolutions, by the full name of the module."""
    from haori.adapters.adalora import KERNELS_KEY

    try:
        kernels = json.loads(read_safetensors_header(folder / WEIGHTS_NAME).metadata.get(KERNELS_KEY, "{}"))
        return {str(name): [max(1, int(side)) for side in kernel] for name, kernel in kernels.items()}
    except (AttributeError, RecursionError, TypeError, ValueError):
        raise FileFormatError(f"{where} has a header in which {KERNELS_KEY!r} names no kernels.") from None


def _refuse_variants(where: str, config: Mapping[str, Any]) -> None:
    method = config["peft_type"]
    if method not in _KINDS:
        raise FileFormatError(
            f"{where} is of the method {method.lower()}; what it adds to a weight cannot be told from its file alone. "
            f"Read are lora, dora, adalora, ard_lora, loha and lokr; {_way_round(config)}."
        )
    for option, reason in _VARIANTS.items():
        if config.get(option):
            raise FileFormatError(f"{where} cannot be written as updates of weights: {reason}; {_way_round(config)}.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise FileFormatError(
            f"{where} was trained over a base that its start {start!r} had changed, so it does not act on the base as "
            "it is; save it as a plain LoRA where it was trained (PEFT: path_initial_model_for_weight_conversion)."
        )


def _way_round(config: Mapping[str, Any]) -> str:
    """Return what can be done with an adapter that is no sum of updates: pipelines are merged from updates alone."""
    if component_of(config) == MODEL_COMPONENT:
        return "use it as it is, or merge it into its base with `haori merge`, without --stream"
    if config.get("trainable_token_indices"):
        return "use it as it is, or train it anew with a word of its own (`words` in the recipe), which files can hold"
    return "use it as it is, or train it anew with a method that files can hold, such as method.kind=lora"


def _check_dtypes(where: str, source: Source) -> None:
    for key, entry in source.tensors.items():
        if entry.dtype not in _FLOATS:
            raise FileFormatError(f"{where} holds the tensor {key[:200]!r} of dtype {entry.dtype}; use floats.")


def _single(where: str, name: str, tensor: "Tensor") -> float:
    if tensor.numel() != 1:
        raise FileFormatError(f"{where} holds an alpha of {name!r} that is no single number.")
    return float(tensor)


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(getattr(value, "value", value))
