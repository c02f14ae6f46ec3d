"""One batch whose pictures have different changes of a module: its own forward, and the changes beside or within it.

Nothing here knows of adapters. Row r of a batch belongs to picture r % pictures, as diffusers puts the rows of
classifier-free guidance: all pictures without the prompt, then all with it. Linear layers and convolutions of one
pixel compute all rows in one batched product; other modules compute the rows of each change by themselves.
For inference: nothing here has gradients.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from haori.core.errors import InputError
from haori.images.changes import ThinChange, WholeChange, is_pointwise

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Batch", "Change", "RowModule"]

Change = ThinChange | WholeChange | None

_FIRST = ("sample", "hidden_states", "x", "input_ids")


class Batch:
    """How many rows a component is given at a time, for how many pictures.

    Args:
        component: The UNet, transformer or text encoder.
        pictures: That a batch is for.
    """

    def __init__(self, component: nn.Module, pictures: int) -> None:
        self.pictures = pictures
        self.rows = pictures
        self._hook = component.register_forward_pre_hook(self._count, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        """Take the hook out of the component."""
        self._hook.remove()

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs[name] for name in _FIRST if kwargs.get(name) is not None]
        self.rows = len(args[0] if args else given[0])
        if self.rows % self.pictures:
            raise InputError(
                f"A batch of {self.rows} rows cannot be shared out among {self.pictures} pictures: give as many "
                "mixes of adapters as there are pictures in it."
            )


class RowModule:
    """Stands for the forward of one module while each picture of a batch has its own change of it.

    A weight that all pictures share is put in the place of the module's own, and its forward stays.

    Args:
        module: The module; what is set of it until `remove` is the instance attribute `forward`, or parameters.
        batch: Of its component.
        changes: One for each picture, the same object where they are the same; None leaves the module as it is.
    """

    def __init__(self, module: nn.Module, batch: Batch, changes: Sequence[Change]) -> None:
        self.module, self.batch = module, batch
        self.forward: Callable[..., Any] = module.forward
        self._forward_held = module.__dict__.get("forward")
        self._parameters_held: dict[str, nn.Parameter | None] = {}
        self.set_changes(changes)

    def set_changes(self, changes: Sequence[Change]) -> None:
        """Replace the changes, as a schedule of strengths does between steps."""
        self.remove()
        self.changes = tuple(changes)
        self.stack: _WholeStack | _ThinStack | None = None
        self.is_one = len({id(change) for change in changes}) == 1
        if self.is_one and isinstance(changes[0], WholeChange):
            held = self.module._parameters
            self._parameters_held = {name: held[name] for name in changes[0].parameters}
            held.update(changes[0].parameters)
            return
        self.module.__dict__["forward"] = self
        if self.is_one or not is_pointwise(self.module):
            return
        if all(not isinstance(change, WholeChange) for change in changes):
            self.stack = _ThinStack(self.module, changes)
        elif all(not isinstance(change, ThinChange) for change in changes):
            self.stack = _WholeStack(self.module, changes)
            self.changes = ()  # the stack has copies

    def remove(self) -> None:
        """Give the module its own forward and parameters back."""
        self.module._parameters.update(self._parameters_held)
        self._parameters_held = {}
        if self._forward_held is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self._forward_held

    @torch.no_grad()
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the module computes of x, whose first axis holds the rows, with each row's change."""
        if self.is_one:
            return self._with(self.changes[0], x, args, kwargs)
        rows = self.batch.rows
        if len(x) != rows:
            raise InputError(
                f"A {type(self.module).__name__} that the adapters change is given {len(x)} rows for a batch of "
                f"{rows}, so which picture each belongs to is not known; draw pictures of different adapters one after "
                "the other with this base."
            )
        if isinstance(self.stack, _WholeStack):
            return self.stack.run(x, rows)
        if self.stack is not None:
            out: Tensor = self.forward(x, *args, **kwargs)
            return self.stack.add(out, x, rows)
        return self._by_change(x, rows, args, kwargs)

    def _by_change(self, x: Tensor, rows: int, args: Any, kwargs: Any) -> Tensor:
        """Compute the rows of each change by themselves."""
        places: dict[int, list[int]] = {}
        for row in range(rows):
            places.setdefault(id(self.changes[row % len(self.changes)]), []).append(row)
        out: Tensor | None = None
        for change in self.changes:
            if (found := places.pop(id(change), None)) is None:
                continue
            at = torch.tensor(found, device=x.device)
            part = self._with(change, x.index_select(0, at), args, kwargs)
            if out is None:
                out = part.new_empty(rows, *part.shape[1:])
            out.index_copy_(0, at, part)
        assert out is not None
        return out

    def _with(self, change: Change, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if isinstance(change, WholeChange):
            return self._in_place_of(change.parameters, x, args, kwargs)
        out: Tensor = self.forward(x, *args, **kwargs)
        return out if change is None else _added(self.module, change, out, x)

    def _in_place_of(self, parameters: "Mapping[str, nn.Parameter]", x: Tensor, args: Any, kwargs: Any) -> Tensor:
        held = self.module._parameters
        own = {name: held[name] for name in parameters}
        held.update(parameters)
        try:
            out: Tensor = self.forward(x, *args, **kwargs)
        finally:
            held.update(own)
        return out


class _WholeStack:
    """The weights of all pictures by one linear layer or convolution of one pixel: [P, out, in]."""

    def __init__(self, module: nn.Module, changes: Sequence[WholeChange | Any]) -> None:
        own: Mapping[str, Any] = module._parameters
        held = [own if change is None else {**own, **change.parameters} for change in changes]
        self.weights = torch.stack([one["weight"].detach().flatten(1) for one in held])
        self.is_linear = isinstance(module, nn.Linear)
        self.bias: Tensor | None = None
        if own["bias"] is not None:
            biases = torch.stack([one["bias"].detach() for one in held])
            self.bias = biases[:, None, :] if self.is_linear else biases[:, :, None]

    def run(self, x: Tensor, rows: int) -> Tensor:
        """Return what the layer computes of all rows."""
        pictures, outputs, _ = self.weights.shape
        if self.is_linear:
            given, shape = x.reshape(rows, -1, x.shape[-1]), (*x.shape[:-1], outputs)  # [rows, tokens, in]
            out = x.new_empty(rows, given.shape[1], outputs)
        else:
            given, shape = x.flatten(2), (len(x), outputs, *x.shape[2:])  # [rows, in, pixels]
            out = x.new_empty(rows, outputs, given.shape[2])
        for start in range(0, rows, pictures):
            at = slice(start, start + pictures)
            pair = (given[at], self.weights.mT) if self.is_linear else (self.weights, given[at])
            if self.bias is None:
                torch.bmm(*pair, out=out[at])
            else:
                torch.baddbmm(self.bias, *pair, out=out[at])
        return out.view(shape)


class _ThinStack:
    """The thin changes of all pictures by such a layer, padded with zeros to the largest rank."""

    def __init__(self, module: nn.Module, changes: Sequence[ThinChange | Any]) -> None:
        given = [change for change in changes if change is not None]
        like, most, pictures = given[0], max(len(change.a) for change in given), len(changes)
        out, inner = len(like.b), like.a[0].numel()
        self.is_linear = isinstance(module, nn.Linear)
        self.a = like.a.new_zeros(pictures, most, inner)
        self.b = like.b.new_zeros(pictures, out, most)
        self.gain = like.b.new_ones(pictures, 1, out) if any(one.gain is not None for one in given) else None
        self.bias = like.b.new_zeros(pictures, 1, out) if any(one.bias is not None for one in given) else None
        for at, change in enumerate(changes):
            if change is None:
                continue
            rank = len(change.a)
            self.a[at, :rank] = change.a.flatten(1)
            self.b[at, :, :rank] = change.b
            if self.gain is not None and change.gain is not None:
                self.gain[at, 0] = change.gain
            if self.bias is not None and change.bias is not None:
                self.bias[at, 0] = change.bias
        self.own_bias: Any = module.bias

    def add(self, out: Tensor, x: Tensor, rows: int) -> Tensor:
        """Add the changes of all rows to what the layer itself computed of them."""
        pictures = len(self.a)
        last = out if self.is_linear else out.flatten(2).mT  # channels last
        given = x if self.is_linear else x.flatten(2).mT
        seen = last.reshape(rows, -1, last.shape[-1])  # [rows, tokens, out]
        read = given.reshape(rows, -1, given.shape[-1]).to(self.a.dtype)
        parts = []
        for start in range(0, rows, pictures):
            at = slice(start, start + pictures)
            part = seen[at] if self.gain is None else _times(seen[at], self.gain, self.own_bias)
            product = torch.bmm(read[at], self.a.mT)
            if part.dtype == self.b.dtype:
                part = torch.baddbmm(part, product, self.b.mT)
            else:
                part = part + torch.bmm(product, self.b.mT).to(part.dtype)
            parts.append(part if self.bias is None else part + self.bias)
        added = torch.cat(parts)
        return added.view(out.shape) if self.is_linear else added.mT.reshape(out.shape)


def _times(out: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a layer computed, without its bias, times a gain; channels are last."""
    return out * gain if bias is None else (out - bias) * gain + bias


def _added(module: nn.Module, change: ThinChange, out: Tensor, x: Tensor) -> Tensor:
    """Return what a module computed of x, with a change added."""
    own_bias: Any = module.bias
    if not isinstance(module, _ConvNd):
        total = out if change.gain is None else _times(out, change.gain, own_bias)
        if len(change.a):
            total = total + ((x.to(change.a.dtype) @ change.a.T) @ change.b.T).to(out.dtype)
        return total if change.bias is None else total + change.bias
    total = out if change.gain is None else _times(out.movedim(1, -1), change.gain, own_bias).movedim(-1, 1)
    if len(change.a):
        convolve: Any = module._conv_forward
        product = convolve(x, change.a, None)  # [B, R, h, w]
        added = torch.matmul(change.b, product.flatten(2))  # [B, out, h w]
        total = total + added.view(out.shape)
    return total if change.bias is None else (total.movedim(1, -1) + change.bias).movedim(-1, 1)
