"""Merges an adapter into a 16-bit copy of its base, and proves the copy before it takes its place.

W' = W + dW is formed in float64, proved there, and rounded to 16 bits once; what is then written is compared with it
bit by bit. A base that is stored in fewer bits is refused: rounding the merged weights again to its grid would change
what the adapter learnt (PEFT issues 1043, 2105, 2321).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import BaseError, InputError, VerificationError
from haori.core.records import MODEL_COMPONENT, AdapterCard, Check, Verification
from haori.core.safetensors_header import read_safetensors_header
from haori.core.storage import staged_folder
from haori.library.adapter_files import AdapterFiles, inspect_adapter
from haori.library.attaching import attach_files, check_base
from haori.library.cards import read_card
from haori.library.classifiers import wearing_head
from haori.library.formats.peft import check_new_folder
from haori.library.prompt_formats import prompt_format
from haori.library.proof.checks import failed, passed, verification_of
from haori.library.proof.exact import checksums_by_name, exact_logits
from haori.library.proof.logits import adapter_probes, compare_logits, default_probes
from haori.library.proof.merging import check_merged, merge_in_place

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from haori.bases import Base

__all__ = ["MERGE_RECORD", "Merged", "merge_adapter", "refuse_quantized"]

MERGE_RECORD = "haori_merge.json"


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
    from haori.bases.dtype import torch_dtype

    check_new_folder(out)
    refuse_quantized(base)
    dtype = _sixteen_bit(base, dtype)
    files = inspect_adapter(folder)
    card = card or read_card(folder)
    if card is not None:
        check_base(card, base.reference(), allow_different_weights=allow_different_weights)
    tokenizer = prompt_format(load_tokenizer(base), folder, card).tokenizer
    probes = adapter_probes(files, default_probes(tokenizer))
    model = load_model(base, dtype=dtype, head=files.head)
    with wearing_head(model, files):
        of_base = exact_logits(model, probes)
    adapted = attach_files(model, files, base_name=base.name)
    of_adapter = exact_logits(adapted, probes)
    merged = merge_in_place(adapted, probes)
    del model, adapted
    check = check_merged(merged, of_adapter, of_base, dtype)
    rounded = exact_logits(merged.model, probes)
    sums = checksums_by_name(merged.model, torch_dtype(dtype))
    with staged_folder(out) as stage:
        _save(merged.model, tokenizer, stage)
        kind = base.fingerprint.with_fields(architecture=type(merged.model).__name__)
        del merged
        component = dataclasses.replace(base.components[MODEL_COMPONENT], path=stage, fingerprint=kind)
        written = dataclasses.replace(base, name=out.name, path=stage, components={MODEL_COMPONENT: component})
        reloaded = load_model(written, dtype=dtype, head=files.head)
        checks = [check, _check_rounded(rounded, of_adapter, of_base, dtype)]
        checks.append(_check_written(checksums_by_name(reloaded), sums, exact_logits(reloaded, probes), rounded))
        proof = verification_of(checks, dtype)
        if not proof.passed:
            raise VerificationError(f"The merged model was not kept: {proof.failures[0].detail}.")
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


def _check_rounded(
    rounded: "Sequence[Tensor]", of_adapter: "Sequence[Tensor]", of_base: "Sequence[Tensor]", dtype: str
) -> Check:
    """Say what rounding to 16 bits takes from the adapter; nothing is left of it if the base's weights come out."""
    lost, effect = compare_logits(of_adapter, rounded).rms, compare_logits(of_adapter, of_base).rms
    other = "fp16, which rounds eight times finer," if dtype == "bf16" else "the adapter unmerged"
    if compare_logits(of_base, rounded).max == 0:
        return failed(
            "rounding", f"rounded to {dtype} the weights are the base's own; use {other} for so small an effect"
        )
    detail = f"rounding to {dtype} moves the logits by {lost:.2g} of their spread, the adapter by {effect:.2g}"
    if lost > effect / 4:
        detail += f": an effect this small is blurred; {other} keeps more of it"
    return passed("rounding", detail)


def _check_written(
    found: Mapping[str, int], wanted: Mapping[str, int], of_written: "Sequence[Tensor]", of_merged: "Sequence[Tensor]"
) -> Check:
    """Check that what was written is what was proved: its weights bit by bit, and what it computes with them."""
    other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if other:
        return failed(
            "written", f"{len(other)} weights of the written model are not the merged ones, first {other[0]!r}"
        )
    difference = compare_logits(of_merged, of_written)
    if difference.max != 0:
        return failed("written", f"the written model's logits differ from the merged one's by {difference.rms:.2g}")
    return passed("written", f"all {len(wanted)} weights, read back, are those that were merged, bit by bit")


def _save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    from haori.bases.quiet import quiet_transformers

    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _record(base: "Base", files: AdapterFiles, card: AdapterCard | None, proof: Verification) -> str:
    from haori.library.cards import adapter_id

    document = {
        "base": base.reference().model_dump(mode="json"),
        "adapter": card.id if card is not None else adapter_id(files),
        "names": list(card.names) if card is not None else [],
        "verification": proof.model_dump(mode="json"),
    }
    return json.dumps(document, indent=2) + "\n"
