"""Merges an adapter into a 16-bit copy of its base, and proves the copy before it takes its place.

W' = W + dW is rounded to 16 bits once. A base that is stored in fewer bits is refused: rounding the merged weights
again to its grid would change what the adapter learnt (PEFT issues 1043, 2105, 2321).
"""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import BaseError, InputError, MismatchError, VerificationError
from haori.core.records import AdapterCard, Check, Verification, now
from haori.core.safetensors_header import read_safetensors_header
from haori.core.storage import staged_folder
from haori.library.adapter_files import AdapterFiles, inspect_adapter
from haori.library.attaching import attach_files, check_base
from haori.library.cards import read_card
from haori.library.formats.peft import check_new_folder
from haori.library.logits import TOLERANCES, compare_logits, default_probes, live_probe_logits

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from haori.bases import Base

__all__ = ["MERGE_RECORD", "Merged", "compare_merged", "merge_adapter", "merge_in_place", "refuse_quantized"]

MERGE_RECORD = "haori_merge.json"
_TEMPLATE_LIMIT_BYTES = 1 << 20


class Merged(NamedTuple):
    """A merged model: its folder and the proof, which is also kept there as haori_merge.json."""

    path: Path
    verification: Verification


def merge_adapter(
    base: "Base",
    folder: Path,
    out: Path,
    *,
    dtype: str = "auto",
    card: AdapterCard | None = None,
    allow_different_weights: bool = False,
) -> Merged:
    """Write base and adapter as one model in Hugging Face layout, with tokenizer and chat template.

    Args:
        base: The base the adapter was made for.
        folder: The adapter's PEFT folder.
        out: Folder to write; it must not exist or be empty.
        dtype: `bf16`, `fp16`, or `auto`: the base's own if that is one of them, else bf16. fp16 rounds eight times
            finer and suits small updates, as long as no weight exceeds 65,504.
        card: The adapter's card; by default the card.json in `folder`, if there is one.
        allow_different_weights: As in `attach`.

    Raises:
        InputError: `out` is in use, the dtype is not a 16-bit one, or adapter and base cannot be merged.
        VerificationError: The written model is not what base and adapter compute together; nothing is left behind.
    """
    from haori.bases import load_model, load_tokenizer

    check_new_folder(out)
    refuse_quantized(base)
    dtype = _sixteen_bit(base, dtype)
    files = inspect_adapter(folder)
    card = card or read_card(folder)
    if card is not None:
        check_base(card, base.reference(), allow_different_weights=allow_different_weights)
    tokenizer = load_tokenizer(base)
    if template := _stored_template(folder):
        tokenizer.chat_template = template
    probes = default_probes(tokenizer)
    model = load_model(base, dtype=dtype)
    of_base = live_probe_logits(model, probes)
    adapted = attach_files(model, files, base_name=base.name)
    of_adapter = live_probe_logits(adapted, probes)
    merged = merge_in_place(adapted)
    del model, adapted
    with staged_folder(out) as stage:
        _save(merged, tokenizer, stage)
        del merged
        reloaded = load_model(dataclasses.replace(base, name=out.name, path=stage), dtype=dtype)
        check = compare_merged(live_probe_logits(reloaded, probes), of_adapter, of_base, dtype)
        proof = Verification(passed=check.passed, checks=(check,), dtype=dtype, time=now())
        if not check.passed:
            raise VerificationError(f"The merged model was not kept: {check.detail}.")
        (stage / MERGE_RECORD).write_text(_record(base, files, card, proof), encoding="utf-8")
    return Merged(out, proof)


def refuse_quantized(base: "Base") -> None:
    """Refuse to merge into a quantised base.

    Raises:
        BaseError: The base is quantised.
    """
    if base.quantization is not None:
        raise BaseError(
            f"The base {base.name!r} is quantised ({base.quantization}); merged weights would be rounded to its coarse "
            "grid and no longer do what the adapter does. Merge into the 16-bit model it was made from."
        )


def merge_in_place(adapted: "PeftModel") -> "PreTrainedModel":
    """Add the adapter to the weights of the model it sits on and return that model; the adapter is gone from it.

    Embedding and head that share one matrix get one each if the adapter changes only one of them.

    Raises:
        MismatchError: The method cannot be merged.
        VerificationError: The merged weights hold NaN or infinity.
    """
    config: Any = adapted.peft_config["default"]
    method = str(config.peft_type.value)
    if config.is_prompt_learning or not hasattr(adapted, "merge_and_unload"):
        raise MismatchError(f"An adapter of the method {method} adds no weights that could be merged into the base.")
    _untie(adapted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        if "NaN" in str(error):
            raise VerificationError("Merging gives weights that are NaN or infinite: the adapter is broken.") from error
        raise MismatchError(f"PEFT cannot merge this {method} adapter: {str(error).splitlines()[0][:300]}") from error
    return merged


def compare_merged(
    of_merged: "Sequence[Tensor]", of_adapter: "Sequence[Tensor]", of_base: "Sequence[Tensor]", dtype: str
) -> Check:
    """Check that merged logits are those of the adapter, within the dtype's rounding, and not those of the base."""
    error, effect = compare_logits(of_adapter, of_merged), compare_logits(of_adapter, of_base)
    limit = TOLERANCES[dtype].merged
    unmerged = compare_logits(of_base, of_merged).max == 0
    detail = (
        f"merged and unmerged logits differ by {error.rms:.2g} of their spread (limit {limit:g} in {dtype}, largest "
        f"{error.max:.2g}); the adapter itself moves them by {effect.rms:.2g}"
    )
    if unmerged:
        detail = "the merged model computes exactly what the base does: the adapter was lost"
    elif error.rms > effect.rms / 2:
        detail += f"; rounding to {dtype} blurs an effect this small"
    return Check(name="merge", passed=not unmerged and error.rms <= limit, detail=detail, value=error.rms, limit=limit)


def _untie(adapted: "PeftModel") -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    model = adapted.get_base_model()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embedding, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if embedding is not None and head is not None and embedding.weight is head.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _sixteen_bit(base: "Base", dtype: str) -> str:
    if dtype == "auto":
        stored = {
            entry.dtype
            for path in sorted(base.path.glob("*.safetensors"))
            for entry in read_safetensors_header(path).tensors.values()
        }
        return "fp16" if "F16" in stored and "BF16" not in stored else "bf16"
    if dtype not in {"bf16", "fp16"}:
        raise InputError(f"A merged model is written in 'bf16', 'fp16' or 'auto', not in {dtype!r}.")
    return dtype


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    from haori.bases.quiet import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _stored_template(folder: Path) -> str | None:
    """Return the chat template kept with the adapter, in either of the places where tokenizers put it."""
    plain = folder / "chat_template.jinja"
    if plain.is_file() and plain.stat().st_size <= _TEMPLATE_LIMIT_BYTES:
        return plain.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if config.is_file() and config.stat().st_size <= _TEMPLATE_LIMIT_BYTES:
        try:
            template = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        except (ValueError, AttributeError):
            return None
        return template if isinstance(template, str) else None
    return None


def _record(base: "Base", files: AdapterFiles, card: AdapterCard | None, proof: Verification) -> str:
    from haori.library.cards import adapter_id

    document = {
        "base": base.reference().model_dump(mode="json"),
        "adapter": card.id if card is not None else adapter_id(files),
        "names": list(card.names) if card is not None else [],
        "verification": proof.model_dump(mode="json"),
    }
    return json.dumps(document, indent=2) + "\n"
