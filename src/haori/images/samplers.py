"""Samplers and schedule types by the names of AUTOMATIC1111's web UI, as schedulers of diffusers.

A sampler says how a picture comes out of noise, a schedule type at which noise levels. What diffusers has no algorithm
for is refused, never replaced by a similar one. A base that was made for flow matching (FLUX, Qwen-Image, Z-Image) has
schedulers of its own, and `Euler` alone.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from haori.bases.quiet import quiet_diffusers
from haori.core.errors import InputError, nearest

__all__ = ["AUTOMATIC", "OWN", "SAMPLERS", "SCHEDULES", "Sampler", "make_scheduler", "own_sampler", "resolve_sampler"]

AUTOMATIC = "Automatic"
OWN = "Base"  # the scheduler of the base, where the web UI has no name for it
_FLOW = "FlowMatch"
_HIGH = 1_000  # far above the 15 of Stable Diffusion
# They know no noise levels, or what is set of them is theirs.
_EXACT = frozenset({"DDIMScheduler", "PNDMScheduler", "LCMScheduler", "FlowMatchEulerDiscreteScheduler"})


@dataclass(frozen=True)
class Sampler:
    """A sampler of the web UI.

    Attributes:
        name: As the web UI writes it.
        scheduler: Class of diffusers.
        options: Of that class.
        automatic: Schedule type that `Automatic` stands for; None for the base's own spacing.
        most_steps: More are refused; None for no limit of its own.
        own_steps: Its steps are its own, and there is no other schedule type.
    """

    name: str
    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    automatic: str | None = None
    most_steps: int | None = None
    own_steps: bool = False


_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++"}

SAMPLERS = (
    Sampler("DPM++ 2M", _MULTISTEP, {"algorithm_type": "dpmsolver++"}, "Karras"),
    Sampler("DPM++ SDE", _SINGLESTEP, {**_SDE, "lower_order_final": True}, "Karras"),
    Sampler("DPM++ 2M SDE", _MULTISTEP, _SDE, "Exponential"),
    Sampler("DPM++ 2M SDE Heun", _MULTISTEP, {**_SDE, "solver_type": "heun"}, "Exponential"),
    Sampler("DPM++ 3M SDE", _MULTISTEP, {**_SDE, "solver_order": 3}, "Exponential"),
    Sampler("Euler a", "EulerAncestralDiscreteScheduler"),
    Sampler("Euler", "EulerDiscreteScheduler"),
    Sampler("LMS", "LMSDiscreteScheduler"),
    Sampler("Heun", "HeunDiscreteScheduler"),
    Sampler("DPM2", "KDPM2DiscreteScheduler", {}, "Karras"),
    Sampler("DPM2 a", "KDPM2AncestralDiscreteScheduler", {}, "Karras"),
    Sampler("DDIM", "DDIMScheduler"),
    Sampler("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
    Sampler("UniPC", "UniPCMultistepScheduler"),
    Sampler("LCM", "LCMScheduler", {}, None, 50, own_steps=True),
)
"""In the web UI's order."""

SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    AUTOMATIC: {},
    "Uniform": {"timestep_spacing": "linspace"},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "SGM Uniform": {"timestep_spacing": "trailing"},
    "DDIM": {"timestep_spacing": "leading"},
    "Beta": {"use_beta_sigmas": True},
}
"""Schedule types, and what they are as options of a scheduler."""

_WITHOUT_COUNTERPART = (
    "DPM++ 2S a", "DPM fast", "DPM adaptive", "Restart", "DDIM CFG++", "Polyexponential", "KL Optimal",
    "Align Your Steps", "Simple", "Normal", "Turbo",
)  # fmt: skip


def resolve_sampler(sampler: str, schedule: str = AUTOMATIC) -> tuple[str, str]:
    """Return a sampler and a schedule type as the web UI writes them.

    Args:
        sampler: Its name in any case, or as older versions wrote both in one, `DPM++ 2M Karras`.
        schedule: In any case, with underscores or spaces.

    Raises:
        InputError: One of them is not known, or diffusers has no algorithm for it.
    """
    samplers = {name.lower(): name for name in (*(one.name for one in SAMPLERS), OWN)}
    schedules = {name.lower(): name for name in SCHEDULES}
    name, kind = sampler.strip().lower(), schedule.strip().lower().replace("_", " ") or AUTOMATIC.lower()
    for ending in schedules:
        if name not in samplers and kind == AUTOMATIC.lower() and name.endswith(f" {ending}"):
            name, kind = name.removesuffix(f" {ending}"), ending
    if name not in samplers:
        raise InputError(_unknown("sampler", sampler, samplers))
    if kind not in schedules:
        raise InputError(_unknown("schedule type", schedule, schedules))
    return samplers[name], schedules[kind]


def _unknown(what: str, given: str, known: Mapping[str, str]) -> str:
    if given.strip().lower() in {name.lower() for name in _WITHOUT_COUNTERPART}:
        return (
            f"The {what} {given.strip()!r} of the web UI has no counterpart in diffusers; there are "
            f"{', '.join(known.values())}."
        )
    hint = nearest(given.strip().lower()[:80], known)
    return f"There is no {what} {given[:80]!r}; {hint or 'there are ' + ', '.join(known.values()) + '.'}"


def make_scheduler(own: Any, sampler: str, schedule: str, steps: int) -> Any:
    """Return a scheduler for a base.

    Args:
        own: The base's scheduler; its noise levels and what its model predicts are kept.
        sampler: From `resolve_sampler`.
        schedule: From `resolve_sampler`.
        steps: That will be asked of it.

    Raises:
        InputError: The sampler cannot be used with this base, this schedule type or so many steps.
    """
    import diffusers

    if sampler == OWN:
        if schedule != AUTOMATIC:
            raise InputError(f"The base's own sampler has its own schedule; give a sampler beside {schedule!r}.")
        return type(own).from_config(own.config)
    found = next(one for one in SAMPLERS if one.name == sampler)
    name = found.scheduler
    if type(own).__name__.startswith(_FLOW):
        if sampler != "Euler":
            raise InputError(
                f"The sampler {sampler!r} is for bases that predict noise, and this one was made for flow matching; "
                "it has 'Euler'."
            )
        name = "FlowMatchEulerDiscreteScheduler"
    if steps > (found.most_steps or steps):
        raise InputError(f"The sampler {sampler!r} takes {found.most_steps} steps at most, and not {steps:,}.")
    kind: Any = getattr(diffusers, name)
    chosen = SCHEDULES[(found.automatic or AUTOMATIC) if schedule == AUTOMATIC else schedule]
    taken = inspect.signature(kind.__init__).parameters
    allowed = [one for one, keys in SCHEDULES.items() if not keys or (set(keys) <= set(taken) and not found.own_steps)]
    if schedule not in allowed:
        raise InputError(f"The sampler {sampler!r} has no schedule type {schedule!r}; it has {', '.join(allowed)}.")
    # A base's own choice of noise levels would be a second one beside that of the schedule type.
    levels = {key: False for options in SCHEDULES.values() for key in options if key.startswith("use_") and chosen}
    options = {key: levels[key] for key in levels if key in taken} | dict(found.options) | dict(chosen)
    with quiet_diffusers():
        made = kind.from_config(own.config, **options)
    return _mended(made) if name not in _EXACT else made


def _mended(scheduler: Any) -> Any:
    """Make a scheduler right where a base's first noise level is very high.

    Several noise levels then have the same timestep, by which diffusers looks for the first step and finds the second;
    and the ancestral samplers' differences of squares are rounded to less than zero in fp32.
    """
    set_timesteps = scheduler.set_timesteps

    def begin_at_first(*arguments: Any, **options: Any) -> None:
        set_timesteps(*arguments, **options)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        if float(scheduler.sigmas[0]) > _HIGH:
            scheduler.sigmas = scheduler.sigmas.double()

    scheduler.set_timesteps = begin_at_first
    return scheduler


def own_sampler(own: Any) -> str:
    """Return the web UI's name of a base's own scheduler, `Base` where it has none."""
    for sampler in SAMPLERS:
        if type(own).__name__.startswith(_FLOW):
            return "Euler" if type(own).__name__ == "FlowMatchEulerDiscreteScheduler" else OWN
        if sampler.scheduler == type(own).__name__:
            made = make_scheduler(own, sampler.name, AUTOMATIC, sampler.most_steps or 20)
            if _settings(made) == _settings(own):
                return sampler.name
    return OWN


def _settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
