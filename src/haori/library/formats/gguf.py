"""llama.cpp's GGUF LoRA: tensors `blk.N.attn_q.weight.lora_a` and `.lora_b`, one alpha for all of them.

llama.cpp computes W x + alpha / rank · B A x on its own weights, whose rows it keeps in another order than transformers
where the rotary embedding asks for it; B's rows are kept in that order too, which needs the number of heads. Alphas and
scales that differ by module are multiplied into B. Names and orders are in `gguf_names.py`; source of both is
llama.cpp's conversion (convert_lora_to_gguf.py and conversion/, of 2026).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import FileFormatError, InputError
from haori.core.records import MODEL_COMPONENT
from haori.core.storage import staged_file
from haori.library.formats.format import Format, Source
from haori.library.formats.gguf_header import GGUF_TYPES, GgufTensor, read_gguf_header
from haori.library.formats.gguf_model import (
    GgufModel,
    model_of_base,
    model_of_file,
    module_of,
    slot_of,
    turned,
)
from haori.library.update_shapes import fault_of
from haori.library.updates import AdapterUpdates, ModuleUpdate

if TYPE_CHECKING:
    from torch import Tensor

    from haori.core.records import AdapterCard

__all__ = ["FORMAT"]


class _Gguf:
    """The format of adapters that llama.cpp, Ollama and LM Studio load."""

    name = "gguf"
    title = "a GGUF LoRA of llama.cpp"

    def detect(self, source: Source) -> bool:
        """Say whether the file begins as GGUF does."""
        if not source.path.is_file():
            return False
        with source.path.open("rb") as file:
            return file.read(4) == b"GGUF"

    def read(self, source: Source) -> AdapterUpdates:
        """Read the adapter; of Llama's kin it takes the heads from the base's configuration or from the file."""
        header = read_gguf_header(source.path)
        where = f"The adapter {str(source.path)!r}"
        metadata = header.metadata
        kind = metadata.get("adapter.type")
        if metadata.get("general.type") != "adapter" or kind != "lora":
            raise FileFormatError(f"{where} is of the type {str(kind)[:40]!r}; read are those of the type 'lora'.")
        if "adapter.alora.invocation_tokens" in metadata:
            raise FileFormatError(f"{where} acts only after its invocation tokens (aLoRA), which no update expresses.")
        model = model_of_file(where, metadata, source.base_config)
        alpha = metadata.get("adapter.lora.alpha", 0.0)
        if not isinstance(alpha, float) or not abs(alpha) < 1e9:
            raise FileFormatError(f"{where} has the alpha {str(alpha)[:40]}, which is no number that a scale can have.")
        parts: dict[tuple[str, str], dict[str, GgufTensor]] = {}
        for name, tensor in header.tensors.items():
            module, slot, side = module_of(where, name, model.family)
            parts.setdefault((module, slot), {})[side] = tensor
        modules = {}
        for (module, slot), pair in parts.items():
            if pair.keys() != {"a", "b"}:
                raise FileFormatError(f"{where} holds only lora_{min(pair)} of {module!r}; both factors are needed.")
            a, b = (_values(source.path, pair[side]) for side in "ab")
            modules[f"{MODEL_COMPONENT}.{module}"] = _update(where, module, slot, a, b, alpha or None, model)
        if not modules:
            raise FileFormatError(f"{where} holds no tensors, so there is no adapter in it.")
        plain = {key: str(value) for key, value in metadata.items() if value is not None}
        return AdapterUpdates(modules, plain, self.name)

    def write(
        self,
        updates: AdapterUpdates,
        path: Path,
        card: "AdapterCard | None" = None,
        *,
        base_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a LoRA of a text model, in float16 if all its factors are, and in float32 otherwise."""
        import numpy as np
        import torch
        from gguf import GGUFWriter

        model = model_of_base(updates, card, base_config)
        _refuse(updates)
        alphas = {name: update.scale * (update.rank or 1) for name, update in updates.modules.items()}
        acting = Counter(alpha for alpha in alphas.values() if alpha)  # llama.cpp takes 0 for a scale of 1
        alpha = float(np.float32(acting.most_common(1)[0][0])) if acting else 1.0
        dtypes = {factor.dtype for update in updates.modules.values() for factor in update.factors.values()}
        half = dtypes == {torch.float16} and set(alphas.values()) == {alpha}
        with staged_file(path) as stage:
            writer = GGUFWriter(stage, model.family.architecture)
            writer.add_type("adapter")
            if card is not None and card.names:
                writer.add_name(card.names[-1])
            if card is not None and card.licence:
                writer.add_license(card.licence)
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            if model.heads:  # of which llama.cpp takes no notice in an adapter; they let it be read without its base
                writer.add_head_count(model.heads["attn_q"])
                writer.add_head_count_kv(model.heads["attn_k"])
            for name, update in updates.modules.items():
                slot, a, b = _kept(name, update, alphas[name] / alpha, model)
                dtype = np.float16 if half else np.float32
                writer.add_tensor(f"{slot}.weight.lora_a", a.numpy().astype(dtype))
                writer.add_tensor(f"{slot}.weight.lora_b", b.numpy().astype(dtype))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()


FORMAT: Format = _Gguf()


def _update(
    where: str, module: str, slot: str, a: "Tensor", b: "Tensor", alpha: float | None, model: GgufModel
) -> ModuleUpdate:
    if a.dim() != 2 or b.dim() != 2:
        raise FileFormatError(f"{where} holds factors of {module!r} with {a.dim()} and {b.dim()} dimensions, not two.")
    if slot == "token_embd":  # lora_a is [vocabulary, r] and lora_b [dim, r]
        a, b = b.T, a
    if model.family.rotated and slot in {"attn_q", "attn_k"}:
        if slot not in model.heads:
            raise FileFormatError(
                f"{where} keeps the rows of {module!r} in llama.cpp's order, which depends on the number of heads, and "
                "does not say how many there are; give its base."
            )
        b = turned(where, module, b, model.heads[slot], back=True)
    if model.family.transposed and slot in model.family.names:
        a, b = b.T, a.T
    update = ModuleUpdate("lora", {"A": a.contiguous(), "B": b.contiguous()}, alpha)
    if fault := fault_of(update):
        raise FileFormatError(f"{where} holds of {module!r} what makes no update: {fault}.")
    return update


def _kept(name: str, update: ModuleUpdate, factor: float, model: GgufModel) -> "tuple[str, Tensor, Tensor]":
    """Return llama.cpp's name of a module, and the factors as it keeps them."""
    module = name.removeprefix(f"{MODEL_COMPONENT}.")
    slot, full = slot_of(module, model.family)
    a, b = update.factors["A"], update.factors["B"]
    if factor != 1:
        b = b.double() * factor
    a, b = a.float(), b.float()
    if slot in {"token_embd", "output"} and model.tied is None:
        raise InputError(
            f"The adapter changes {module!r}, which llama.cpp can do unless the base has one weight as its embedding "
            "and its output; give the base."
        )
    if slot in {"token_embd", "output"} and model.tied:
        raise InputError(
            f"The base has one weight as its embedding and its output, and llama.cpp cannot change one of them; the "
            f"adapter changes {module!r}. Merge it with `haori merge` instead."
        )
    if model.family.rotated and slot in {"attn_q", "attn_k"}:
        if slot not in model.heads:
            raise InputError(
                f"llama.cpp keeps the rows of {module!r} in an order that depends on the number of heads; give the "
                "base."
            )
        b = turned("The adapter", module, b, model.heads[slot], back=False)
    if model.family.transposed and slot in model.family.names:
        a, b = b.T, a.T
    if slot == "token_embd":
        a, b = b, a.T
    return full, a.contiguous(), b.contiguous()


def _refuse(updates: AdapterUpdates) -> None:
    """Refuse what a GGUF adapter has no place for.

    The copy of the base's own weight that PEFT keeps of an adapted embedding or output is no part of the change.
    """
    copies = {f"{name}.base_layer.weight" for name in updates.modules}
    if whole := updates.extra.keys() - copies:
        raise InputError(
            f"A GGUF adapter has no place for whole modules, such as {min(whole)!r}; merge the adapter with "
            "`haori merge` instead."
        )
    for name, update in updates.modules.items():
        if not name.startswith(f"{MODEL_COMPONENT}."):
            raise InputError(f"A GGUF adapter is for one text model, and this adapter changes {name!r}.")
        reasons = {
            f"is of the kind {update.kind}, and a GGUF adapter holds LoRA alone": update.kind != "lora",
            "has a magnitude (DoRA), for which a GGUF adapter has no place": update.magnitude is not None,
            "changes a bias, for which a GGUF adapter has no place": update.bias is not None,
            "is a convolution, to which llama.cpp applies no adapter": any(
                factor.dim() != 2 for factor in update.factors.values()
            ),
        }  # fmt: skip
        for reason, holds in reasons.items():
            if holds:
                raise InputError(
                    f"The update of {name!r} {reason}. Merge it with `haori merge`, or turn it into a LoRA first."
                )


def _values(path: Path, tensor: GgufTensor) -> "Tensor":
    """Read one tensor; Q8_0 is unpacked to float32."""
    import numpy as np
    import torch

    with path.open("rb") as file:
        file.seek(tensor.start)
        raw = bytearray(file.read(tensor.end - tensor.start))
    if len(raw) < tensor.end - tensor.start:
        raise FileFormatError(f"{str(path)!r} was cut off while it was read; read it again.")
    kind = GGUF_TYPES[tensor.type][0]
    if kind == "Q8_0":
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        values = dequantize(np.frombuffer(raw, np.uint8), GGMLQuantizationType.Q8_0)
        return torch.from_numpy(values).reshape(tensor.shape)
    dtype = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64, "BF16": torch.bfloat16}[kind]
    return torch.frombuffer(raw, dtype=dtype).reshape(tensor.shape)
