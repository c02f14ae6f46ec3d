"""The proof of a fully fine-tuned model: its folder is read back and must compute what the live model did.

The model and the base it came from are loaded one after the other, never both at once.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import BaseError, InputError
from haori.core.records import Check, Head, Verification
from haori.library.adapter_components import needed_components
from haori.library.proof.checks import check_effect, check_prompts, check_reloaded, failed, passed, verification_of
from haori.library.proof.logits import Probe, compare_logits, default_probes, live_probe_logits
from haori.library.proof.noise import NOISE, components_run, noise_probes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haori.bases import Base

__all__ = ["verify_model"]


def verify_model(
    base: "Base",
    folder: Path,
    *,
    dtype: str,
    device: str | None = None,
    probes: Sequence[Probe] = (),
    live_logits: "Sequence[Tensor] | None" = None,
    prompt_pair: tuple[Sequence[int], Sequence[int]] | None = None,
    head: Head | None = None,
) -> Verification:
    """Reload the model in `folder`, which was trained from `base`, and check it.

    Args:
        base: The base it was trained from.
        folder: Its folder in Hugging Face layout.
        dtype: Number format its weights were trained and saved in.
        device: Where to load.
        probes: Token ids of a few prompts; none given means `default_probes`.
        live_logits: What `live_probe_logits` gave for the same probes on the model still in memory.
        prompt_pair: Ids of one prompt as training rendered it and as inference renders it.
        head: The head that was trained, for a classifier; the folder must bring it, with its labels.

    Returns:
        The checks; it never raises for a model that is wrong. See `require_passed`.
    """
    from haori.bases import find_base, head_modules, load_model, load_tokenizer, own_head

    try:
        found = find_base(str(folder))
        if found.pipeline is None:
            probes = probes or default_probes(load_tokenizer(found))
        else:
            probes = probes or noise_probes(found, ())
        needed = needed_components(found, components_run(probes))
        if head is not None and own_head(found) != head:
            raise BaseError(f"{str(folder)!r} does not name the labels that were trained: {own_head(found)}")
        model = load_model(found, dtype=dtype, device=device, head=head, components=needed)
    except InputError as error:
        return verification_of([failed("files", str(error).rstrip("."))], dtype)
    checks = [
        passed("files", f"{_what(found)}, {found.parameters:,} weights, {found.size_bytes:,} bytes"),
        _check_finite(model),
    ]
    of_model = live_probe_logits(model, probes)
    trained_head = {part: model.get_submodule(part).state_dict() for part in head_modules(model)}
    del model
    gc.collect()
    bare = load_model(base, dtype=dtype, device=device, head=head, components=needed)
    for part, weights in trained_head.items():  # what the head alone does is no effect on the base
        bare.get_submodule(part).load_state_dict(weights)
    of_base = live_probe_logits(bare, probes)
    measured = "logits" if base.pipeline is None else NOISE
    checks += [
        check_effect(of_model, of_base, subject="training", measured=measured),
        check_reloaded(of_model, live_logits, compare_logits(of_model, of_base).rms, measured=measured),
        check_prompts(prompt_pair),
    ]
    return verification_of(checks, dtype)


def _what(base: "Base") -> str:
    return base.pipeline or base.fingerprint.architecture


def _check_finite(model: "nn.Module") -> Check:
    broken = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    if broken:
        return failed("finite", f"{len(broken)} weights hold NaN or infinity, first {broken[0]!r}")
    return passed("finite", "no NaN and no infinity")
