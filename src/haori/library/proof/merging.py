"""Merges an adapter into the weights under it, in memory, and checks the sum before it is rounded."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import MismatchError, VerificationError
from haori.core.records import Check
from haori.library.proof.checks import failed
from haori.library.proof.exact import checksum, merging_logits
from haori.library.proof.logits import Probe, compare_logits

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import PreTrainedModel

__all__ = ["MergedInPlace", "check_merged", "compare_merged", "merge_in_place"]

# Measured on SmolLM2-135M with all methods that can be merged: merged and unmerged logits differ by 1e-14 of their
# spread in float64, and by 1e-6 of the effect for methods whose layers compute in fp32. A module that is left out, or
# a scale that is off by a thousandth, is above this.
_SHARE = 1e-4
# What the arithmetic itself may cost, for effects so small that a share of them is less.
_NOISE = {"torch.float64": 1e-12, "torch.float32": 2e-5}


class MergedInPlace(NamedTuple):
    """A base with an adapter added to its weights.

    Attributes:
        model: The merged model, its weights rounded to the formats they had.
        logits: Exact logits of its weights before they were rounded.
        altered: Names of weights that are not what was rounded then.
    """

    model: "PreTrainedModel"
    logits: "list[Tensor]"
    altered: list[str]


def merge_in_place(adapted: "PeftModel", probes: "Sequence[Probe]") -> MergedInPlace:
    """Add the adapter to the weights of the model it sits on; the adapter is gone from it.

    Modules that share a weight, as embedding and head or replicated layers do, get one each if the adapter does not
    change all of them alike.

    Args:
        adapted: The base with the adapter on it.
        probes: Prompts to run while the weights are not rounded yet.

    Raises:
        MismatchError: The method cannot be merged.
        VerificationError: The merged weights hold NaN or infinity.
    """
    config: Any = adapted.peft_config["default"]
    method = str(config.peft_type.value)
    if config.is_prompt_learning or not hasattr(adapted, "merge_and_unload"):
        raise MismatchError(f"An adapter of the method {method} adds no weights that could be merged into the base.")
    _unshare(adapted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits, sums = merging_logits(adapted, probes)
            whole = _kept_whole(adapted)
            _unwrap(adapted)
            model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)  # every layer is merged already
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        if "NaN" in str(error):
            raise VerificationError("Merging gives weights that are NaN or infinite: the adapter is broken.") from error
        raise MismatchError(f"PEFT cannot merge this {method} adapter: {str(error).splitlines()[0][:300]}") from error
    _untie_if_apart(model)
    expected = {name: sums.get(whole.get(name, parameter)) for name, parameter in model.named_parameters()}
    changed = [name for name, parameter in model.named_parameters() if expected[name] != checksum(parameter)]
    return MergedInPlace(model, logits, changed)


def check_merged(
    merged: MergedInPlace,
    of_adapter: "Sequence[Tensor]",
    of_base: "Sequence[Tensor]",
    dtype: str,
    *,
    measured: str = "logits",
) -> Check:
    """Check that the model merged in place is base and adapter; all logits are exact ones (see `exact_logits`).

    Args:
        merged: What `merge_in_place` returned.
        of_adapter: Logits of base and adapter, unmerged.
        of_base: Logits of the bare base.
        dtype: What the weights were rounded to.
        measured: What the logits are, where they are something else.
    """
    check = compare_merged(merged.logits, of_adapter, of_base, measured=measured)
    if check.passed and merged.altered:
        names = f"{len(merged.altered)} weights, first {merged.altered[0]!r},"
        return failed("merge", f"{names} are not the sum of base and adapter rounded to {dtype}")
    return check


def compare_merged(
    of_merged: "Sequence[Tensor]",
    of_adapter: "Sequence[Tensor]",
    of_base: "Sequence[Tensor]",
    *,
    measured: str = "logits",
) -> Check:
    """Check that the logits of merged weights, before these are rounded, are those of the adapter.

    The limit is a share of what the adapter does, so that a merge at another strength fails however small that is.
    """
    error, effect = compare_logits(of_adapter, of_merged), compare_logits(of_adapter, of_base)
    limit = max(_SHARE * effect.rms, _NOISE[str(of_merged[0].dtype)])
    detail = (
        f"merged and unmerged {measured} differ by {error.rms:.2g} of their spread before rounding (limit "
        f"{limit:.2g}); the adapter moves them by {effect.rms:.2g}"
    )
    if compare_logits(of_base, of_merged).max == 0:
        return failed("merge", "the merged model computes exactly what the base does: the adapter was lost")
    return Check(name="merge", passed=error.rms <= limit, detail=detail, value=error.rms, limit=limit)


def _kept_whole(adapted: "PeftModel") -> "dict[str, nn.Parameter]":
    """Return the parameters of modules that the adapter keeps whole, by the names they have in the merged model."""
    from peft.utils.other import ModulesToSaveWrapper

    return {
        f"{name}.{key}": parameter
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, parameter in module.modules_to_save["default"].named_parameters()
    }


def _unwrap(adapted: "PeftModel") -> None:
    """Put the modules that the adapter keeps whole in the place of the base's; not every method of PEFT can."""
    from peft.utils.other import ModulesToSaveWrapper

    base = adapted.get_base_model()
    wrapped = [(name, module) for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, module in wrapped:
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module.modules_to_save["default"])


def _unshare(adapted: "PeftModel") -> None:
    """Give each module a weight of its own where modules that share one are not all changed by the same adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    config: Any = adapted.peft_config["default"]
    replicated = bool(getattr(config, "layer_replication", None))
    changed_by: dict[nn.Module, Any] = {}
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            changed_by[module.get_base_layer()] = getattr(module, "tied_adapter", None) or module
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in adapted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))
    for parameter, places in owners.items():
        alike = len({type(module) for module, _ in places}) == 1  # replicas of a layer, not embedding and head
        if len({id(changed_by.get(module)) for module, _ in places}) > 1 or (alike and replicated):
            for module, name in places[1:]:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                module.register_parameter(name, own)


def _untie_if_apart(model: "PreTrainedModel") -> None:
    """Let the configuration say that embedding and head are no longer one matrix, if so."""
    head = model.get_output_embeddings()
    if head is None:  # that of a model of pictures
        return
    embedding = model.get_input_embeddings()
    if embedding is None or getattr(head, "weight", None) is embedding.weight:
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
