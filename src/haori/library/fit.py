"""Which modules of an adapter fit a base: by names and shapes, from the headers of the weight files alone.

Nothing here looks at values: an adapter of Flux.1 dev fits Flux.1 schnell. Whether the weights are those it was trained
on is told by fingerprints (`BaseReference.compare`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from haori.bases.pipeline import read_base_folder
from haori.core.errors import MismatchError
from haori.library.update_shapes import weight_shape

if TYPE_CHECKING:
    from torch import nn

    from haori.bases.base import Base
    from haori.bases.folder import ModelFolder
    from haori.library.updates import AdapterUpdates

__all__ = ["BaseWeight", "Fit", "Misfit", "base_weights", "component_weights", "live_weights", "match"]

Shape = tuple[int, ...]

_NAMED = 3  # misfits that a message names one by one
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight$")


@dataclass(frozen=True)
class BaseWeight:
    """A weight or bias of a base.

    Attributes:
        name: What the base's own files call it, within its component.
        shape: [out, in(, k...)] or [out], and [in, out] for GPT-2's layers, as their updates are read too; None where
            it is quantised and stored in another shape.
        tied: It is not stored: the output head shares the input embedding that `name` names.
    """

    name: str
    shape: Shape | None
    tied: bool = False


@dataclass(frozen=True)
class Misfit:
    """An update that the base has no place for.

    Attributes:
        module: The module's full name; with `.bias` behind it where only the update of the bias does not fit.
        update: Shape of the update.
        base: Shape in the base; None where it has no such module.
        reason: What is wrong, as a clause.
    """

    module: str
    update: Shape
    base: Shape | None
    reason: str

    def __str__(self) -> str:
        return f"{self.module}: {self.reason}"


@dataclass(frozen=True)
class Fit:
    """How the modules of an adapter fit a base.

    Attributes:
        weights: The base's weight of every module that fits, by the module's name.
        biases: The same for updates of biases.
        missing: Updates of modules that the base does not have.
        misshapen: Updates of another shape than the base's module.
        unchecked: Modules that are there but whose shape is not known, since the base is quantised.
    """

    weights: Mapping[str, BaseWeight]
    biases: Mapping[str, BaseWeight] = field(default_factory=dict)
    missing: tuple[Misfit, ...] = ()
    misshapen: tuple[Misfit, ...] = ()
    unchecked: tuple[str, ...] = ()

    @property
    def misfits(self) -> tuple[Misfit, ...]:
        """Return everything that does not fit."""
        return self.missing + self.misshapen

    @property
    def is_whole(self) -> bool:
        """Say whether everything the adapter changes has its place in the base."""
        return not self.misfits and bool(self.weights or self.biases)

    def require(self, adapter: str, base: str) -> None:
        """Refuse an adapter of which something does not fit.

        Args:
            adapter: What to call the adapter in the message.
            base: What to call the base.

        Raises:
            MismatchError: A module has no place in the base, or the adapter changes no module at all.
        """
        if self.is_whole:
            return
        if not self.misfits:
            raise MismatchError(f"The adapter {adapter!r} changes no module, so there is nothing to fit to {base!r}.")
        # A module whose weight and bias are both amiss counts once.
        amiss = {misfit.module.removesuffix(".bias") for misfit in self.misfits}
        total = len(amiss | set(self.weights) | set(self.biases))
        count = "None of its modules fits" if len(amiss) == total else f"{len(amiss)} of its {total} modules do not fit"
        named = "; ".join(str(misfit) for misfit in self.misfits[:_NAMED])
        more = f"; and {len(self.misfits) - _NAMED} more" if len(self.misfits) > _NAMED else ""
        raise MismatchError(
            f"The adapter {adapter!r} was not made for the base {base!r}. {count}: {named}{more}. "
            "Choose the base that it was trained on, or one of the same family."
        )


def match(updates: "AdapterUpdates", weights: Mapping[str, Mapping[str, BaseWeight]]) -> Fit:
    """Find the place of every update in a base.

    Args:
        updates: The adapter.
        weights: Weights and biases of the base by component and by canonical name, as `base_weights` reads them.
    """
    found: dict[str, BaseWeight] = {}
    biases: dict[str, BaseWeight] = {}
    missing, misshapen, unchecked = [], [], []
    for name, update in updates.modules.items():
        component, _, path = name.partition(".")
        of_base = weights.get(component, {})
        parts = []
        if (changed := weight_shape(update)) is not None:
            parts.append(("", "weight", changed, found))
        if update.bias is not None:
            parts.append((".bias", "bias", tuple(update.bias.shape), biases))
        for end, parameter, shape, fitting in parts:
            weight = _find(of_base, path, parameter)
            if weight is None:
                reason = _why_missing(component, path, parameter, weights)
                missing.append(Misfit(name + end, shape, None, reason))
            elif weight.shape is not None and not _same(shape, weight.shape):
                reason = f"the update is {_text(shape)}, the base has {_text(weight.shape)}"
                misshapen.append(Misfit(name + end, shape, weight.shape, reason))
            else:
                fitting[name] = weight
                unchecked.extend([name] if weight.shape is None else [])
    return Fit(found, biases, tuple(missing), tuple(misshapen), tuple(dict.fromkeys(unchecked)))


def base_weights(base: "Base") -> dict[str, dict[str, BaseWeight]]:
    """Return the weights of a base by component and canonical name, from the headers of its files."""
    return {name: component_weights(folder) for name, folder in read_base_folder(base.path).models.items()}


def component_weights(folder: "ModelFolder") -> dict[str, BaseWeight]:
    """Return the weights of one component by canonical name.

    The canonical name is the one that the module has in transformers 4 and diffusers, and that adapters are written
    with. Files of a `CLIPTextModel` saved by transformers 5 lack its `text_model.`.
    """
    found = {}
    for name, shape in folder.tensors.items():
        known = None if folder.quantization is not None else shape
        found[_canonical(folder.architecture, name)] = BaseWeight(name, known)
    embeddings = [weight for name, weight in found.items() if _EMBEDDING.search(name)]
    if "lm_head.weight" not in found and len(embeddings) == 1:
        found["lm_head.weight"] = BaseWeight(embeddings[0].name, embeddings[0].shape, tied=True)
    return found


def live_weights(components: "Mapping[str, nn.Module]") -> dict[str, dict[str, BaseWeight]]:
    """Return the weights of loaded components, or of their skeletons, as `base_weights` does of those on disk."""
    found: dict[str, dict[str, BaseWeight]] = {}
    for component, model in components.items():
        architecture = type(model).__name__
        found[component] = {
            _canonical(architecture, name): BaseWeight(
                name, tuple(parameter.shape) if parameter.is_floating_point() else None
            )
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
    return found


def _canonical(architecture: str, name: str) -> str:
    if architecture == "CLIPTextModel" and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def _find(weights: Mapping[str, BaseWeight], path: str, parameter: str) -> BaseWeight | None:
    """Look up a module's weight or bias; checkpoints of a bare model lack the first part of its name (`model.`)."""
    found = weights.get(f"{path}.{parameter}")
    first, _, rest = path.partition(".")
    if found is None and rest and not any(name.startswith(f"{first}.") for name in weights):
        found = weights.get(f"{rest}.{parameter}")
    return found


def _why_missing(component: str, path: str, parameter: str, weights: Mapping[str, Mapping[str, BaseWeight]]) -> str:
    if component not in weights:
        return f"the base has no component {component!r}, only {_list(weights)}"
    if parameter == "bias" and _find(weights[component], path, "weight") is not None:
        return "the module has no bias in the base"
    return f"there is no such module in the base's {component!r}"


def _same(update: Shape, base: Shape) -> bool:
    """Compare shapes, where a file may keep a convolution's update flattened and a linear one's as a 1 x 1 kernel."""
    if update == base:
        return True
    flat = len(update) == 2 or len(base) == 2 or _without_ones(update) == _without_ones(base)
    return flat and update[0] == base[0] and math.prod(update) == math.prod(base)


def _without_ones(shape: Shape) -> Shape:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _text(shape: Shape) -> str:
    return " x ".join(str(size) for size in shape) or "a scalar"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
