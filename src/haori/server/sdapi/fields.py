"""The fields of `/sdapi/v1/txt2img` and `/img2img`, and the order for pictures that they come to.

What is left out is as for `haori generate`: the base's own size and sampler, 25 steps.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from haori.core.errors import InputError
from haori.images.request import Hires
from haori.images.samplers import AUTOMATIC, resolve_sampler
from haori.server.errors import ApiError
from haori.server.pictures.body import PictureBody

__all__ = ["Img2ImgFields", "SharedFields", "Txt2ImgFields"]

_ANCESTRAL = ("Euler a", "DPM2 a", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE", "LCM")
_NOTHING_SAVED = "nothing is ever saved on the server"
_SAME = ("Use same checkpoint", "Use same sampler", "Use same scheduler")


class SharedFields(PictureBody):
    """What txt2img and img2img share."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "styles": (), "subseed_strength": (0,), "seed_resize_from_h": (-1, 0), "seed_resize_from_w": (-1, 0),
        "restore_faces": (), "tiling": (), "s_min_uncond": (0,), "s_churn": (0,), "s_tmax": (0,), "s_tmin": (0,),
        "s_noise": (1,), "refiner_checkpoint": (), "disable_extra_networks": (), "comments": (), "infotext": (),
        "script_name": (), "script_args": (), "save_images": (), "controlnet_units": (),
    }  # fmt: skip
    without_effect: ClassVar[Mapping[str, str]] = {
        "do_not_save_samples": _NOTHING_SAVED, "do_not_save_grid": _NOTHING_SAVED,
        "override_settings_restore_afterwards": "no setting is changed for others",
        "subseed": "it counts with subseed_strength", "force_task_id": "tasks are not asked for by id",
        "refiner_switch_at": "there is no refiner",
    }  # fmt: skip

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: int = Field(default=1, ge=1, le=1000)
    n_iter: int = Field(default=1, ge=1, le=1000)
    steps: int = 25
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    denoising_strength: float = 0.75
    override_settings: dict[str, Any] = Field(default_factory=dict)
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)
    send_images: bool = True
    strict: bool | None = None

    def settings(self, seed: int) -> dict[str, Any]:
        """Return what the fields say of each picture, as fields of `PictureRequest`.

        Args:
            seed: Of the first picture.

        Raises:
            ApiError: A field asks for what is not served.
        """
        self._check_scripts()
        sampler = self.sampler_name or self.sampler_index
        found: dict[str, Any] = {
            "prompt": self.prompt, "negative": self.negative_prompt, "seed": seed, "steps": self.steps,
            "guidance": self.cfg_scale, "width": self.width, "height": self.height, "sampler": sampler,
        }  # fmt: skip
        if self.scheduler is not None and self.scheduler.lower() != AUTOMATIC.lower():
            found["schedule"] = self.scheduler
        return found

    def eta_warning(self) -> str | None:
        """Return what is to be said of `eta`, the samplers' share of fresh noise.

        Raises:
            ApiError: It is none that the sampler is drawn with.
        """
        if self.eta is None or not (self.sampler_name or self.sampler_index):
            return None
        sampler, _ = resolve_sampler(self.sampler_name or self.sampler_index or "", self.scheduler or AUTOMATIC)
        own = 1.0 if sampler in _ANCESTRAL else 0.0
        if self.eta not in (0.0, 1.0) or (self.eta == 0.0 and own):
            message = f"'eta' cannot be {self.eta:g}: the sampler {sampler!r} is drawn with {own:g}; leave it out."
            raise ApiError(400, message, param="eta", code="unsupported_field")
        if sampler == "DDIM" and self.eta:
            return "'eta' 1 was not used: DDIM is drawn without fresh noise (eta 0)."
        return None

    def _check_scripts(self) -> None:
        for name, given in self.alwayson_scripts.items():
            arguments = given.get("args") if isinstance(given, dict) else given
            # As clients write it: an extension that is there and switched off.
            if arguments not in ([], None, [False]):
                message = f"There is no script {name[:100]!r} on this server; take it out of 'alwayson_scripts'."
                raise ApiError(400, message, param="alwayson_scripts", code="unsupported_field")


class Txt2ImgFields(SharedFields):
    """What txt2img takes."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SharedFields.unserved, "firstphase_width": (0,), "firstphase_height": (0,), "firstpass_image": (),
        "hr_checkpoint_name": _SAME,
    }  # fmt: skip

    denoising_strength: float = 0.7
    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_upscaler: str = "Lanczos"
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str = ""
    hr_negative_prompt: str = ""

    def hires(self) -> Hires | None:
        """Return the second pass that is asked for.

        Raises:
            ApiError: It is to differ from the first in what it cannot.
            InputError: A number is out of its range, or there is no such upscaler.
        """
        if not self.enable_hr:
            return None
        for name, given, first in (
            ("hr_prompt", self.hr_prompt, self.prompt),
            ("hr_negative_prompt", self.hr_negative_prompt, self.negative_prompt),
            ("hr_sampler_name", self.hr_sampler_name, self.sampler_name or self.sampler_index),
            ("hr_scheduler", self.hr_scheduler, self.scheduler),
        ):
            if given and given not in _SAME and given != first:
                message = f"{name!r} cannot differ from the first pass here; leave it out."
                raise ApiError(400, message, param=name, code="unsupported_field")
        upscaler = "Lanczos" if self.hr_upscaler == "None" else self.hr_upscaler
        return Hires(self._scale(), self.hr_second_pass_steps or None, self.denoising_strength, upscaler)

    def _scale(self) -> float:
        if not self.hr_resize_x and not self.hr_resize_y:
            return self.hr_scale
        if not self.width or not self.height:
            raise InputError(
                "'hr_resize_x' and 'hr_resize_y' need 'width' and 'height' beside them; or give 'hr_scale'."
            )
        scale = self.hr_resize_x / self.width if self.hr_resize_x else self.hr_resize_y / self.height
        wanted = (self.hr_resize_x or round(self.width * scale), self.hr_resize_y or round(self.height * scale))
        if wanted != (round(self.width * scale), round(self.height * scale)):
            raise InputError(
                f"A picture of {self.width} x {self.height} cannot become {wanted[0]} x {wanted[1]}: both sides "
                "grow by one factor; give 'hr_scale'."
            )
        return scale


class Img2ImgFields(SharedFields):
    """What img2img takes."""

    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SharedFields.unserved, "initial_noise_multiplier": (1,), "latent_mask": (),
    }  # fmt: skip
    without_effect: ClassVar[Mapping[str, str]] = {
        **SharedFields.without_effect, "image_cfg_scale": "it is for bases that edit by instruction",
    }  # fmt: skip

    init_images: list[str] = Field(default=[], max_length=64)
    mask: str | None = None
    resize_mode: int = 0
    mask_blur: float | None = Field(default=None, ge=0.0, le=64.0)
    mask_blur_x: float = Field(default=4.0, ge=0.0, le=64.0)
    mask_blur_y: float = Field(default=4.0, ge=0.0, le=64.0)
    mask_round: bool = True
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = Field(default=0, ge=0, le=4096)
    inpainting_mask_invert: int = Field(default=0, ge=0, le=1)
    include_init_images: bool = False
