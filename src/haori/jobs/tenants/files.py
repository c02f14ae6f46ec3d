"""A session on disk: PEFT files that stock PEFT loads, and beside them what a resume needs.

    adapter_config.json, adapter_model.safetensors   the adapter, as PEFT's save_pretrained writes it
    session.json                                     its spec, steps and base, and what was done to it
    optimizer.safetensors                            AdamW's moments, and gradients that no step has applied yet

A folder is whole or absent. Any LoRA of PEFT can be loaded, whoever wrote it; what else a folder may hold is refused.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from haori.core.client_runs import ClientRun
from haori.core.errors import FileFormatError, InputError, MismatchError, TrainingError
from haori.core.records import Record
from haori.core.storage import staged_folder, write_text
from haori.jobs.tenants.history import Runs
from haori.jobs.tenants.records import AdapterSpec
from haori.jobs.tenants.shared_model import HEAD, SharedModel
from haori.jobs.tenants.tenant import Gradients, LoraPair, Tenant
from haori.library import inspect_adapter
from haori.serve.adapters.plan import AdapterPlan, plan_adapter

if TYPE_CHECKING:
    from haori.library import AdapterFiles

__all__ = ["SESSION_NAME", "Session", "read_session", "read_tenant", "save_tenant"]

_PREFIX = "base_model.model."
SESSION_NAME = "session.json"
_WEIGHTS, _OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_GRADIENT = "gradient"


class Session(Record):
    """What a folder says of the session it came from; `runs` are those that made the adapter what it is."""

    schema_version: Literal[1] = 1
    spec: AdapterSpec
    steps: int
    base: str
    optimizer: bool
    runs: tuple[ClientRun, ...] = ()


def save_tenant(tenant: Tenant, shared: SharedModel, folder: Path, *, optimizer: bool, runs: Runs) -> Path:
    """Write a session's folder in one step.

    Raises:
        TrainingError: A factor is not finite.
        StorageError: It cannot be written.
    """
    from safetensors.torch import save_file

    weights = {}
    for name, pair in tenant.factors.items():
        for part, factor in (("lora_A", pair.a), ("lora_B", pair.b)):
            if not torch.isfinite(factor).all():
                raise TrainingError(
                    f"The adapter of {tenant.name!r} holds values that are not finite, so it was not saved; go back to "
                    "an earlier checkpoint with a lower learning rate."
                )
            weights[f"{_PREFIX}{name}.{part}.weight"] = factor.detach().cpu().contiguous()
    session = Session(spec=tenant.spec, steps=tenant.steps, base=shared.base.id, optimizer=optimizer, runs=runs)
    with staged_folder(folder) as stage:
        _config(tenant, shared).save_pretrained(str(stage))
        save_file(weights, stage / _WEIGHTS, metadata={"format": "pt"})
        if optimizer:
            save_file(_optimizer_tensors(tenant), stage / _OPTIMIZER)
        write_text(stage / SESSION_NAME, session.model_dump_json(indent=2) + "\n")
    return folder


def read_tenant(name: str, shared: SharedModel, folder: Path, spec: AdapterSpec | None, *, optimizer: bool) -> Tenant:
    """Read a session from its folder, or begin one with the LoRA in any PEFT folder.

    Args:
        name: The session.
        shared: The base.
        folder: What `save_tenant` wrote, an adapter of the library, or any PEFT folder.
        spec: What the session was created with; its rank must be the adapter's.
        optimizer: Whether to go on with the optimizer's state too.

    Raises:
        InputError: The adapter is of another kind or shape, or there is no optimizer state.
        MismatchError: It belongs to another base.
        FileFormatError: A file is damaged.
    """
    files = inspect_adapter(folder)
    _refuse_other_kinds(files, str(folder))
    session = read_session(folder)
    if session is not None and session.base != shared.base.id:
        raise MismatchError(
            f"The session in {str(folder)!r} was trained over the base {session.base}, and this one is "
            f"{shared.base.id} ({shared.base.name!r}); load it where its base is open."
        )
    plan = plan_adapter(files, _Tensors(shared), repr(folder.name))
    factors = _factors(files, plan, shared, str(folder))
    found = session.spec if session is not None else _spec_of(files, plan, shared)
    if spec is not None and spec.rank != found.rank:
        raise InputError(f"The adapter in {str(folder)!r} has rank {found.rank}, and the session rank {spec.rank}.")
    tenant = Tenant(name, found, factors, runs=() if session is None else session.runs)
    if session is not None:
        tenant.steps = session.steps
    if optimizer:
        if session is None or not session.optimizer:
            raise InputError(
                f"{str(folder)!r} holds no optimizer state; load it without, or save with it in the first place."
            )
        _read_optimizer(tenant, folder)
    return tenant


class _Tensors:
    """The base as the plan of an adapter looks at it."""

    def __init__(self, shared: SharedModel) -> None:
        self._parameters = dict(shared.model.named_parameters(remove_duplicate=False))
        self._layers: Mapping[str, Any] = {**shared.modules, HEAD: shared.model.lm_head}

    @property
    def names(self) -> Collection[str]:
        return self._parameters.keys()

    @property
    def tables(self) -> Collection[str]:
        return ()

    def linear(self, name: str) -> tuple[int, int] | None:
        layer = self._layers.get(name)
        return None if layer is None else (int(layer.out_features), int(layer.in_features))

    def weight(self, module: str) -> Tensor:
        return self.tensor(f"{module}.weight")

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self._parameters[name].detach()
        return found


def _refuse_other_kinds(files: "AdapterFiles", label: str) -> None:
    held = {
        f"an adapter of the method {files.method}": files.peft_type != "LORA"
        or files.use_dora
        or files.head is not None,
        "modules that are trained whole (modules_to_save)": bool(files.modules_to_save),
        "trained tokens": bool(files.trainable_tokens),
        "biases (lora_bias)": bool(files.config.get("lora_bias")),
    }
    for what, is_there in held.items():
        if is_there:
            raise InputError(
                f"{label!r} holds {what}; a training session goes on with plain LoRA alone. Train it with "
                "`haori train`, or merge it with `haori merge` and begin a session over the merged base."
            )


def _factors(files: "AdapterFiles", plan: AdapterPlan, shared: SharedModel, label: str) -> dict[str, LoraPair]:
    """Return the factors in the order of the model, and refuse whatever else is in the file."""
    from safetensors.torch import load_file

    whole = {**plan.vectors, **{name: tokens.key for name, tokens in plan.tokens.items()}}
    whole |= {name: module.base_bias for name, module in plan.modules.items() if module.base_bias is not None}
    if whole:
        raise InputError(
            f"{label!r} holds {next(iter(whole.values()))!r}, which is no part of a plain LoRA; a training session "
            "goes on with plain LoRA alone."
        )
    shared.check_targets(list(plan.modules))
    tensors = load_file(files.weights)
    for name, key in plan.copies.items():
        own = shared.model.get_parameter(name).detach().cpu()
        if not torch.equal(tensors[key].to(own.dtype), own):
            raise InputError(
                f"{label!r} holds {name!r} changed as a whole; a training session goes on with LoRA alone."
            )
    made = {}
    for name in [*(n for n in shared.modules if n in plan.modules), *([HEAD] if HEAD in plan.modules else [])]:
        module = plan.modules[name]
        assert module.a is not None
        assert module.b is not None
        a, b = (nn.Parameter(tensors[key].float().to(shared.device)) for key in (module.a, module.b))
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise FileFormatError(f"{label!r} holds NaN or infinity in the factors of {name!r}.")
        made[name] = LoraPair(a, b, plan.scales[name])
    return made


def _spec_of(files: "AdapterFiles", plan: AdapterPlan, shared: SharedModel) -> AdapterSpec:
    attention = shared.attention
    return AdapterSpec(
        rank=files.rank or 1,
        alpha=files.alpha or float(files.rank or 1),
        train_attn=any(name in attention for name in plan.modules),
        train_mlp=any(name not in attention and name != HEAD for name in plan.modules),
        train_unembed=HEAD in plan.modules,
    )


def _config(tenant: Tenant, shared: SharedModel) -> Any:
    """Return PEFT's configuration, with patterns where modules differ from the session's rank and alpha."""
    from peft import LoraConfig, TaskType

    spec = tenant.spec
    ranks = {name: len(pair.a) for name, pair in tenant.factors.items()}
    alphas = {name: pair.scale * ranks[name] for name, pair in tenant.factors.items()}
    return LoraConfig(
        r=spec.rank, lora_alpha=_whole(spec.alpha), target_modules=list(tenant.factors), bias="none",
        task_type=TaskType.CAUSAL_LM, base_model_name_or_path=shared.base.name, inference_mode=True,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != spec.rank},
        alpha_pattern={
            name: _whole(alpha) for name, alpha in alphas.items() if abs(alpha - spec.alpha) > 1e-9 * spec.alpha
        },
    )  # fmt: skip


def _whole(number: float) -> Any:
    return int(number) if number == int(number) else number


def read_session(folder: Path) -> Session | None:
    """Return what a folder says of the session it came from; None for files that none wrote.

    Raises:
        FileFormatError: It is damaged.
    """
    try:
        return Session.model_validate_json((folder / SESSION_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise FileFormatError(f"{str(folder / SESSION_NAME)!r} is damaged; load an earlier checkpoint.") from None


def _optimizer_tensors(tenant: Tenant) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in tenant.factors.items():
        for number, (part, factor) in enumerate((("lora_A", pair.a), ("lora_B", pair.b))):
            state = tenant.optimizer.state.get(factor, {})
            for key in ("step", *_MOMENTS):
                if key in state:
                    tensors[f"{name}.{part}.{key}"] = state[key].cpu().contiguous()
            if tenant.gradients is not None:
                tensors[f"{name}.{part}.{_GRADIENT}"] = tenant.gradients[name][number].cpu().contiguous()
    return tensors


def _read_optimizer(tenant: Tenant, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _OPTIMIZER
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{str(path)!r} cannot be read ({error}); load without the optimizer.") from None
    gradients: Gradients = {}
    for name, pair in tenant.factors.items():
        found = []
        for part, factor in (("lora_A", pair.a), ("lora_B", pair.b)):
            own = {key: tensors.pop(f"{name}.{part}.{key}", None) for key in ("step", *_MOMENTS, _GRADIENT)}
            wrong = [key for key in (*_MOMENTS, _GRADIENT) if own[key] is not None and own[key].shape != factor.shape]  # type: ignore[union-attr]
            has_moments = [own[key] is not None for key in ("step", *_MOMENTS)]
            if wrong or any(has_moments) != all(has_moments):
                raise FileFormatError(f"{str(path)!r} does not fit the adapter beside it; load without the optimizer.")
            if all(has_moments):
                tenant.optimizer.state[factor] = {
                    "step": own["step"], **{key: own[key].to(factor.device) for key in _MOMENTS}  # type: ignore[union-attr]
                }  # fmt: skip
            found.append(own[_GRADIENT])
        if found[0] is not None and found[1] is not None:
            gradients[name] = found[0].to(pair.a.device), found[1].to(pair.b.device)
    if tensors or (gradients and gradients.keys() != tenant.factors.keys()):
        raise FileFormatError(f"{str(path)!r} does not fit the adapter beside it; load without the optimizer.")
    tenant.gradients = gradients or None
