"""Adapters on the live components of a pipeline, in any mix: merged into the weights for a while, or on the fly.

    merged      each changed module gets a new parameter W + sum_i m_i dW_i; its own is put back afterwards
    on the fly  each picture of a batch has its own mix; what a module computes is changed row by row

Neither writes to a weight of the base: its parameters are set aside, so that they are the same bytes afterwards,
whatever happens in between. A mix that is empty is the base. The classes of diffusers and transformers stay as they
are, and one Mixer puts on one mix at a time.

On the fly each mix of a batch has weights of its own, W + sum_i m_i dW_i as when merged, as long as their copies fit
into a bound of memory: all rows are then one batched product, which takes no longer than the base's. Beyond it, over
quantised weights, and where strengths change from step to step, changes are thin factors beside the base's weights.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from haori.core.errors import InputError
from haori.images.adapters import PictureAdapter
from haori.images.changes import Part, WholeChange, is_quantised, merged_parameters, row_scale, thin_change
from haori.images.rows import Batch, Change, RowModule

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haori.library.updates import ModuleUpdate

__all__ = ["Mix", "Mixer", "Rows", "Strength"]

_KEPT = 64  # adapters whose row scales are kept
_COPIES_BYTES = 1 << 30


@dataclass(frozen=True)
class Strength:
    """An adapter of a mix.

    Attributes:
        adapter: The adapter, read for the components that it is put on.
        denoiser: Its strength on the UNet or transformer.
        text_encoder: Its strength on the text encoders.
        schedule: Gives what the denoiser's strength is multiplied by at a share of the steps, 0 to 1; None for 1.
    """

    adapter: PictureAdapter
    denoiser: float = 1.0
    text_encoder: float = 1.0
    schedule: Callable[[float], float] | None = None


Mix = tuple[Strength, ...]
"""The adapters of one picture; the same one twice counts with the sum of its strengths."""

_Key = tuple[tuple[str, float], ...]


class _Merged(NamedTuple):
    """What changes each module, the parameters that come of it, and those that the module has itself."""

    keys: "dict[str, _Key]"
    parameters: "dict[str, dict[str, nn.Parameter]]"
    own: "dict[str, dict[str, nn.Parameter | None]]"


class Rows:
    """A batch of pictures with mixes of their own, while it is drawn."""

    def __init__(self, mixer: "Mixer", mixes: Sequence[Mix]) -> None:
        self.mixes = tuple(mixes)
        self._mixer = mixer
        self._scheduled = any(strength.schedule is not None for mix in mixes for strength in mix)
        self._batches: dict[str, Batch] = {}
        self._modules: dict[str, RowModule] = {}
        self._on: dict[str, tuple[_Key, ...]] = {}

    def scale(self, share: float) -> None:
        """Set the strengths of scheduled adapters to those at a share of the steps, from 0 (first) to 1."""
        if self._scheduled:
            self._set(share)

    def _set(self, share: float) -> None:
        wanted = self._wanted(share)
        thin = self._scheduled or self._copied_bytes(wanted) > self._mixer.copies_bytes
        for name, keys in wanted.items():
            if self._on.get(name) == keys:
                continue
            self._on[name] = keys
            of_key = {key: self._mixer._change(name, key, thin=thin) for key in dict.fromkeys(keys)}
            changes = [of_key[key] for key in keys]
            if name in self._modules:
                self._modules[name].set_changes(changes)
                continue
            component = name.partition(".")[0]
            if component not in self._batches:
                self._batches[component] = Batch(self._mixer.components[component], len(self.mixes))
            self._modules[name] = RowModule(self._mixer._module(name), self._batches[component], changes)

    def _wanted(self, share: float) -> dict[str, tuple[_Key, ...]]:
        """Return, for each module, what changes it in each picture; nothing at all in some that were changed before."""
        found: dict[str, tuple[_Key, ...]] = {name: ((),) * len(self.mixes) for name in self._on}
        for component in self._mixer.components:
            of_pictures = self._mixer._keys(component, self.mixes, share)
            for name in dict.fromkeys(name for modules in of_pictures for name in modules):
                found[name] = tuple(modules.get(name, ()) for modules in of_pictures)
        return found

    def _copied_bytes(self, wanted: Mapping[str, tuple[_Key, ...]]) -> int:
        total = 0
        for name, keys in wanted.items():
            weight: Any = self._mixer._module(name).weight
            total += weight.nbytes * (len(keys) if len(set(keys)) > 1 else 1)
        return total

    def _remove(self) -> None:
        for module in self._modules.values():
            module.remove()
        for batch in self._batches.values():
            batch.remove()


class Mixer:
    """Puts mixes of adapters on the components of one pipeline, whose own weights must stay as they are meanwhile.

    Args:
        components: The denoiser and the text encoders by name; what else is among them is never touched.
        copies_bytes: Most bytes of changed weights that a batch on the fly may hold beside those of the base.
    """

    def __init__(self, components: "Mapping[str, nn.Module]", *, copies_bytes: int = _COPIES_BYTES) -> None:
        self.components = dict(components)
        self.copies_bytes = copies_bytes
        self._is_on = False
        self._updates: dict[str, Mapping[str, ModuleUpdate]] = {}  # by content hash, of the mixes that are on
        self._row_scales: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._last: _Merged | None = None

    def choose(self, mixes: Sequence[Mix]) -> Literal["merged", "on_the_fly"]:
        """Say which way takes less time: merging, where all pictures have the same mix and its strengths stay."""
        first = self._keys_of(mixes[0]) if mixes else ()
        alike = all(self._keys_of(mix) == first for mix in mixes)
        scheduled = any(strength.schedule is not None for mix in mixes for strength in mix)
        if not alike or scheduled:
            return "on_the_fly"
        names = {name for mix in mixes for strength in mix for name in strength.adapter.updates}
        return "on_the_fly" if any(is_quantised(self._module(name)) for name in names) else "merged"

    @contextmanager
    def merged(self, mix: Mix) -> Iterator[None]:
        """Run a block with W + sum_i m_i dW_i in place of each weight W, computed in fp32 and rounded once.

        The weights of the last mix are kept for the next time, where they fit into `copies_bytes`.

        Raises:
            InputError: The base is quantised, or the mix has a schedule, or another mix is on.
        """
        if any(strength.schedule is not None for strength in mix):
            raise InputError("A strength that changes from step to step cannot be merged; put the mix on on the fly.")
        with self._on([mix]):
            merged = self._merged(mix)
            try:
                for name, parameters in merged.parameters.items():
                    self._module(name)._parameters.update(parameters)
                yield
            finally:
                for name, own in merged.own.items():
                    self._module(name)._parameters.update(own)

    @contextmanager
    def on_the_fly(self, mixes: Sequence[Mix]) -> Iterator[Rows]:
        """Run a block in which picture p of every batch has the mix `mixes[p]`, and no weight is touched.

        A batch may have several rows for a picture: with n pictures, row r is of picture r % n, as diffusers arranges
        classifier-free guidance. Text encoders see the pictures' prompts in the same order.

        Raises:
            InputError: There is no mix, or another one is on.
        """
        if not mixes:
            raise InputError("There is no picture to put adapters on: give a mix for each picture of the batch.")
        with self._on(mixes):
            rows = Rows(self, mixes)
            try:
                rows._set(0.0)
                yield rows
            finally:
                rows._remove()

    @contextmanager
    def _on(self, mixes: Sequence[Mix]) -> Iterator[None]:
        if self._is_on:
            raise InputError("Adapters are on already; take them off before others are put on.")
        self._is_on = True
        try:
            adapters = {strength.adapter.content_hash: strength.adapter for mix in mixes for strength in mix}
            self._updates = {key: adapter.updates for key, adapter in adapters.items()}
            for key in self._updates:
                self._row_scales.setdefault(key, {})
                self._row_scales.move_to_end(key)
            yield
        finally:
            self._is_on = False
            self._updates = {}
            while len(self._row_scales) > _KEPT:
                self._row_scales.popitem(last=False)

    def _merged(self, mix: Mix) -> "_Merged":
        """Return the parameters of a mix; those of the last time if it is the same."""
        keys: dict[str, _Key] = {}
        for component in self.components:
            keys |= self._keys(component, [mix], 0.0)[0]
        if self._last is not None and self._last.keys == keys:
            return self._last
        self._last = None  # before the next weights are made
        parameters = {name: merged_parameters(self._module(name), self._parts(name, key)) for name, key in keys.items()}
        own = {
            name: {parameter: self._module(name)._parameters[parameter] for parameter in changed}
            for name, changed in parameters.items()
        }
        found = _Merged(keys, parameters, own)
        if sum(value.nbytes for changed in parameters.values() for value in changed.values()) <= self.copies_bytes:
            self._last = found
        return found

    def _keys_of(self, mix: Mix) -> tuple[_Key, _Key]:
        return _added(mix, lambda one: one.denoiser), _added(mix, lambda one: one.text_encoder)

    def _keys(self, component: str, mixes: Sequence[Mix], share: float) -> list[dict[str, _Key]]:
        """Return, for each picture, the adapters that change each module of a component, with their strengths."""

        def strength_of(one: Strength) -> float:
            if component.startswith("text_encoder"):
                return one.text_encoder
            return one.denoiser * (1.0 if one.schedule is None else one.schedule(share))

        found = []
        for mix in mixes:
            modules: dict[str, _Key] = {}
            for key, strength in _added(mix, strength_of):
                for name in self._updates[key]:
                    if name.partition(".")[0] == component:
                        modules[name] = (*modules.get(name, ()), (key, strength))
            found.append(modules)
        return found

    def _change(self, name: str, key: _Key, *, thin: bool) -> Change:
        if not key:
            return None
        module, parts = self._module(name), self._parts(name, key)
        found = thin_change(module, parts) if thin or is_quantised(module) else None
        return found or WholeChange(merged_parameters(module, parts))

    def _parts(self, name: str, key: _Key) -> list[Part]:
        return [Part(strength, self._updates[one][name], partial(self._row_scale, one, name)) for one, strength in key]

    def _row_scale(self, key: str, name: str) -> "Tensor":
        held = self._row_scales[key]
        if name not in held:
            held[name] = row_scale(self._module(name), self._updates[key][name])
        return held[name]

    def _module(self, name: str) -> "nn.Module":
        component, _, path = name.partition(".")
        return self.components[component].get_submodule(path)


def _added(mix: Mix, strength_of: Callable[[Strength], float]) -> _Key:
    """Return the adapters of a mix with their strengths, one entry for each, without those of strength zero."""
    total: dict[str, float] = {}
    for one in mix:
        total[one.adapter.content_hash] = total.get(one.adapter.content_hash, 0.0) + strength_of(one)
    return tuple((key, strength) for key, strength in total.items() if strength != 0)
