"""The proof of a saved adapter: it is read from disk onto a fresh base and must be what was trained.

Every check is one row of the `Verification`. A check that does not apply passes with a detail that begins with
"skipped" and says why. One copy of the base is loaded; it is measured bare, with the adapter, and merged in place, in
float64 whatever its dtype. An adapter trained over a base quantised on loading is measured over that, as it computes,
and then merged into the base itself.
"""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import FileFormatError, MismatchError, VerificationError
from haori.core.quantization import Quantization
from haori.core.records import Check, Head, Verification
from haori.library.adapter_components import changed_components, needed_components, only_component
from haori.library.adapter_files import AdapterFiles, inspect_adapter
from haori.library.attaching import attach_files, prepare_words
from haori.library.classifiers import check_head, wearing_head
from haori.library.proof.checks import (
    check_effect,
    check_prompts,
    check_reloaded,
    check_repeated,
    failed,
    passed,
    verification_of,
)
from haori.library.proof.deltas import check_delta
from haori.library.proof.exact import exact_logits
from haori.library.proof.logits import (
    Probe,
    adapter_probes,
    compare_logits,
    live_probe_logits,
    model_dtype,
)
from haori.library.proof.merging import check_merged, merge_in_place
from haori.library.proof.noise import NOISE, components_run, probes_of
from haori.library.proof.words import check_words

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from haori.bases import Base

__all__ = ["require_passed", "verify_adapter"]

# Starts that take a part out of the base's weights, again at every load; in stock PEFT some of them draw it at random.
_RESIDUAL_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# A model that has learnt something may react more to its weights' rounding than the bare base does.
_AMPLIFIED = 3.0


def verify_adapter(
    base: "Base",
    folder: Path,
    *,
    probes: Sequence[Probe] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    quantization: Quantization | None = None,
    live_logits: "Sequence[Tensor] | None" = None,
    live_words: "Mapping[str, Sequence[Tensor]] | None" = None,
    prompt_pair: tuple[Sequence[int], Sequence[int]] | None = None,
    head: Head | None = None,
) -> Verification:
    """Reload the adapter in `folder` onto a fresh copy of `base` and check it.

    Args:
        base: The base it was trained on.
        folder: Its PEFT folder.
        probes: Token ids of a few prompts, or noisy latents for a base of pictures; by default, or where there are
            none, `probes_of`.
        dtype: Dtype of the base, the same as in training where `live_logits` are given.
        device: Where to load the base.
        quantization: How the base was quantised on loading for the training, if it was.
        live_logits: What `live_probe_logits` gave for the same probes on the model still in memory.
        live_words: What `word_predictions` gave there, for an adapter with new words.
        prompt_pair: Ids of one prompt as training rendered it and as inference renders it.
        head: The head that was trained, for a classifier; None takes what the folder says of it.

    Returns:
        The checks; it never raises for an adapter that is wrong. See `require_passed`.
    """
    try:
        files = inspect_adapter(folder)
    except FileFormatError as error:
        return verification_of([failed("files", str(error))], dtype)
    checks = [passed("files", f"{files.method}, {len(files.tensors)} tensors, {files.size_bytes:,} bytes")]
    if head is not None and files.head != head:
        kept = "no head" if files.head is None else f"the labels {', '.join(files.head.labels)}"
        checks.append(failed("labels", f"{', '.join(head.labels)} were trained, and the folder keeps {kept}"))
    checks.append(_check_finite(files))
    if checks[-1].passed:
        probes = probes or probes_of(base, files)
        changed = changed_components(base.components, files)
        run = (*changed, *components_run(probes))
        loader = _BaseLoader(base, dtype, device, quantization, files, changed, run)
        found, dtype = _check_on_base(loader, files, probes, _Live(live_logits, live_words))
        checks += found
    checks.append(check_prompts(prompt_pair))
    return verification_of(checks, dtype)


def require_passed(verification: Verification, *, subject: str = "adapter") -> None:
    """Raise unless every check passed.

    Raises:
        VerificationError: One sentence with the failing checks.
    """
    if not verification.passed:
        failures = "; ".join(f"{check.name}: {check.detail.rstrip('.')}" for check in verification.failures)
        raise VerificationError(f"The {subject} failed its proof ({failures}).")


class _Live(NamedTuple):
    """What was measured on the model still in memory."""

    logits: "Sequence[Tensor] | None"
    words: "Mapping[str, Sequence[Tensor]] | None"


class _BaseLoader(NamedTuple):
    """A base and how to load it."""

    base: "Base"
    dtype: str
    device: str | None
    quantization: Quantization | None
    files: AdapterFiles
    changed: tuple[str, ...]
    """Components that the adapter changes."""
    run: tuple[str, ...]
    """Those and the components that the probes run."""

    def load(self) -> "PreTrainedModel":
        from haori.bases import load_model

        model = load_model(
            self.base, dtype=self.dtype, device=self.device, quantization=self.quantization, head=self.files.head,
            components=needed_components(self.base, self.run),
        )  # fmt: skip
        prepare_words(model, self.files)
        return model

    @property
    def measured(self) -> str:
        return "logits" if self.base.pipeline is None else NOISE

    @property
    def quantised(self) -> bool:
        return self.quantization is not None or self.base.quantization is not None

    def logits(self, model: "nn.Module", probes: Sequence[Probe]) -> "list[Tensor]":
        """Measure in float64; a quantised base computes in formats of its own."""
        return (live_probe_logits if self.quantised else exact_logits)(model, probes)

    def attach(
        self, model: "PreTrainedModel", files: AdapterFiles, probes: Sequence[Probe]
    ) -> "tuple[PeftModel, list[Tensor]]":
        """Put the adapter on; return also the logits without it, those of a classifier under the adapter's head."""
        with wearing_head(model, files):
            of_base = self.logits(model, probes)
        return attach_files(model, files, base_name=self.base.name), of_base


def _check_on_base(
    loader: _BaseLoader,
    files: AdapterFiles,
    probes: Sequence[Probe],
    live: _Live,
) -> tuple[list[Check], str]:
    """Run the checks that need the base in memory; return them with the dtype that `auto` became."""
    live_probes, probes = probes, adapter_probes(files, probes)
    try:
        model = loader.load()
    except MismatchError as error:  # of new words, which belong to text encoders of other sizes
        return [failed("keys", str(error))], loader.dtype
    dtype = model_dtype(model)
    head = [] if files.head is None else [check_head(loader.base, model, files)]
    try:
        adapted, of_base = loader.attach(model, files, probes)
    except MismatchError as error:
        return [*head, failed("keys", str(error))], dtype
    of_adapter = loader.logits(adapted, probes)
    effect = compare_logits(of_adapter, of_base).rms
    reloaded = live_probe_logits(adapted, live_probes) if live.logits is not None else ()
    words = [] if files.words is None else check_words(adapted, files.words, live_probes, live.words)
    checks = [
        *head,
        passed("keys", f"all {len(files.tensors)} tensors were used, none is missing"),
        *check_delta(adapted, loader.changed),
        check_effect(of_adapter, of_base, measured=loader.measured),
        *_check_each(loader, adapted, probes),
        check_reloaded(reloaded, live.logits, effect, measured=loader.measured),
        *words,
    ]
    if start := _residual_start(files):
        del model, adapted
        gc.collect()
        adapted = attach_files(loader.load(), files, base_name=loader.base.name)
        checks.append(check_repeated(of_adapter, loader.logits(adapted, probes), effect, start))
        if not checks[-1].passed:
            return checks, dtype
    if loader.quantization is None:
        merge = _check_merge(loader.base, adapted, probes, of_adapter, of_base, dtype, loader.measured)
        return [*checks, merge], dtype
    model = adapted = None
    gc.collect()  # before the base is loaded once more, unquantised
    return [*checks, *_check_unquantised(loader, files, probes, of_adapter, of_base, dtype)], dtype


def _residual_start(files: AdapterFiles) -> str | None:
    start = files.config.get("init_lora_weights")
    return start if isinstance(start, str) and start.lower().startswith(_RESIDUAL_STARTS) else None


def _check_unquantised(
    loader: _BaseLoader,
    files: AdapterFiles,
    probes: Sequence[Probe],
    of_adapter: "Sequence[Tensor]",
    of_base: "Sequence[Tensor]",
    dtype: str,
) -> list[Check]:
    """Put an adapter that was trained over a quantised base on the base itself, and merge it there."""
    assert loader.quantization is not None
    plain = loader._replace(dtype=dtype, quantization=None)
    adapted, plain_base = plain.attach(plain.load(), files, probes)
    plain_adapter = plain.logits(adapted, probes)
    moved = compare_logits(plain_adapter, of_adapter).rms
    effect, grid = compare_logits(of_adapter, of_base).rms, compare_logits(plain_base, of_base).rms
    limit = max(effect, _AMPLIFIED * grid)
    detail = (
        f"over the base in {dtype} the adapter's {loader.measured} differ by {moved:.2g} of their spread from those "
        f"over the {loader.quantization.label} base it was trained on (limit {limit:.2g}); the bare bases differ by "
        f"{grid:.2g}"
    )
    return [
        Check(name="quantization", passed=moved <= limit, detail=detail, value=moved, limit=limit),
        _check_merge(loader.base, adapted, probes, plain_adapter, plain_base, dtype, loader.measured),
    ]


def _check_finite(files: AdapterFiles) -> Check:
    from safetensors import safe_open

    broken = []
    with safe_open(files.weights, framework="pt") as file:
        for key in files.tensors:
            tensor: Tensor = file.get_tensor(key)
            values = tensor.bfloat16() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor  # fp8
            if not bool(values.isfinite().all()):
                broken.append(key)
    if broken:
        return failed("finite", f"{len(broken)} tensors hold NaN or infinity, first {broken[0]!r}")
    return passed("finite", "no NaN and no infinity")


def _check_each(loader: _BaseLoader, adapted: "PeftModel", probes: Sequence[Probe]) -> list[Check]:
    """Check of an adapter of several components that each has an effect of its own, with the others left bare.

    One probe shows it; the bare base runs on that alone too, since other batches are added in another order.
    """
    if len(loader.changed) < 2:
        return []
    with only_component(adapted, None):
        bare = loader.logits(adapted, probes[:1])
    checks = []
    for name in loader.changed:
        with only_component(adapted, name):
            alone = loader.logits(adapted, probes[:1])
        found = check_effect(alone, bare, subject=f"adapter on {name!r} alone", measured=NOISE)
        checks.append(found.with_fields(name=f"effect of {name}"))
    return checks


def _check_merge(
    base: "Base",
    adapted: "PeftModel",
    probes: Sequence[Probe],
    of_adapter: "Sequence[Tensor]",
    of_base: "Sequence[Tensor]",
    dtype: str,
    measured: str,
) -> Check:
    """Merge in place, which ends the use of `adapted`."""
    if base.quantization is not None:
        return passed("merge", f"skipped: the base is quantised ({base.quantization}), and merging into it is refused")
    try:
        merged = merge_in_place(adapted, probes)
    except MismatchError as error:
        return passed("merge", f"skipped: {error}")
    except VerificationError as error:
        return failed("merge", str(error))
    return check_merged(merged, of_adapter, of_base, dtype, measured=measured)
