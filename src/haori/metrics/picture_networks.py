"""Networks by which pictures are compared: the one that is always at hand, or one of transformers by folder or hub id.

Figures of two networks do not compare, so each says its name. Loaded from safetensors only, and never with code of
their own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from haori.core.errors import InputError
from haori.core.settings import settings
from haori.metrics.picture_features import PictureFeatures, Seen

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["PictureNetwork", "TransformersNetwork", "load_network"]

_BATCH = 16
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)


class PictureNetwork(Protocol):
    """What looks at pictures."""

    @property
    def name(self) -> str:
        """Return what results call it."""

    @property
    def reads_text(self) -> bool:
        """Say whether it tells how well a text fits a picture."""

    def see(self, pictures: "Sequence[Image]", texts: Sequence[str] | None = None) -> Seen:
        """Look at pictures, and with `texts`, one for each, at how well they fit."""


class TransformersNetwork:
    """A model of transformers that sees pictures: CLIP and its like, DINOv2, ResNet.

    Features are the embedding that CLIP compares with text, or else the pooled output.

    Args:
        model: In evaluation mode.
        processor: Makes pixels of pictures, and ids of texts where the model reads them.
        name: What results call it.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self._model, self._processor, self.name = model, processor, name
        self.reads_text = hasattr(model, "get_text_features")

    def see(self, pictures: "Sequence[Image]", texts: Sequence[str] | None = None) -> Seen:
        """Return the features, and with `texts` the cosines of a network that reads text."""
        import torch

        features, likeness = [], []
        with torch.inference_mode():
            for start in range(0, len(pictures), _BATCH):
                found = self._features([picture.convert("RGB") for picture in pictures[start : start + _BATCH]])
                features.append(found.numpy())
                if texts is not None and self.reads_text:
                    said = self._texts(list(texts[start : start + _BATCH]))
                    likeness.append(torch.nn.functional.cosine_similarity(found, said).numpy())
        return Seen(np.concatenate(features), None, np.concatenate(likeness) if likeness else None)

    def _features(self, pictures: "list[Image]") -> "Tensor":
        pixels = self._processor(images=pictures, return_tensors="pt")["pixel_values"].to(self._model.device)
        look = self._model.get_image_features if self.reads_text else self._model
        found: Tensor = look(pixel_values=pixels).pooler_output.flatten(1).double().cpu()
        return found

    def _texts(self, texts: list[str]) -> "Tensor":
        read = self._processor(text=texts, return_tensors="pt", padding="max_length", truncation=True)
        given = {name: read[name].to(self._model.device) for name in ("input_ids", "attention_mask") if name in read}
        found: Tensor = self._model.get_text_features(**given).pooler_output.double().cpu()
        return found


def load_network(spec: str | None = None) -> PictureNetwork:
    """Load what looks at pictures.

    Args:
        spec: Folder or hub id of a model of transformers; None takes EfficientNet-Lite0.

    Raises:
        InputError: It cannot be loaded, gives no features of pictures, or lacks weights.
        DownloadError: EfficientNet-Lite0 is not here and cannot be fetched.
    """
    if spec is None:
        return PictureFeatures.load()
    import transformers

    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return _opened(spec)
    except InputError:
        raise
    except _LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"The network {spec!r} that is to look at pictures cannot be loaded: {first}.") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _fetched(spec: str) -> str:
    """Return the folder of a model; one of the hub is fetched into its cache, weights as safetensors alone."""
    if Path(spec).is_dir():
        return spec
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "model*.safetensors"]
    return str(snapshot_download(spec, allow_patterns=patterns, local_files_only=settings().offline))


def _opened(spec: str) -> TransformersNetwork:
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor

    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = _fetched(spec)
    model, found = AutoModel.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **safe
    )
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"The network {spec!r} lacks weights, such as {missing[0]!r}; give another one.")
    reads = hasattr(model, "get_text_features")
    if getattr(model, "main_input_name", "") != "pixel_values" and not reads:
        raise InputError(
            f"{spec!r} is {type(model).__name__}, which does not see pictures; give one that does, such as CLIP or "
            "DINOv2."
        )
    processor = (AutoProcessor if reads else AutoImageProcessor).from_pretrained(folder, **safe)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    network = TransformersNetwork(model, processor, spec.rstrip("/").split("/")[-1])
    network.see([Image.new("RGB", (64, 64))])  # one without pooled output fails here, not after the drawing
    return network
