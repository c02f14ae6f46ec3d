"""What the header of an adapter's file says of its training, in the terms of sd-scripts (`ss_*`).

Everything is taken from the adapter's card: its run, its recipe with every value resolved, its data. What a card does
not know is left out. Facts without a key of sd-scripts have one that begins with `haori_`.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.core.records import AdapterCard

__all__ = ["training_metadata", "usage_hint"]

# Key of sd-scripts, section and key of the recipe.
_OF_RECIPE: tuple[tuple[str, str, str], ...] = (
    ("ss_learning_rate", "optimizer", "lr"),
    ("ss_lr_scheduler", "schedule", "kind"),
    ("ss_max_grad_norm", "optimizer", "max_grad_norm"),
    ("ss_mixed_precision", "training", "dtype"),
    ("ss_num_epochs", "training", "epochs"),
    ("ss_gradient_checkpointing", "training", "gradient_checkpointing"),
    ("ss_min_snr_gamma", "noise", "min_snr_gamma"),
    ("ss_noise_offset", "noise", "offset"),
    ("ss_caption_dropout_rate", "data", "caption_dropout"),
    ("ss_shuffle_caption", "data", "shuffle_caption"),
    ("ss_keep_tokens", "data", "keep_tokens"),
    ("ss_flip_aug", "data", "flip"),
    ("ss_color_aug", "data", "colour"),
    ("ss_prior_loss_weight", "data", "prior_weight"),
    ("ss_total_batch_size", "training", "batch_size"),
    ("ss_batch_size_per_device", "training", "micro_batch_size"),
)
_NAMES_OF_BASE = ("ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash")
_PICTURES = "text_to_image"
_OPTIMIZER = "torch.optim.adamw.AdamW"


def training_metadata(card: "AdapterCard") -> dict[str, str]:
    """Return what the card of an adapter says of how it was trained, as header strings."""
    found: dict[str, Any] = {"ss_seed": card.seed, **_of_base(card)}
    if card.base.components:
        held = card.base.components
        prints = {name: held[name].weights for name in card.components if name in held}
        found["haori_base"] = json.dumps({"name": card.base.name, "weights": prints}, sort_keys=True)
    if card.recommended_strength is not None:
        found["haori_recommended_strength"] = f"{card.recommended_strength:g}"
    if (run := card.run) is not None:
        found |= {
            "ss_steps": run.steps,
            "ss_epoch": round(run.epochs) or None,
            "ss_training_started_at": _seconds(run.started),
            "ss_training_finished_at": _seconds(run.ended),
        }
    found |= _of_recipe(card)
    if card.description:
        found["ss_training_comment"] = card.description
    return {key: str(value) for key, value in found.items() if value is not None}


def _of_base(card: "AdapterCard") -> dict[str, Any]:
    """Return what names the base; a file that came with names of its own keeps them all, which belong together."""
    if any(card.file_metadata.get(key) for key in _NAMES_OF_BASE):
        return {}
    checkpoint = card.base.checkpoint
    return {
        "ss_sd_model_name": card.base.name,
        "ss_sd_model_hash": checkpoint and checkpoint.autov1,
        "ss_new_sd_model_hash": checkpoint and checkpoint.sha256,
        "ss_zero_terminal_snr": card.base.zero_terminal_snr,
    }


def usage_hint(card: "AdapterCard") -> str | None:
    """Return how the adapter is used, for ModelSpec's `usage_hint`."""
    if card.recommended_strength is None:
        return None
    words = f" with {', '.join(card.trigger_words)} in the prompt" if card.trigger_words else ""
    return f"Use it at strength {card.recommended_strength:g}{words}."


def _of_recipe(card: "AdapterCard") -> dict[str, Any]:
    recipe = card.recipe_data or {}

    def value(section: str, key: str) -> Any:
        held = recipe.get(section)
        return held.get(key) if isinstance(held, Mapping) else None

    found = {key: value(section, own) for key, section, own in _OF_RECIPE}
    if card.task != _PICTURES or not recipe:
        return found
    lr = value("optimizer", "lr")
    text_lr = value("optimizer", "text_encoder_lr") if value("training", "text_encoder") else None
    decay = value("optimizer", "weight_decay")
    found |= {
        "ss_unet_lr": lr,
        "ss_text_encoder_lr": text_lr,
        "ss_optimizer": _OPTIMIZER if decay is None else f"{_OPTIMIZER}(weight_decay={decay:g})",
        "ss_random_crop": value("data", "crop") == "random",
        "ss_enable_bucket": value("data", "buckets"),
    }
    if isinstance(side := value("data", "resolution"), int):
        found["ss_resolution"] = f"({side}, {side})"
    if card.data and "train" in card.data[0].rows:
        found["ss_num_train_images"] = card.data[0].rows["train"]
    return found


def _seconds(time: str | None) -> float | None:
    try:
        return datetime.fromisoformat(time).timestamp() if time else None
    except ValueError:
        return None
