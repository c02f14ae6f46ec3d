"""Takes an adapter that came as one file into the library: read whole, proved as far as can be, stored as it is.

Without its base an adapter is proved from the file alone: every key was read, the numbers are finite, and something is
changed. With the base every module must have its place there too, and the adapter must move what the base predicts.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import VerificationError
from haori.core.records import AdapterCard, BaseReference, Check, Verification, now
from haori.library.adapter_names import check_no_base_name
from haori.library.contents import file_id
from haori.library.families import FAMILY_TITLES, Family, is_runnable, reference_of, tell_family
from haori.library.file_hashes import hash_weight_file
from haori.library.fit import base_weights, match
from haori.library.formats.bundled_words import encoder_of, is_bundled, word_names
from haori.library.proof.checks import failed, passed, verification_of
from haori.library.stated import Stated
from haori.library.store import Library, StoredAdapter, check_name

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library.updates import AdapterUpdates, ModuleUpdate

__all__ = ["draft_file_card", "import_file", "verify_file"]

_UNKNOWN = "unknown"
_TABLE = "token_embedding.weight"
_DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}


def import_file(
    path: Path,
    updates: "AdapterUpdates",
    tensors: int,
    *,
    name: str,
    base: "Base | None" = None,
    library: Library | None = None,
    stated: Stated | None = None,
) -> StoredAdapter:
    """Prove and store the adapter for images that one file holds.

    Args:
        path: A safetensors file in any format that `formats` reads.
        updates: What was read from it.
        tensors: How many tensors it holds.
        name: Name in the library, without version.
        base: The base it was made for, if it is at hand; otherwise only the family of its base goes on record.
        library: The library to add to; by default that of this machine.
        stated: What is said of it elsewhere; it goes before what its header says.

    Raises:
        MismatchError: It has no place in the base.
        VerificationError: It failed its proof; nothing is stored.
        LibraryError: The name is not allowed.
    """
    check_name(name)
    family = tell_family(updates)
    reference = _reference(base, family)
    check_no_base_name(name, reference.name)
    verification = verify_file(updates, tensors, base, family, label=path.name)
    if not verification.passed:
        worst = "; ".join(f"{check.name}: {check.detail}" for check in verification.failures)
        raise VerificationError(f"The adapter in {str(path)!r} was not stored, for it failed its proof ({worst}).")
    said = (stated or Stated()).before(_said_by_header(updates.metadata))
    card = draft_file_card(path, updates, reference, verification, said)
    return (library or Library()).add(path, name, card)


def verify_file(
    updates: "AdapterUpdates", tensors: int, base: "Base | None", family: Family, *, label: str
) -> Verification:
    """Check an adapter that was read from one file.

    Args:
        updates: What was read; its reader has used every key of the file or named it in an error.
        tensors: How many tensors the file holds.
        base: Its base, if it is at hand.
        family: How the family of its base was told.
        label: What messages call the adapter.

    Raises:
        MismatchError: It has no place in the base.
    """
    words = word_names(updates.extra)
    more = f", and it brings the new words {', '.join(words)}" if words else ""
    checks = [passed("keys", f"all {tensors} tensors were read: {len(updates.modules)} modules are changed{more}")]
    checks += _check_values(updates)
    told = f"{_title(family.name)}, told by its {family.told_by}" if family.name else "the family cannot be told"
    checks.append(passed("family", f"{told}. {family.contradiction}" if family.contradiction else told))
    if base is None:
        checks.append(passed("base", "skipped: it was added without its base, so nothing was compared with that"))
    else:
        fit = match(updates, base_weights(base))
        fit.require(label, base.name)
        checks.append(passed("base", f"all {len(fit.weights)} modules have their place and shape in {base.name}"))
        checks += _check_words(base, updates)
        if all(check.passed for check in checks):
            checks += _check_effect(base, updates)
    stored = Counter(str(factor.dtype) for update in updates.modules.values() for factor in update.factors.values())
    return verification_of(checks, _DTYPES.get(stored.most_common(1)[0][0], "fp32") if stored else "fp32")


def _check_words(base: "Base", updates: "AdapterUpdates") -> list[Check]:
    """Check that the vectors of new words are as wide as the embeddings of the base's text encoders."""
    wrong = []
    weights = base_weights(base)
    for key, rows in updates.extra.items():
        encoder = encoder_of(key) if is_bundled(key) else None
        table = next((weight for name, weight in weights.get(encoder or "", {}).items() if name.endswith(_TABLE)), None)
        if encoder is not None and (table is None or table.shape is None or table.shape[-1] != rows.shape[-1]):
            width = None if table is None or table.shape is None else table.shape[-1]
            wrong.append(f"{key!r} is {rows.shape[-1]} wide, and the embedding of {encoder!r} {width or 'not there'}")
    return [failed("words", "; ".join(wrong))] if wrong else []


def _check_effect(base: "Base", updates: "AdapterUpdates") -> list[Check]:
    """Run the adapter on its base, where that is a pipeline of a family that is known here."""
    if base.pipeline is None or not is_runnable(base):
        return [passed("effect", f"skipped: predictions of a {base.pipeline} are not run here")]
    from haori.library.proof.noise import check_noise

    return check_noise(base, updates)


def _check_values(updates: "AdapterUpdates") -> list[Check]:
    """Check that numbers are finite and that something is changed."""
    broken, still = [], []
    for name, update in updates.modules.items():
        tensors = [*update.factors.values(), *(t for t in (update.magnitude, update.bias) if t is not None)]
        if not all(bool(tensor.float().isfinite().all()) for tensor in tensors):
            broken.append(name)
        elif update.magnitude is None and update.bias is None and not _changes(update):
            still.append(name)
    broken += [key for key, tensor in updates.extra.items() if not bool(tensor.float().isfinite().all())]
    if broken:
        return [failed("finite", f"{len(broken)} modules hold NaN or infinity, first {broken[0]!r}")]
    checks = [passed("finite", "no NaN and no infinity")]
    if len(still) == len(updates.modules):
        return [
            *checks,
            failed(
                "delta", f"none of its {len(still)} modules changes anything: a factor or the scale of each is zero"
            ),
        ]
    rest = f"; not changed at all: {len(still)}, first {still[0]!r}" if still else ""
    return [*checks, passed("delta", f"{len(updates.modules) - len(still)} modules are changed{rest}")]


def _changes(update: "ModuleUpdate") -> bool:
    """Say whether scale and product of the factors are anything but zero."""
    return update.scale != 0 and all(bool(factor.any()) for factor in update.factors.values())


def _reference(base: "Base | None", family: Family) -> BaseReference:
    if base is not None:
        return reference_of(base, family.name)
    return BaseReference(name=_title(family.name), source=_UNKNOWN, components={}, family=family.name or _UNKNOWN)


def _title(family: str | None) -> str:
    return FAMILY_TITLES.get(family or "", family or _UNKNOWN)


def draft_file_card(
    path: Path, updates: "AdapterUpdates", base: BaseReference, verification: Verification, stated: Stated
) -> AdapterCard:
    """Build the card of an adapter in one file: what the file says, and what is said of it elsewhere."""
    tensors = [
        tensor
        for update in updates.modules.values()
        for tensor in (*update.factors.values(), update.magnitude, update.bias)
        if tensor is not None
    ]
    alphas = {update.alpha for update in updates.modules.values() if update.kind != "diff"}
    return AdapterCard(
        id=file_id(path),
        origin="added",
        created=now(),
        base=base,
        components=updates.components,
        task="text_to_image",
        method=_method(updates),
        rank=max(updates.ranks, default=None),
        alpha=alphas.pop() if len(alphas) == 1 else None,
        target_modules=tuple(sorted({_leaf(name) for name in updates.modules})),
        trainable_parameters=sum(tensor.numel() for tensor in tensors),
        size_bytes=path.stat().st_size,
        verification=verification,
        format=updates.format,
        file_hashes=hash_weight_file(path).as_dict(),
        file_metadata=dict(updates.metadata),
        **stated.card_fields(),
    )


def _method(updates: "AdapterUpdates") -> str:
    """Return the method: the kinds of most modules first, DoRA where LoRA has magnitudes."""
    kinds = Counter(
        "dora" if update.kind == "lora" and update.magnitude is not None else update.kind
        for update in updates.modules.values()
    )
    return "+".join(kind for kind, _ in kinds.most_common())


def _leaf(name: str) -> str:
    """Return the last part of a module's name that is no number: `to_out` of `attn1.to_out.0`."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def _said_by_header(metadata: "Mapping[str, str]") -> Stated:
    """Return what ModelSpec's fields say."""
    from haori.bases.licence import to_spdx

    licence = metadata.get("modelspec.license")
    return Stated(
        licence=(to_spdx(licence) or licence) if licence else None,
        description=metadata.get("modelspec.description"),
        trigger_words=_words(metadata.get("modelspec.trigger_phrase", "")),
        tags=_words(metadata.get("modelspec.tags", "")),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for part in text.split(",") if (word := part.strip()))
