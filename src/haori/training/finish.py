"""From trained weights to a stored adapter, or a model folder: save, reload, prove, record.

The live model's logits on a few probes are taken before it is freed, so that the proof never holds two bases
longer than it must.
"""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.adapters.loading import loading_of
from haori.core.events import EventSink, Said, Warned
from haori.core.methods import FullMethod
from haori.core.records import AdapterCard, RunRecord, Verification, now
from haori.core.storage import staged_folder, write_text
from haori.library import Library
from haori.training.checkpoint import save_adapter
from haori.training.continuing import check_learnt
from haori.training.preparation import Prepared
from haori.training.whole_model import save_model_folder

if TYPE_CHECKING:
    import torch

    from haori.library import StoredAdapter
    from haori.library.proof.logits import Probe

__all__ = ["LiveProbes", "copy_model", "prove_and_store", "prove_model", "save_final"]

_PACKAGES = ("haori", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


class LiveProbes(NamedTuple):
    """Inputs and what the live model computes for them, in fp32."""

    probes: "list[Probe]"
    logits: "list[torch.Tensor]"
    words: "dict[str, list[torch.Tensor]] | None" = None
    """What the new words alone compute, where a model for pictures has any."""


def save_final(model: Any, prepared: Prepared, folder: Path) -> LiveProbes:
    """Write `adapter/` or `model/` in the run folder and return the live model's logits on the probes."""
    from haori.library import adapter_probes, inspect_adapter, live_probe_logits
    from haori.library.proof.words import word_predictions

    task, recipe = prepared.task, prepared.recipe
    probes = task.probes(prepared.processor, recipe, prepared.split)
    if isinstance(recipe.method, FullMethod):
        with staged_folder(folder / "model") as stage:
            save_model_folder(model, prepared.processor, prepared.base, _licence(prepared), stage)
    else:
        with staged_folder(folder / "adapter") as stage:
            save_adapter(model, stage, prepared.base.name)
            task.write_files(stage, prepared.processor, recipe, prepared.split)
        files = inspect_adapter(folder / "adapter")
        probes = adapter_probes(files, probes)
        if files.words is not None:
            words = word_predictions(model, files.words, probes)
            return LiveProbes(probes, live_probe_logits(model, probes), words)
    return LiveProbes(probes, live_probe_logits(model, probes))


def prove_and_store(
    prepared: Prepared, folder: Path, record: RunRecord, live: LiveProbes | None, on_event: EventSink
) -> "StoredAdapter":
    """Verify the adapter in the run folder and add it to the library.

    Raises:
        VerificationError: It is not what was trained; it stays in the run folder and out of the library.
    """
    from haori.library import (
        StoredAdapter,
        ancestors,
        draft_card,
        effective_licence,
        reference_of,
        require_passed,
        verify_adapter,
    )
    from haori.library.cards import read_card

    loading = loading_of(prepared.recipe.method, prepared.recipe.training.dtype)
    on_event(Said(text="Verifying: reloading the saved adapter into a fresh base."))
    verification = verify_adapter(
        prepared.base,
        folder / "adapter",
        dtype=loading.dtype,
        quantization=loading.quantization,
        probes=live.probes if live else [],
        live_logits=live.logits if live else None,
        live_words=live.words if live else None,
        prompt_pair=prepared.task.rendering(prepared.processor, prepared.recipe, prepared.split),
        head=prepared.task.head(prepared.recipe),
    )
    if prepared.origin is not None:
        check = check_learnt(folder / "adapter", prepared.origin)
        passed = verification.passed and check.passed
        verification = verification.with_fields(checks=(*verification.checks, check), passed=passed)
    write_text(folder / "verification.json", verification.model_dump_json(indent=1))
    require_passed(verification)
    for check in verification.checks:
        if check.name == "delta" and "not changed at all" in check.detail:
            on_event(Warned(text=f"some modules learnt nothing ({check.detail})."))
    packages = (*_PACKAGES, "bitsandbytes") if loading.quantization is not None else _PACKAGES
    card = draft_card(
        folder / "adapter",
        reference_of(prepared.base),
        origin="trained",
        data=(prepared.split.reference(),),
        recipe=prepared.recipe,
        run=record,
        verification=verification,
        **prepared.task.card(prepared.processor, prepared.recipe),
        versions={name: version(name) for name in packages} | {"python": platform.python_version()},
        seed=prepared.recipe.training.seed,
        task=prepared.task.kind,
        parents=() if prepared.origin is None else (prepared.origin.parent,),
    )
    if prepared.origin is not None and (parent := read_card(prepared.origin.files.folder)) is not None:
        before = ancestors(StoredAdapter(prepared.origin.files.folder, parent, parent.id))
        card = card.with_fields(licence=effective_licence(card, [parent, *before]).expression)
    return Library().add(folder / "adapter", prepared.recipe.name, card)


def prove_model(prepared: Prepared, folder: Path, live: LiveProbes | None, on_event: EventSink) -> Verification:
    """Verify the fully fine-tuned model in the run folder.

    Raises:
        VerificationError: It is not what was trained.
    """
    from haori.library import require_passed, verify_model

    on_event(Said(text="Verifying: reloading the saved model."))
    verification = verify_model(
        prepared.base,
        folder / "model",
        dtype=loading_of(prepared.recipe.method, prepared.recipe.training.dtype).dtype,
        device=prepared.device,
        probes=live.probes if live else [],
        live_logits=live.logits if live else None,
        prompt_pair=prepared.task.rendering(prepared.processor, prepared.recipe, prepared.split),
        head=prepared.task.head(prepared.recipe),
    )
    write_text(folder / "verification.json", verification.model_dump_json(indent=1))
    require_passed(verification, subject="model")
    return verification


def copy_model(folder: Path, out: Path) -> None:
    """Copy the model of a run folder to the new folder `out`."""
    with staged_folder(out) as stage:
        shutil.copytree(folder / "model", stage, dirs_exist_ok=True)


def _licence(prepared: Prepared) -> str:
    """Return the licence of a whole model made from this base and data."""
    from haori.library import effective_licence

    data = (prepared.split.reference(),)
    base = prepared.base.reference()
    whole = tuple(base.components)
    return effective_licence(
        AdapterCard(id="", origin="trained", created=now(), base=base, components=whole, method="full", data=data)
    ).expression
