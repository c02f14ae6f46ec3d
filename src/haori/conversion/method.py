"""The method of a recipe, out of what a configuration says in many keys: kind, quantisation, start, targets, dtype.

Other tools switch variants on by booleans (`use_dora`, `load_in_4bit`, `pissa_init`); here each is a kind of method
with keys of its own. So what was carried to a kind that has no such key is taken back and left, with the reason.
"""

from collections.abc import Container

from haori.conversion.draft import Draft
from haori.core.methods import METHODS

__all__ = ["combine_method", "combine_precision", "drop_foreign_keys"]

_STARTS = {
    "true": "default", "default": "default", "kaiming": "default", "pissa": "pissa", "olora": "olora", "eva": "eva",
    "orthogonal": "orthogonal", "loftq": "loftq",
}  # fmt: skip
_NO_QUANTISED_DORA = "DoRA over a quantised base is not trained here; the base stays quantised, as QLoRA"
_DTYPES = {
    "bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "half": "fp16", "fp16": "fp16", "float32": "fp32",
    "float": "fp32", "fp32": "fp32", "auto": "auto",
}  # fmt: skip


def combine_method(draft: Draft) -> None:
    """Choose the kind of method.

    Facts: `kind` (one of ours, "lora" by default) or `peft_type` (a method of PEFT by name), `4bit`, `8bit`,
    `dora`, `init`, `loftq_bits`, `double_quantization`, and the booleans `pissa` and `loftq` (or its bits).
    """
    bits = 4 if draft.value("4bit") else 8 if draft.value("8bit") else None
    kind = draft.value("kind", "lora")
    if kind == "qlora":
        kind, bits = "lora", bits or 4
    if draft.value("loftq") or _start(draft) == "loftq":
        _loftq(draft, kind, bits)
        return
    if kind == "full":
        draft.carry(("kind",), {"method.kind": "full"})
        for name in ("4bit", "8bit"):
            if draft.value(name):
                draft.leave(name, "a quantised base cannot be trained in full", "use method.kind=qlora")
    elif kind == "lora" and bits is not None:
        draft.carry((f"{bits}bit", "kind"), {"method.kind": "qlora", "method.bits": bits})
    elif kind == "lora" and draft.value("dora"):
        draft.carry(("dora", "kind"), {"method.kind": "dora"})
    elif draft.has("peft_type"):
        draft.carry(("peft_type",), {"method.kind": "peft", "method.type": draft.value("peft_type")})
    else:
        draft.carry(("kind",), {"method.kind": kind})
    _rest(draft, bits)


def _loftq(draft: Draft, kind: str, bits: int | None) -> None:
    said = draft.value("loftq")
    found = int(draft.value("loftq_bits") or (said if said and said is not True else bits or 4))
    if kind != "lora" or found not in (4, 8):
        for name in ("loftq", "init", "loftq_bits"):
            draft.leave(name, f"LoftQ is there for LoRA over 4 or 8 bits, not for {kind} and {found}")
        combine_method(draft)
        return
    remark = "" if bits else "LoftQ makes up for a quantised base, so the base is quantised"
    ours = {"method.kind": "qlora", "method.bits": found, "method.init": "loftq"}
    draft.carry(("loftq", "init", "loftq_bits", f"{found}bit", "kind"), ours, remark)
    _rest(draft, found)


def _start(draft: Draft) -> str:
    value = str(draft.value("init", "default")).strip().lower()
    return "pissa" if value.startswith("pissa_niter_") else _STARTS.get(value, value)


def _rest(draft: Draft, bits: int | None) -> None:
    """Settle the facts that the kind leaves over."""
    kind = draft.ours["method.kind"]
    if draft.value("dora"):
        draft.leave("dora", _NO_QUANTISED_DORA if kind == "qlora" else f"the method {kind!r} has no such variant",
                    "method.kind=dora trains DoRA over a base of 16 bits" if kind == "qlora" else "")  # fmt: skip
    if draft.value("pissa"):
        if kind == "lora":
            draft.carry("pissa", {"method.init": "pissa"}, "by an exact decomposition")
        else:
            draft.leave("pissa", f"the method {kind!r} has no such start", "method.kind=lora has it")
    if draft.has("init"):
        _init(draft, kind)
    if draft.has("double_quantization") and kind == "qlora" and bits == 4:
        draft.carry("double_quantization", {"method.double_quantization": draft.value("double_quantization")})
    for name in ("4bit", "8bit", "dora", "pissa", "loftq"):
        if draft.value(name):
            draft.leave(name, f"the method {kind!r} has no quantised base", "method.kind=qlora has one")
        draft.unneeded(name, "off, and off here")
    draft.unneeded("loftq_bits", "read only beside the start loftq")
    draft.unneeded("double_quantization", "nothing is quantised in 4 bits")


def _init(draft: Draft, kind: str) -> None:
    value, start = draft.value("init"), _start(draft)
    exact = "by an exact decomposition" if str(value).lower().startswith("pissa_niter_") else ""
    if start == "default":
        draft.unneeded("init", "the default start here too")
    elif start in _STARTS.values() and kind == "lora":
        draft.carry("init", {"method.init": start}, exact)
    else:
        known = "default, pissa, olora, eva and orthogonal with method.kind=lora; default and loftq with qlora"
        draft.leave("init", f"the method {kind!r} has no start {value!r}", f"method.init: {known}")


def combine_precision(draft: Draft) -> None:
    """Choose the dtype of the base, out of the facts `dtype` (of the weights), `bf16`, `fp16` and `fp32`."""
    spelt = str(draft.value("dtype", "")).removeprefix("torch.").lower()
    bf16, fp16 = str(draft.value("bf16", "")).lower(), str(draft.value("fp16", "")).lower()
    asked = "bf16" if bf16 == "true" else "fp16" if fp16 == "true" else ""
    if spelt and spelt not in _DTYPES:
        draft.leave("dtype", f"there is no such dtype here as {spelt!r}", "training.dtype is auto, fp32, bf16 or fp16")
        spelt = ""
    if asked:
        other = _DTYPES.get(spelt, "auto")
        remark = "computed in it, over a base in it; the adapter is fp32" if other not in ("auto", asked) else ""
        draft.carry((asked, "dtype"), {"training.dtype": asked}, remark)
    elif spelt:
        draft.carry("dtype", {"training.dtype": _DTYPES[spelt]})
    elif draft.value("fp32") or (bf16 == "false" and fp16 == "false"):
        draft.carry(("fp32", "bf16", "fp16"), {"training.dtype": "fp32"})
    elif bf16 == "auto":
        draft.carry("bf16", {"training.dtype": "auto"})
    for name in ("bf16", "fp16", "fp32"):
        draft.unneeded(name, "training.dtype is chosen by another key, or automatic")


def drop_foreign_keys(draft: Draft, known: Container[str]) -> None:
    """Take back what the chosen method, or the recipe's task, has no key for.

    Args:
        draft: The recipe in the making.
        known: The keys that recipes of its task have.
    """
    kind = draft.ours["method.kind"]
    fields = METHODS[kind].model_fields

    def is_foreign(key: str) -> bool:
        section, _, name = key.partition(".")
        if section == "method":
            return name.split(".")[0] not in fields
        return section != "loss" and key not in known

    def reason(key: str) -> str:
        of = f"the method {kind!r}" if key.startswith("method.") else "recipes of this task"
        return f"{key} is no key of {of}"

    draft.take_back(is_foreign, reason)
