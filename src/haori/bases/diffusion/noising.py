"""How noise is put into latents and what the denoiser is trained to predict of it, by the base's scheduler.

Two kinds. Diffusion in steps (DDPM: Ho et al. 2020, arXiv 2006.11239): x_t = a_t x_0 + b_t e with
a_t^2 + b_t^2 = 1, for T discrete t; the target is the noise e, the velocity a_t e - b_t x_0 (Salimans and Ho 2022,
arXiv 2202.00512) or the sample x_0. Flow matching (Lipman et al. 2022, arXiv 2210.02747; as rectified flow Liu et al.
2022, arXiv 2209.03003): x_s = (1 - s) x_0 + s e for s in 0..1, and the target is e - x_0. Timesteps are given as t, or
as 1000 s.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from haori.bases.quiet import quiet_diffusers
from haori.core.errors import BaseError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["FlowMatching", "Noising", "StepwiseDiffusion", "TimestepSampling", "noising_of", "prediction_of"]

_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class TimestepSampling(NamedTuple):
    """How timesteps are drawn, as shares u of the whole range 0 (no noise) to 1 (nothing but noise).

    Attributes:
        kind: `uniform`; `logit_normal`, u = sigmoid(mean + std n) (Esser et al. 2024, arXiv 2403.03206); or `shift`,
            the same moved towards noise: shift u / (1 + (shift - 1) u) of a uniform u.
        mean: Of the logit-normal.
        std: Of the logit-normal.
        shift: Above 1 towards noise, below 1 towards detail.
    """

    kind: Literal["uniform", "logit_normal", "shift"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 3.0


class Noising(Protocol):
    """Noise by a base's scheduler; tensors of timesteps are [B], fp32."""

    @property
    def kind(self) -> str:
        """Return `epsilon`, `v_prediction`, `sample` or `flow`: what the denoiser predicts."""

    def draw(self, count: int, generator: "torch.Generator", sampling: TimestepSampling) -> "Tensor":
        """Return `count` random timesteps."""

    def even(self, count: int) -> "Tensor":
        """Return `count` fixed timesteps: the middles of equal parts of the range, from little noise to much."""

    def add(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return latents [B, ...] with as much noise as the timesteps say, computed in fp32 or better."""

    def target(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return what the denoiser should predict, in the shape of the latents."""

    def weights(self, timesteps: "Tensor", min_snr_gamma: float | None) -> "Tensor":
        """Return the weight [B] of each loss: 1, or min-SNR (Hang et al. 2023, arXiv 2303.09556).

        With SNR = (a_t / b_t)^2 it is min(SNR, gamma) over SNR for noise, SNR + 1 for velocity, 1 for the sample.

        Raises:
            InputError: min-SNR is asked of flow matching, for which it is not defined.
        """


def prediction_of(scheduler: Mapping[str, Any]) -> str:
    """Return what a denoiser predicts by its scheduler's configuration: `epsilon`, `v_prediction`, `sample` or `flow`.

    Raises:
        BaseError: It is of a kind that is not served here.
    """
    name = str(scheduler.get("_class_name", ""))
    if name.startswith("FlowMatch") or scheduler.get("prediction_type") == "flow_prediction":
        return "flow"
    if name.startswith("EDM"):
        raise BaseError(f"The scheduler {name!r} noises in a way that is not served here; known are betas and flow.")
    prediction = str(scheduler.get("prediction_type") or "epsilon")
    if prediction not in _PREDICTIONS:
        raise BaseError(
            f"The scheduler {name!r} says prediction_type {prediction!r}; known are {', '.join(_PREDICTIONS)}."
        )
    return prediction


def noising_of(scheduler: Mapping[str, Any]) -> Noising:
    """Return the noising that a scheduler's configuration describes.

    Raises:
        BaseError: It is of a kind that is not served here.
    """
    return FlowMatching() if prediction_of(scheduler) == "flow" else StepwiseDiffusion(scheduler)


def _shares(count: int, generator: "torch.Generator", sampling: TimestepSampling) -> "Tensor":
    import torch

    if sampling.kind == "logit_normal":
        return torch.sigmoid(sampling.mean + sampling.std * torch.randn(count, generator=generator))
    drawn = torch.rand(count, generator=generator)
    if sampling.kind == "shift":
        return sampling.shift * drawn / (1 + (sampling.shift - 1) * drawn)
    return drawn


class StepwiseDiffusion:
    """DDPM's noise in T discrete steps.

    Args:
        scheduler: Configuration of any scheduler of diffusers that has betas; where it rescales them, so that the last
            step is nothing but noise (Lin et al. 2023, arXiv 2305.08891), so does this.
    """

    def __init__(self, scheduler: Mapping[str, Any]) -> None:
        from diffusers import DDPMScheduler

        known = {key: value for key, value in scheduler.items() if not key.startswith("_")}
        with quiet_diffusers():
            stock: Any = DDPMScheduler.from_config(known)
        self._kind = str(stock.config.prediction_type)
        signal: Tensor = stock.alphas_cumprod.double()
        self._signal = signal.sqrt()  # a_t, [T]
        self._noise = (1 - signal).sqrt()  # b_t, [T]

    @property
    def kind(self) -> str:
        """Return `epsilon`, `v_prediction` or `sample`."""
        return self._kind

    def draw(self, count: int, generator: "torch.Generator", sampling: TimestepSampling) -> "Tensor":
        """Return whole timesteps 0..T-1."""
        steps = len(self._signal)
        return (_shares(count, generator, sampling) * steps).floor().clamp(max=steps - 1)

    def even(self, count: int) -> "Tensor":
        """Return whole timesteps."""
        import torch

        return ((torch.arange(count) + 0.5) * len(self._signal) / count).floor()

    def add(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return a_t x_0 + b_t e."""
        signal, share = self._at(timesteps, latents)
        return signal * latents + share * noise

    def target(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return e, a_t e - b_t x_0, or x_0."""
        if self._kind == "epsilon":
            return noise
        if self._kind == "sample":
            return latents
        signal, share = self._at(timesteps, latents)
        return signal * noise - share * latents

    def weights(self, timesteps: "Tensor", min_snr_gamma: float | None) -> "Tensor":
        """Return 1, or min-SNR's weights; that of noise at SNR 0 is its limit, 1."""
        import torch

        if min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        at = timesteps.long().cpu()
        ratio = (self._signal[at] / self._noise[at]).square()
        capped = ratio.clamp(max=min_snr_gamma)
        if self._kind == "epsilon":
            capped = torch.where(ratio > 0, capped / ratio.clamp(min=torch.finfo(ratio.dtype).tiny), 1.0)
        elif self._kind == "v_prediction":
            capped = capped / (ratio + 1)
        return capped.to(timesteps.device, torch.float32)

    def _at(self, timesteps: "Tensor", like: "Tensor") -> "tuple[Tensor, Tensor]":
        shape = (-1, *[1] * (like.dim() - 1))
        at = timesteps.long().cpu()
        signal, noise = (table[at].to(like.device, like.dtype).reshape(shape) for table in (self._signal, self._noise))
        return signal, noise


class FlowMatching:
    """Straight paths from pictures to noise."""

    kind = "flow"

    def draw(self, count: int, generator: "torch.Generator", sampling: TimestepSampling) -> "Tensor":
        """Return timesteps 1000 s."""
        return _shares(count, generator, sampling) * 1000.0

    def even(self, count: int) -> "Tensor":
        """Return timesteps 1000 s."""
        import torch

        return (torch.arange(count) + 0.5) * (1000.0 / count)

    def add(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return (1 - s) x_0 + s e."""
        share = (timesteps / 1000.0).to(latents.device, latents.dtype).reshape(-1, *[1] * (latents.dim() - 1))
        return (1 - share) * latents + share * noise

    def target(self, latents: "Tensor", noise: "Tensor", timesteps: "Tensor") -> "Tensor":
        """Return e - x_0."""
        return noise - latents

    def weights(self, timesteps: "Tensor", min_snr_gamma: float | None) -> "Tensor":
        """Return ones."""
        import torch

        if min_snr_gamma is not None:
            raise InputError(
                f"min-SNR (gamma {min_snr_gamma:g}) weighs the losses of diffusion in steps; this base is trained by "
                "flow matching, so leave it out."
            )
        return torch.ones_like(timesteps, dtype=torch.float32)
