"""The proof of a saved adapter: it is read from disk onto a fresh base and must be what was trained.

Every check is one row of the `Verification`. A check that does not apply passes with a detail that begins with
"skipped" and says why. One copy of the base is loaded; it is measured bare, with the adapter, and merged in place, in
float64 whatever its dtype. An adapter trained over a base quantised on loading is measured over that, as it computes,
and then merged into the base itself.
"""

import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import FileFormatError, MismatchError, VerificationError
from haori.core.quantization import Quantization
from haori.core.records import Check, Head, Verification
from haori.library.adapter_files import AdapterFiles, inspect_adapter
from haori.library.attaching import attach_files
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
from haori.library.proof.exact import exact_logits
from haori.library.proof.logits import (
    Probe,
    adapter_probes,
    compare_logits,
    default_probes,
    live_probe_logits,
    model_dtype,
)
from haori.library.proof.merging import check_merged, merge_in_place

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from haori.bases import Base

__all__ = ["delta_norms", "require_passed", "verify_adapter"]

# Methods whose layers say dW in full. The others rotate, rescale or prepend; for them only the logits are compared.
_ADDITIVE = frozenset({
    "ADALORA", "ARD_LORA", "C3A", "DELORA", "FOURIERFT", "LOHA", "LOKR", "LORA", "RANDLORA", "VBLORA", "VERA",
})  # fmt: skip

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
    prompt_pair: tuple[Sequence[int], Sequence[int]] | None = None,
    head: Head | None = None,
) -> Verification:
    """Reload the adapter in `folder` onto a fresh copy of `base` and check it.

    Args:
        base: The base it was trained on.
        folder: Its PEFT folder.
        probes: Token ids of a few prompts; by default, or where there are none, `default_probes`.
        dtype: Dtype of the base, the same as in training where `live_logits` are given.
        device: Where to load the base.
        quantization: How the base was quantised on loading for the training, if it was.
        live_logits: What `live_probe_logits` gave for the same probes on the model still in memory.
        prompt_pair: Ids of one prompt as training rendered it and as inference renders it.
        head: The head that was trained, for a classifier; None takes what the folder says of it.

    Returns:
        The checks; it never raises for an adapter that is wrong. See `require_passed`.
    """
    from haori.bases import load_tokenizer

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
        probes = probes or default_probes(load_tokenizer(base))
        loader = _BaseLoader(base, dtype, device, quantization, files.head)
        found, dtype = _check_on_base(loader, files, probes, live_logits)
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


def delta_norms(adapted: "PeftModel") -> dict[str, float]:
    """Return the Frobenius norm of what the adapter changes, by module name.

    For LoRA and its kin the norm of dW (before DoRA's rescaling); for modules saved whole and trained tokens the norm
    of the difference to the base. Modules of methods that do not add to weights are absent.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    additive = str(adapted.peft_config["default"].peft_type.value) in _ADDITIVE
    norms = {}
    for full_name, module in adapted.named_modules():
        name = full_name.removeprefix("base_model.model.")
        if isinstance(module, ModulesToSaveWrapper):
            norms[name] = _distance(module.modules_to_save["default"], module.original_module)
        elif isinstance(module, TrainableTokensLayer):
            if module.tied_adapter is None:
                norms[name] = _token_distance(module)
        elif isinstance(module, BaseTunerLayer) and additive and hasattr(module, "get_delta_weight"):
            if getattr(module, "r", {}).get("default") == 0:
                continue  # AdaLoRA took every rank away
            delta: Tensor = module.get_delta_weight("default")
            norms[name] = float(delta.detach().float().norm())
    return norms


class _BaseLoader(NamedTuple):
    """A base and how to load it."""

    base: "Base"
    dtype: str
    device: str | None
    quantization: Quantization | None
    head: Head | None

    def load(self) -> "PreTrainedModel":
        from haori.bases import load_model

        return load_model(
            self.base, dtype=self.dtype, device=self.device, quantization=self.quantization, head=self.head
        )

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
    live_logits: "Sequence[Tensor] | None",
) -> tuple[list[Check], str]:
    """Run the checks that need the base in memory; return them with the dtype that `auto` became."""
    live_probes, probes = probes, adapter_probes(files, probes)
    model = loader.load()
    dtype = model_dtype(model)
    head = [] if files.head is None else [check_head(loader.base, model, files)]
    try:
        adapted, of_base = loader.attach(model, files, probes)
    except MismatchError as error:
        return [*head, failed("keys", str(error))], dtype
    of_adapter = loader.logits(adapted, probes)
    effect = compare_logits(of_adapter, of_base).rms
    reloaded = live_probe_logits(adapted, live_probes) if live_logits is not None else ()
    checks = [
        *head,
        passed("keys", f"all {len(files.tensors)} tensors were used, none is missing"),
        _check_delta(adapted),
        check_effect(of_adapter, of_base),
        check_reloaded(reloaded, live_logits, effect),
    ]
    if start := _residual_start(files):
        del model, adapted
        gc.collect()
        adapted = attach_files(loader.load(), files, base_name=loader.base.name)
        checks.append(check_repeated(of_adapter, loader.logits(adapted, probes), effect, start))
        if not checks[-1].passed:
            return checks, dtype
    if loader.quantization is None:
        return [*checks, _check_merge(loader.base, adapted, probes, of_adapter, of_base, dtype)], dtype
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
        f"over the base in {dtype} the adapter's logits differ by {moved:.2g} of their spread from those over the "
        f"{loader.quantization.label} base it was trained on (limit {limit:.2g}); the bare bases differ by {grid:.2g}"
    )
    return [
        Check(name="quantization", passed=moved <= limit, detail=detail, value=moved, limit=limit),
        _check_merge(loader.base, adapted, probes, plain_adapter, plain_base, dtype),
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


def _check_delta(adapted: "PeftModel") -> Check:
    from haori.bases import head_modules

    norms = delta_norms(adapted)
    heads = head_modules(adapted.get_base_model())
    trained = {name: norm for name, norm in norms.items() if name not in heads}
    # The head of a classifier is trained from scratch: it says nothing of the rest, unless it is all there is.
    norms = trained or norms
    if not norms:
        return passed("delta", "skipped: this method adds nothing to weights; its effect on the logits is checked")
    zero = [name for name, norm in norms.items() if not norm > 0]
    if len(zero) == len(norms):
        detail = f"{len(zero)} of {len(norms)} modules were not changed at all, first {zero[0]!r}"
        return Check(name="delta", passed=False, detail=detail, value=0.0, limit=0.0)
    least = min((name for name in norms if norms[name] > 0), key=lambda name: norms[name])
    detail = f"{len(norms) - len(zero)} of {len(norms)} modules changed; smallest norm {norms[least]:.3g} in {least!r}"
    if zero:
        detail += f"; not changed at all: {_some(zero)}"
    return Check(name="delta", passed=True, detail=detail, value=norms[least], limit=0.0)


def _check_merge(
    base: "Base",
    adapted: "PeftModel",
    probes: Sequence[Probe],
    of_adapter: "Sequence[Tensor]",
    of_base: "Sequence[Tensor]",
    dtype: str,
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
    return check_merged(merged, of_adapter, of_base, dtype)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _distance(changed: "nn.Module", original: "nn.Module") -> float:
    before = dict(original.named_parameters())
    squares = [
        float((value.detach().float() - before[key].detach().float()).square().sum())
        for key, value in changed.named_parameters()
    ]
    return math.sqrt(sum(squares))


def _token_distance(layer: Any) -> float:
    rows = layer.token_indices["default"]
    base: Tensor = layer.get_base_layer().weight[rows]
    return float((layer.trainable_tokens_delta["default"].detach().float() - base.detach().float()).norm())
