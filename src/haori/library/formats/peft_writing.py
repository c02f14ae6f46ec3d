"""Writes the neutral form as a folder that stock PEFT loads: LoRA and DoRA, LoHa, LoKr.

Ranks and alphas that differ go by full module names, so that no other module is meant. What a PEFT folder has no place
for is refused.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from haori.adapters.patterns import exact_key
from haori.core.errors import InputError
from haori.core.records import MODEL_COMPONENT
from haori.core.storage import staged_folder
from haori.library.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from haori.library.formats.bundled_words import refuse_words
from haori.library.formats.lokr_layout import peft_factors
from haori.library.formats.peft_components import MODEL_CLASSES, PIPELINE_CLASS, installed_name
from haori.library.formats.peft_reading import CONV1D_MODELS, CONV1D_NAMES, PREFIX, config_of
from haori.library.head_files import write_head
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from haori.core.records import AdapterCard

__all__ = ["write_peft", "write_pipeline_peft"]

_Value = TypeVar("_Value")
_HEAD_TYPES = {"sequence_classification": "SEQ_CLS", "token_classification": "TOKEN_CLS"}
_CONV1D_CLASSES = ("GPT2", "ImageGPT", "DecisionTransformer")


def write_peft(
    updates: AdapterUpdates, path: Path, card: "AdapterCard | None", base_config: Mapping[str, Any] | None
) -> None:
    """Write an adapter as a new PEFT folder, or, if it changes several components, as a folder with one for each.

    Args:
        updates: What to write.
        path: The folder; what is there is replaced.
        card: For the base's name, the task and the head.
        base_config: The base's configuration; needed where names leave open whether a layer is GPT-2's.

    Raises:
        InputError: A PEFT folder cannot hold it; the reason is named.
    """
    refuse_words(updates.extra, "A PEFT folder")
    components = sorted({name.partition(".")[0] for name in (*updates.modules, *updates.extra)})
    if len(components) == 1:
        _write_model(_Writer(updates, components[0], card, base_config), path, card)
        return
    if not components:
        raise InputError("The adapter changes nothing, so there is no PEFT folder of it.")
    with staged_folder(path) as stage:
        for component in components:
            part = replace(
                updates,
                modules=_of_component(updates.modules, component),
                extra=_of_component(updates.extra, component),
            )
            _write_model(_Writer(part, component, card, base_config), stage / component, card)


def write_pipeline_peft(updates: AdapterUpdates, path: Path, card: "AdapterCard | None" = None) -> None:
    """Write an adapter of a pipeline as the one PEFT folder that training, proof and library work with.

    Args:
        updates: What to write.
        path: The folder; what is there is replaced.
        card: For the classes of the components; without it text encoders are taken for those of Stable Diffusion.

    Raises:
        InputError: A PEFT folder cannot hold it; the reason is named.
    """
    refuse_words(updates.extra, "A PEFT folder")
    _write_model(_Writer(updates, None, card, None), path, card)


def _write_model(writer: "_Writer", path: Path, card: "AdapterCard | None") -> None:
    from safetensors.torch import save_file

    config, tensors = writer.written()
    with staged_folder(path) as stage:
        save_file(
            {key: value.contiguous().clone() for key, value in tensors.items()}, stage / WEIGHTS_NAME, {"format": "pt"}
        )
        (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if card is not None and card.head is not None:
            write_head(stage, card.head)


def _of_component(named: "Mapping[str, _Value]", component: str) -> "dict[str, _Value]":
    return {name: value for name, value in named.items() if name.partition(".")[0] == component}


class _Writer:
    """Makes the configuration and the tensors of one adapter: of one component, or of a whole pipeline (None)."""

    def __init__(
        self,
        updates: AdapterUpdates,
        component: str | None,
        card: "AdapterCard | None",
        base_config: Mapping[str, Any] | None,
    ) -> None:
        self.updates, self.component, self.card, self.base = updates, component, card, base_config
        self.before = config_of(updates)
        self.modules = {self._installed(name): update for name, update in updates.modules.items()}

    def written(self) -> tuple[dict[str, Any], "dict[str, Tensor]"]:
        """Return adapter_config.json and the tensors."""
        kinds = {update.kind for update in self.modules.values()} or {"lora"}
        if kinds == {"lora"}:
            config, tensors = self._lora()
        elif kinds == {"loha"}:
            config, tensors = self._loha()
        elif kinds == {"lokr"}:
            config, tensors = self._lokr()
        else:
            raise InputError(
                f"A PEFT folder holds updates of one kind, and this adapter has {', '.join(sorted(kinds))}; whole "
                "differences (diff) have no place in it. Turn it into a LoRA first, by singular values."
            )
        saved = self._whole(tensors)
        config |= self._of_base()
        if saved:
            config["modules_to_save"] = saved
        return config, tensors

    def _lora(self) -> tuple[dict[str, Any], "dict[str, Tensor]"]:
        modules = {name: _two_factors(update) for name, update in self.modules.items()}
        dora = {name for name, update in modules.items() if update.magnitude is not None}
        biased = any(update.bias is not None for update in modules.values())
        if dora and len(dora) < len(modules):
            name = min(modules.keys() - dora)
            raise InputError(
                f"PEFT has DoRA on all modules of an adapter or on none, and {name!r} has no magnitude while "
                f"{min(dora)!r} has one; merge the adapter instead, or turn it into a LoRA on its base first."
            )
        if dora and biased:
            raise InputError("PEFT does not allow DoRA with an update of a bias, and this adapter has both; merge it.")
        rslora = bool(modules) and all(update.rslora and update.alpha is not None for update in modules.values())
        config, _ = self._ranks("lora_alpha", modules, {
            name: update.alpha if rslora and update.alpha is not None else update.scale * (update.rank or 1)
            for name, update in modules.items()
        })  # fmt: skip
        transposed = {name for name in modules if self._is_conv1d(name)}
        tensors: dict[str, Tensor] = {}
        for name, update in modules.items():
            tensors |= self._lora_tensors(name, update, transposed=name in transposed, biased=biased)
        return {
            "peft_type": "LORA", **config, "bias": "none", "lora_dropout": 0.0, "use_rslora": rslora,
            "use_dora": bool(dora), "lora_bias": biased, "fan_in_fan_out": bool(transposed), "init_lora_weights": True,
        }, tensors  # fmt: skip

    def _lora_tensors(self, name: str, update: ModuleUpdate, *, transposed: bool, biased: bool) -> "dict[str, Tensor]":
        import torch

        a, b, m = update.factors["A"], update.factors["B"], update.magnitude
        is_table = self._is_table(name)
        if transposed or is_table:
            a, b = b.T, a.T
        names = (".lora_embedding_A", ".lora_embedding_B") if is_table else (".lora_A.weight", ".lora_B.weight")
        tensors = {f"{PREFIX}{name}{names[0]}": a, f"{PREFIX}{name}{names[1]}": b}
        if m is not None:
            by_input = m.dim() > 1 and m.shape[0] == 1
            # A single number is a column as well as a row.
            if m.numel() != b.shape[0] or (m.numel() != 1 and by_input != (transposed or is_table)):
                raise InputError(
                    f"PEFT norms the rows of a weight, one for each output, and the magnitude of {name!r} is of shape "
                    f"{list(m.shape)}; merge the adapter instead."
                )
            m = m.flatten()
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = (
                m if a.dim() == 2 else m.reshape(1, -1, *[1] * (a.dim() - 2))
            )
        if biased:
            if is_table:
                raise InputError(f"PEFT has no bias for an embedding such as {name!r}, and other modules have one.")
            bias = torch.zeros(b.shape[0])
            if update.bias is not None and update.scale:
                bias = update.bias.double() / update.scale
            tensors[f"{PREFIX}{name}.lora_B.bias"] = bias.float()
        return tensors

    def _loha(self) -> tuple[dict[str, Any], "dict[str, Tensor]"]:
        self._refuse_beside("loha")
        alphas = {name: update.scale * (update.rank or 1) for name, update in self.modules.items()}
        config, _ = self._ranks("alpha", self.modules, alphas)
        tensors = {
            f"{PREFIX}{name}.hada_{part}": factor
            for name, update in self.modules.items()
            for part, factor in update.factors.items()
        }
        effective = any("t1" in update.factors for update in self.modules.values())
        return {"peft_type": "LOHA", **config, "use_effective_conv2d": effective, "init_weights": True}, tensors

    def _lokr(self) -> tuple[dict[str, Any], "dict[str, Tensor]"]:
        """Write the first factor whole and the second as it is, at ranks that make PEFT build them so."""
        self._refuse_beside("lokr")
        known = self.before.get("decompose_factor")
        factors, split = peft_factors(self.modules, known if isinstance(known, int) else None)
        tensors = {
            f"{PREFIX}{name}.lokr_{part}": factor
            for name, held in factors.items()
            for part, factor in held.tensors.items()
        }
        ranks = {name: held.rank for name, held in factors.items()}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {exact_key(name, factors): found for name, found in sorted(ranks.items()) if found != rank}
        return {
            "peft_type": "LOKR", "r": rank, "alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern,
            "target_modules": sorted(self.modules), "decompose_both": False, "decompose_factor": split,
            "use_effective_conv2d": False, "init_weights": True,
        }, tensors  # fmt: skip

    def _refuse_beside(self, kind: str) -> None:
        for name, update in self.modules.items():
            if update.magnitude is not None or update.bias is not None:
                raise InputError(
                    f"PEFT's {kind} has neither a magnitude (DoRA) nor a bias, and {name!r} has one; merge the adapter "
                    "instead."
                )

    def _ranks(
        self, alpha_field: str, modules: Mapping[str, ModuleUpdate], alphas: Mapping[str, float]
    ) -> tuple[dict[str, Any], int]:
        """Return rank, alpha, the patterns of those that differ, and the target modules."""
        ranks = {name: update.rank or 1 for name, update in modules.items()}
        rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
        alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
        return {
            "r": rank,
            alpha_field: _number(alpha),
            "rank_pattern": {exact_key(name, modules): found for name, found in sorted(ranks.items()) if found != rank},
            "alpha_pattern": {exact_key(name, modules): _number(a) for name, a in sorted(alphas.items()) if a != alpha},
            "target_modules": sorted(modules) or "dummy-target-modules",
        }, rank

    def _whole(self, tensors: "dict[str, Tensor]") -> list[str]:
        """Add the tensors that are kept whole; return the modules they belong to."""
        saved = set()
        for full, tensor in self.updates.extra.items():
            name = self._installed(full)
            module, _, parameter = name.rpartition(".")
            owner = module.removesuffix(".base_layer")
            if not module or parameter not in {"weight", "bias"}:
                raise InputError(f"A PEFT folder has no place for {full!r}, which belongs to no module.")
            if owner not in self.modules:  # of an adapted embedding PEFT keeps a copy beside the update
                saved.add(module)
            tensors[f"{PREFIX}{name}"] = tensor
        return sorted(saved)

    def _of_base(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "task_type": self._task_type(),
            "base_model_name_or_path": self.before.get("base_model_name_or_path"),
            "revision": self.before.get("revision"),
            "inference_mode": True,
            "peft_version": version("peft"),
        }
        if self.card is not None:
            kind, _, place = self.card.base.source.partition(":")
            config["base_model_name_or_path"] = place if kind == "hub" else self.card.base.name
            config["revision"] = self.card.base.revision if kind == "hub" else None
        if self.component is None:
            config["auto_mapping"] = {"base_model_class": PIPELINE_CLASS, "parent_library": "haori.bases.diffusion"}
        elif self.component != MODEL_COMPONENT:
            kind = self._architecture(self.component)
            library = "transformers" if self.component.startswith("text_encoder") else "diffusers"
            config["auto_mapping"] = {"base_model_class": kind or None, "parent_library": library}
        elif isinstance(mapping := self.before.get("auto_mapping"), dict):
            config["auto_mapping"] = mapping
        return config

    def _installed(self, full: str) -> str:
        """Return what the model that is written for calls a module of this neutral name."""
        component, _, path = full.partition(".")
        if component.startswith("text_encoder"):
            path = installed_name(self._architecture(component), path)
        return path if self.component is not None else f"{component}.{path}"

    def _task_type(self) -> str | None:
        if self.card is not None and self.card.head is not None:
            return _HEAD_TYPES[self.card.head.kind]
        if self.before.get("task_type"):
            return str(self.before["task_type"])
        architecture = self._architecture(MODEL_COMPONENT)
        return "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None

    def _architecture(self, component: str) -> str:
        if self.base is not None:
            return str((self.base.get("architectures") or [""])[0])
        found = self.card.base.components.get(component) if self.card is not None else None
        if found is not None:
            return found.architecture
        return next((kind for kind, of in MODEL_CLASSES.items() if of == component), "")

    def _is_conv1d(self, name: str) -> bool:
        """Say whether a layer keeps its weight as [in, out]."""
        if name.rpartition(".")[2] not in CONV1D_NAMES:
            return False
        if self.base is not None:
            return self.base.get("model_type") in CONV1D_MODELS
        if architecture := self._architecture(MODEL_COMPONENT):
            return architecture.startswith(_CONV1D_CLASSES)
        if "fan_in_fan_out" in self.before:
            return bool(self.before["fan_in_fan_out"])
        raise InputError(
            f"Layers such as {name!r} are kept transposed in GPT-2 and not in other models; give the base to write it."
        )

    def _is_table(self, name: str) -> bool:
        """Say whether a module is an embedding, whose updates PEFT keeps apart."""
        return name.rpartition(".")[2] in _TABLES


_TABLES = frozenset({
    "embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings", "embed_in",
    "token_embedding", "position_embedding", "shared", "tok_embeddings",
})  # fmt: skip


def _two_factors(update: ModuleUpdate) -> ModuleUpdate:
    """Multiply Tucker's core into A, which then has the kernel: [r, in, k...]."""
    import torch

    if "mid" not in update.factors:
        return update
    a, b, core = (update.factors[name].float() for name in ("A", "B", "mid"))
    a = torch.einsum("ij...,jq->iq...", core, a.flatten(1))
    b = b.flatten(1).reshape(b.shape[0], -1, *[1] * (a.dim() - 2))
    return replace(update, factors={"A": a, "B": b})


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
