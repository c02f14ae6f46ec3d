"""Runs a model in float64 whatever format its weights are kept in, and merges an adapter in such a pass.

In 16 bits two ways to compute the same thing differ by more than a small adapter does. In float64 they differ by about
1e-12, so that a proof can have a limit that is a small share of the adapter's effect. The weights stay as they are:
each part of the model (a transformer layer, an embedding, a head) is widened just while it runs, so this takes the
memory of one part in float64, not of the model. Code that asks for a narrower format, as norms and softmax do, gets
float64 too.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from haori.library.proof.logits import Probe, last_logits, noise_of

if TYPE_CHECKING:
    from peft import PeftModel

    from haori.library.updates import ModuleUpdate

__all__ = ["checksum", "checksums_by_name", "exact_logits", "merging_logits"]

_POSITIONS = 8
_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_SHORTHANDS = (Tensor.float, Tensor.bfloat16, Tensor.half)


def exact_logits(
    model: nn.Module, probes: Sequence[Probe], changes: "Mapping[str, ModuleUpdate] | None" = None
) -> list[Tensor]:
    """Return the logits of the last positions of each probe, [T', V] on the CPU, with T' at most 8.

    They are float64, or fp32 where the model is on an Apple GPU, which has no float64.
    The probes run as one right-padded batch. The model is left as it was.

    Args:
        model: With or without adapters of PEFT.
        probes: Inputs.
        changes: Updates in the neutral form to run the model with, by the names of its modules.
    """
    with _widened(model, merge=False, changes=changes):
        return _logits(model, probes)


def merging_logits(adapted: "PeftModel", probes: Sequence[Probe]) -> tuple[list[Tensor], dict[nn.Parameter, int]]:
    """Merge the adapter layer by layer, and return the logits of the merged weights before they were rounded.

    Every W + dW is formed in float64, runs, and is then rounded once to the format in which W is kept. The layers stay
    PEFT's, with their adapters marked as merged.

    Returns:
        The logits as from `exact_logits`, and a checksum of every parameter as it was left.

    Raises:
        ValueError, RuntimeError, NotImplementedError, TypeError: From PEFT, if a layer cannot be merged.
    """
    with _widened(adapted, merge=True) as hooks:
        hooks.put_back = _stacked(probes) is None and _batch(adapted, probes) is None
        logits = _logits(adapted, probes)
        again, hooks.put_back = hooks.put_back, False
        for part in hooks.parts:
            # Also an expert, or a tower of another modality, that the probes did not reach.
            if again or part not in hooks.ran:
                hooks.widen(part)
                hooks.narrow(part)
    return logits, {parameter: checksum(parameter) for parameter in adapted.parameters()}


def checksum(tensor: Tensor) -> int:
    """Return a checksum of the bits of a tensor."""
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def checksums_by_name(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Return a checksum of every parameter by name, rounded to `dtype` first if it is given."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: checksum(parameter.to(dtype or parameter.dtype)) for name, parameter in named}


def _logits(model: nn.Module, probes: Sequence[Probe]) -> list[Tensor]:
    device = next(model.parameters()).device
    if (stacked := _stacked(probes)) is not None:
        of_noise: Any = model(**{name: tensor.to(device) for name, tensor in stacked.inputs.items()})
        return [noise_of(part).cpu() for part in of_noise.sample.split(stacked.rows)]
    inputs = _batch(model, probes)
    if inputs is None:
        return [last_logits(model, probe, device).cpu() for probe in probes]
    output: Any = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
    values: Tensor = output.logits if hasattr(output, "logits") else output[0]  # [B, P + T, V], P of prompt tuning
    if values.dim() == 2:  # [B, labels], one score each for a whole text
        return [row[None].cpu() for row in values]
    mask = inputs["attention_mask"]
    before = values.shape[1] - mask.shape[1]
    ends = [before + int(length) for length in mask.sum(-1)]
    return [values[row, max(before, end - _POSITIONS) : end].cpu() for row, end in enumerate(ends)]


class _Stacked(NamedTuple):
    """Probes of a model for pictures as one batch, with the rows of each."""

    inputs: dict[str, Tensor]
    rows: list[int]


def _stacked(probes: Sequence[Probe]) -> _Stacked | None:
    """Return the probes of a model for pictures as one batch; None for others, or where their sizes differ."""
    rows = [probe for probe in probes if isinstance(probe, Mapping) and "noisy" in probe]
    sizes = {tuple((name, tensor.shape[1:]) for name, tensor in sorted(row.items())) for row in rows}
    if not rows or len(rows) < len(probes) or len(sizes) > 1:
        return None
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return _Stacked(inputs, [len(row["noisy"]) for row in rows])


def _batch(model: nn.Module, probes: Sequence[Probe]) -> dict[str, Tensor] | None:
    """Return probes of tokens as one right-padded batch, each tensor [B, T]; None for inputs of another shape."""
    rows = [
        dict(probe) if isinstance(probe, Mapping) else {"input_ids": torch.tensor([list(probe)])} for probe in probes
    ]
    names = set(rows[0])
    if "input_ids" not in names or any(set(row) != names or any(t.dim() != 2 for t in row.values()) for row in rows):
        return None
    config: Any = getattr(model, "config", None)
    padding = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "pad_token_id", None)
    # By which a decoder with a head of labels finds the last token.
    fill = {"input_ids": padding if isinstance(padding, int) else 0}
    for row in rows:
        row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
    longest = max(row["input_ids"].shape[1] for row in rows)
    return {
        name: torch.cat(
            [functional.pad(r[name], (0, longest - r[name].shape[1]), value=fill.get(name, 0)) for r in rows]
        )
        for name in rows[0]
    }


@contextmanager
def _widened(
    model: nn.Module, *, merge: bool, changes: "Mapping[str, ModuleUpdate] | None" = None
) -> Iterator["_Hooks"]:
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    wide = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    model.eval()
    with _Asked(wide) as asked, _plain_experts(model):
        updates = {model.get_submodule(name): update for name, update in (changes or {}).items()}
        hooks = _Hooks(model, asked, updates, merge=merge)
        try:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                yield hooks
        finally:
            hooks.remove()
            for module, training in modes.items():
                module.training = training


@contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """Let the experts of a mixture run one after the other: grouped products have no float64."""
    name = "_experts_implementation"
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, getattr(config, name)) for config in configs.values() if hasattr(config, name)]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, implementation in before:
            setattr(config, name, implementation)


class _Asked(TorchFunctionMode):
    """Gives `wide` to code that asks torch for a narrower floating-point format by name."""

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()
        self.wide = wide
        self.on = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.on or func is Tensor.view:  # view(dtype) reads the same bits in another way
            return func(*args, **kwargs)
        if func in _SHORTHANDS:
            return args[0].to(self.wide)
        args = tuple(self.wide if _is_narrow(value) else value for value in args)
        return func(*args, **{key: self.wide if _is_narrow(value) else value for key, value in kwargs.items()})


class _Hooks:
    """Widens each part of a model before it runs and narrows it afterwards."""

    def __init__(
        self, model: nn.Module, asked: _Asked, updates: "Mapping[nn.Module, ModuleUpdate]", *, merge: bool
    ) -> None:
        self.asked, self.updates, self.merge = asked, updates, merge
        self.put_back = False  # merged weights after every run, for probes that cannot run at once
        self.parts, self.shallow = _parts(model)
        self.ran: set[nn.Module] = set()
        self.kept: dict[nn.Module, list[tuple[Any, str, Tensor]]] = {}
        self.handles: list[Any] = []
        for part in self.parts:
            self.handles.append(part.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
            self.handles.append(part.register_forward_hook(self._after, always_call=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for part in list(self.kept):  # something failed inside it
            self._restore(part)

    def widen(self, part: nn.Module) -> None:
        """Put a part's weights and buffers in float64, and merge its adapters if they are to be."""
        self.asked.on = False
        kept: list[tuple[Any, str, Tensor]] = []
        self.kept[part] = kept
        deep = part not in self.shallow
        for parameter in part.parameters(recurse=deep):
            if parameter.is_floating_point():
                kept.append((parameter, "", parameter.data))
                parameter.data = parameter.data.to(self.asked.wide)
        for module in part.modules() if deep else (part,):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    kept.append((module, name, buffer))
                    module._buffers[name] = buffer.to(self.asked.wide)
        for module in part.modules() if deep else ():
            if module in self.updates:
                _change(module, self.updates[module])
        self.asked.on = True
        if self.merge and deep:
            _merge_layers(part)

    def narrow(self, part: nn.Module) -> None:
        """Put a part back: as it was, or rounded once if it was merged."""
        if self.merge and self.put_back:
            for module in part.modules() if part not in self.shallow else ():
                if hasattr(module, "merged_adapters"):
                    vars(module)["merged_adapters"] = []
        elif self.merge:
            self.asked.on = False
            self.kept[part] = [
                (owner, name, owner.data.to(before.dtype) if not name else before)
                for owner, name, before in self.kept[part]
            ]
            self.asked.on = True
        self._restore(part)

    def _restore(self, part: nn.Module) -> None:
        for owner, name, before in reversed(self.kept.pop(part)):
            if name:
                owner._buffers[name] = before
            else:
                owner.data = before

    def _before(self, part: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.widen(part)
        return tuple(map(self._wide, args)), {key: self._wide(value) for key, value in kwargs.items()}

    def _after(self, part: nn.Module, args: Any, output: Any) -> None:
        self.ran.add(part)
        if part in self.kept:
            self.narrow(part)

    def _wide(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._wide, value))
        return value.to(self.asked.wide) if isinstance(value, Tensor) and value.is_floating_point() else value


def _parts(model: nn.Module) -> tuple[list[nn.Module], set[nn.Module]]:
    """Return the outermost modules that run as one: layers in a list, adapted modules, and all else with weights.

    A model that has weights of its own beside lists of layers is a part too, but for these weights alone: the second of
    what is returned.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: list[nn.Module] = []
    shallow: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        for child in module.children():
            whole = isinstance(module, nn.ModuleList) or isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            own = any(True for _ in child.parameters(recurse=False))
            has_layers = any(isinstance(inner, nn.ModuleList) for inner in child.children())
            if (whole or own) and child not in found:
                found.append(child)
            if not whole and own and has_layers:
                shallow.add(child)
            if not whole and (not own or has_layers):
                visit(child)

    visit(model)
    return found, shallow


def _change(module: Any, update: "ModuleUpdate") -> None:
    """Add an update to the weights of a module, which are copies in float64 at that time."""
    device = module.weight.device
    change = update.change(module.weight.data.cpu())
    module.weight.data += change.to(device)
    if update.bias is not None:
        module.bias.data += update.bias.to(device=device, dtype=module.bias.dtype)


def _merge_layers(part: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in part.modules():
        if isinstance(module, BaseTunerLayer) and not module.merged:
            module.merge(safe_merge=True)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in _NARROW
