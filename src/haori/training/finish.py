"""From trained weights to a stored adapter, or a model folder: save, reload, prove, record.

The live model's logits on a few probes are taken before it is freed, so that the proof never holds two bases
longer than it must.
"""

import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.adapters.loading import loading_of
from haori.core.methods import FullMethod
from haori.core.records import AdapterCard, RunRecord, Verification, now
from haori.core.storage import staged_folder, write_text
from haori.library import Library
from haori.training.checkpoint import save_adapter
from haori.training.preparation import Prepared
from haori.training.whole_model import save_model_folder

if TYPE_CHECKING:
    import torch

    from haori.data.seen import SeenRows
    from haori.library import StoredAdapter

__all__ = ["LiveProbes", "copy_model", "prove_and_store", "prove_model", "save_final"]

_PACKAGES = ("haori", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


class LiveProbes(NamedTuple):
    """Prompts and what the live model said to them: logits of each, in fp32."""

    prompts: "list[list[int]]"
    logits: "list[torch.Tensor]"


def save_final(model: Any, prepared: Prepared, folder: Path) -> LiveProbes:
    """Write `adapter/` or `model/` in the run folder and return the live model's logits on the probes."""
    from haori.data import template_of
    from haori.library import adapter_probes, default_probes, inspect_adapter, live_probe_logits

    prompts = default_probes(prepared.tokenizer)
    if isinstance(prepared.recipe.method, FullMethod):
        with staged_folder(folder / "model") as stage:
            save_model_folder(model, prepared.tokenizer, prepared.base, _licence(prepared), stage)
    else:
        with staged_folder(folder / "adapter") as stage:
            save_adapter(model, stage, prepared.base.name)
            (stage / "chat_template.jinja").write_text(template_of(prepared.tokenizer), encoding="utf-8")
            _seen_rows(prepared).write(stage)
        prompts = adapter_probes(inspect_adapter(folder / "adapter"), prompts)
    return LiveProbes(prompts, live_probe_logits(model, prompts))


def prove_and_store(
    prepared: Prepared, folder: Path, record: RunRecord, live: LiveProbes | None, say: Callable[[str], None]
) -> "StoredAdapter":
    """Verify the adapter in the run folder and add it to the library.

    Raises:
        VerificationError: It is not what was trained; it stays in the run folder and out of the library.
    """
    from haori.data import template_hash
    from haori.library import draft_card, require_passed, verify_adapter

    loading = loading_of(prepared.recipe.method, prepared.recipe.training.dtype)
    say("Verifying: reloading the saved adapter into a fresh base.")
    verification = verify_adapter(
        prepared.base,
        folder / "adapter",
        dtype=loading.dtype,
        quantization=loading.quantization,
        probes=live.prompts if live else [],
        live_logits=live.logits if live else None,
        prompt_pair=_prompt_pair(prepared),
    )
    write_text(folder / "verification.json", verification.model_dump_json(indent=1))
    require_passed(verification)
    for check in verification.checks:
        if check.name == "delta" and "not changed at all" in check.detail:
            say(f"Warning: some modules learnt nothing ({check.detail}).")
    packages = (*_PACKAGES, "bitsandbytes") if loading.quantization is not None else _PACKAGES
    card = draft_card(
        folder / "adapter",
        prepared.base.reference(),
        origin="trained",
        data=(prepared.data.reference(),),
        recipe=prepared.recipe,
        run=record,
        verification=verification,
        template_hash=template_hash(prepared.tokenizer),
        versions={name: version(name) for name in packages} | {"python": platform.python_version()},
        seed=prepared.recipe.training.seed,
    )
    return Library().add(folder / "adapter", prepared.recipe.name, card)


def prove_model(prepared: Prepared, folder: Path, live: LiveProbes | None, say: Callable[[str], None]) -> Verification:
    """Verify the fully fine-tuned model in the run folder.

    Raises:
        VerificationError: It is not what was trained.
    """
    from haori.library import require_passed, verify_model

    say("Verifying: reloading the saved model.")
    verification = verify_model(
        prepared.base,
        folder / "model",
        dtype=loading_of(prepared.recipe.method, prepared.recipe.training.dtype).dtype,
        device=prepared.device,
        probes=live.prompts if live else [],
        live_logits=live.logits if live else None,
        prompt_pair=_prompt_pair(prepared),
    )
    write_text(folder / "verification.json", verification.model_dump_json(indent=1))
    require_passed(verification, subject="model")
    return verification


def copy_model(folder: Path, out: Path) -> None:
    """Copy the model of a run folder to the new folder `out`."""
    with staged_folder(out) as stage:
        shutil.copytree(folder / "model", stage, dirs_exist_ok=True)


def _seen_rows(prepared: Prepared) -> "SeenRows":
    from haori.data import Conversation
    from haori.data.seen import SeenRows

    rows = prepared.data.train.select_columns(["conversation", "origin"])
    return SeenRows.of(Conversation.from_json(row["conversation"], row["origin"]) for row in rows)


def _licence(prepared: Prepared) -> str:
    """Return the licence of a whole model made from this base and data."""
    from haori.library import effective_licence

    data = (prepared.data.reference(),)
    base = prepared.base.reference()
    return effective_licence(
        AdapterCard(id="", origin="trained", created=now(), base=base, method="full", data=data)
    ).expression


def _prompt_pair(prepared: Prepared) -> tuple[list[int], list[int]] | None:
    """Return the prompt of a training row as trained on, and as rendered for inference; None for plain text."""
    from haori.data import Conversation, render_row_prompt

    for row in prepared.data.train.select(range(min(50, len(prepared.data.train)))):
        found = Conversation.from_json(row["conversation"], row["origin"])
        answers = [i for i, message in enumerate(found.messages) if message["role"] == "assistant"]
        if answers and any(label != -100 for label in row["labels"]):
            prompt = render_row_prompt(prepared.tokenizer, found, answers[0], prepared.recipe.data.control_tokens)
            return list(row["input_ids"][: len(prompt)]), prompt
    return None
