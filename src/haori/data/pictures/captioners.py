"""Models that say what a picture shows: image-text models of transformers as sentences, classifiers as tags.

Loaded from a folder or the hub, safetensors only, and never with code of their own. Knows nothing about datasets.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from haori.core.errors import InputError
from haori.core.settings import settings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Captioner", "SentenceCaptioner", "TagCaptioner", "open_captioner"]

_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)
_CHAT_PROMPT = "Describe the picture in one plain sentence."


class Captioner(Protocol):
    """What says a caption."""

    def caption(self, image: "Image") -> str:
        """Return a caption of an RGB picture, on one line; it may be empty."""


class SentenceCaptioner:
    """An image-text model that writes a sentence, each word the likeliest.

    Args:
        model: On its device.
        processor: Of the model.
        prompt: What it is asked, or what its captions begin with, by the model's kind; None for its usual.
        max_tokens: Longest caption.
    """

    def __init__(self, model: Any, processor: Any, prompt: str | None, max_tokens: int) -> None:
        self._model, self._processor, self._prompt, self._max_tokens = model, processor, prompt, max_tokens

    def caption(self, image: "Image") -> str:
        """Return the sentence."""
        import torch

        inputs, asked = self._inputs(image)
        inputs = inputs.to(self._model.device)
        with torch.inference_mode():
            ids = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False, num_beams=1)
        if asked:
            ids = ids[:, inputs["input_ids"].shape[1] :]  # an answer; the question is no part of it
        text: str = self._processor.batch_decode(ids, skip_special_tokens=True)[0]
        return " ".join(text.split())

    def _inputs(self, image: "Image") -> tuple[Any, bool]:
        """Return what the model reads, and whether it is a question to be answered."""
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": self._prompt or _CHAT_PROMPT}]
            turns = [{"role": "user", "content": content}]
            read = self._processor.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            return read, True
        if self._prompt is None:
            return self._processor(images=image, return_tensors="pt"), False
        read = self._processor(images=image, text=self._prompt, return_tensors="pt")
        read.pop("token_type_ids", None)
        if self._model.config.model_type == "git":  # it goes on from the words, so nothing may end them
            read["input_ids"], read["attention_mask"] = read["input_ids"][:, :-1], read["attention_mask"][:, :-1]
        return read, False


class TagCaptioner:
    """A classifier whose likely labels are tags, the likeliest first.

    Args:
        model: On its device. One for several labels gives each a probability; one for a single label shares them out.
        processor: Of the model.
        threshold: Least probability of a tag.
    """

    def __init__(self, model: Any, processor: Any, threshold: float) -> None:
        self._model, self._processor, self._threshold = model, processor, threshold

    def caption(self, image: "Image") -> str:
        """Return the tags with commas between them, underscores as spaces."""
        import torch

        inputs = self._processor(images=image, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits[0].float()  # [labels]
        several = self._model.config.problem_type == "multi_label_classification"
        shares = logits.sigmoid() if several else logits.softmax(0)
        likely = [int(label) for label in shares.argsort(descending=True) if float(shares[label]) >= self._threshold]
        return ", ".join(_words(self._model.config.id2label[label]) for label in likely)


def _words(label: str) -> str:
    return " ".join(label.replace("_", " ").split())


def open_captioner(name: str, *, prompt: str | None, max_tokens: int, threshold: float, device: str) -> Captioner:
    """Load a model that captions.

    Args:
        name: Folder or hub id.
        prompt: For models that write sentences.
        max_tokens: Longest sentence.
        threshold: Least probability of a tag, for classifiers.
        device: Where it runs.

    Raises:
        InputError: It cannot be loaded, is of another kind, or lacks weights.
    """
    import transformers

    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return _opened(name, prompt, max_tokens, threshold, device)
    except InputError:
        raise
    except _LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"The captioning model {name!r} cannot be loaded: {first}.") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _opened(name: str, prompt: str | None, max_tokens: int, threshold: float, device: str) -> Captioner:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    safe: dict[str, Any] = {"local_files_only": settings().offline, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(name, **safe)
    architectures: Sequence[str] = config.architectures or ()
    if any(kind.endswith("ForImageClassification") for kind in architectures):
        if prompt is not None:
            raise InputError(f"{name!r} gives tags and takes no prompt; leave --prompt out.")
        model = _weights(AutoModelForImageClassification, name, safe, device)
        return TagCaptioner(model, AutoImageProcessor.from_pretrained(name, **safe), threshold)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise InputError(
            f"{name!r} is {', '.join(architectures) or config.model_type}; captions need an image-text model, such as "
            "BLIP, GIT or Qwen-VL, or an image classifier whose labels are tags."
        )
    model = _weights(AutoModelForImageTextToText, name, safe, device)
    return SentenceCaptioner(model, AutoProcessor.from_pretrained(name, **safe), prompt, max_tokens)


def _weights(kind: Any, name: str, safe: dict[str, Any], device: str) -> Any:
    """Load a model, and refuse one whose weights are not all there: what is made up would caption at random."""
    model, found = kind.from_pretrained(name, use_safetensors=True, output_loading_info=True, **safe)
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"The captioning model {name!r} lacks weights, such as {missing[0]!r}; fetch it again.")
    return model.to(device).eval()
