"""From trained weights to a stored adapter: save, reload, prove, record.

The live model's logits on a few probes are taken before it is freed, so that the proof never holds two bases
longer than it must.
"""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.records import RunRecord
from haori.core.storage import staged_folder, write_text
from haori.library import Library
from haori.train.checkpoint import save_adapter
from haori.train.preparation import Prepared

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from haori.library import StoredAdapter

__all__ = ["LiveProbes", "prove_and_store", "save_final"]

_PACKAGES = ("haori", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


class LiveProbes(NamedTuple):
    """Prompts and what the live model said to them: logits of each, in fp32."""

    prompts: "list[list[int]]"
    logits: "list[torch.Tensor]"


def save_final(model: "PeftModel", prepared: Prepared, folder: Path) -> LiveProbes:
    """Write `adapter/` in the run folder and return the live model's logits on the probes."""
    from haori.data import template_of
    from haori.library import default_probes, live_probe_logits

    with staged_folder(folder / "adapter") as stage:
        save_adapter(model, stage, prepared.base.name)
        (stage / "chat_template.jinja").write_text(template_of(prepared.tokenizer), encoding="utf-8")
    prompts = default_probes(prepared.tokenizer)
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

    say("Verifying: reloading the saved adapter into a fresh base.")
    verification = verify_adapter(
        prepared.base,
        folder / "adapter",
        dtype=prepared.recipe.training.dtype,
        probes=live.prompts if live else [],
        live_logits=live.logits if live else None,
        prompt_pair=_prompt_pair(prepared),
    )
    write_text(folder / "verification.json", verification.model_dump_json(indent=1))
    require_passed(verification)
    card = draft_card(
        folder / "adapter",
        prepared.base.reference(),
        origin="trained",
        data=(prepared.data.reference(),),
        recipe=prepared.recipe,
        run=record,
        verification=verification,
        template_hash=template_hash(prepared.tokenizer),
        versions={name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        seed=prepared.recipe.training.seed,
    )
    return Library().add(folder / "adapter", prepared.recipe.name, card)


def _prompt_pair(prepared: Prepared) -> tuple[list[int], list[int]] | None:
    """Return the prompt of a training row as trained on, and as rendered for inference; None for plain text."""
    from haori.data import Conversation, render_prompt

    for row in prepared.data.train.select(range(min(50, len(prepared.data.train)))):
        messages = Conversation.from_json(row["conversation"], row["origin"]).messages
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if answers and any(label != -100 for label in row["labels"]):
            prompt = render_prompt(prepared.tokenizer, messages[: answers[0]])
            return list(row["input_ids"][: len(prompt)]), prompt
    return None
