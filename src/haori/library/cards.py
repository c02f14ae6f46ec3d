"""The card of an adapter: drafting it from files, its content id, reading it back.

The id is a hash of the weight file's bytes, of the configuration that changes what the adapter computes, and of the
names of a classifier's labels and of new words. Left out of it are the fields that only say where things were or which
program wrote them, so that the same adapter keeps its id when a folder is moved, exported or saved again by a newer
PEFT.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from haori.core.errors import LibraryError
from haori.core.hashing import hash_data, hash_file
from haori.core.records import MODEL_COMPONENT, AdapterCard, BaseReference, now
from haori.library.adapter_components import changed_components
from haori.library.adapter_files import AdapterFiles, inspect_adapter
from haori.library.formats.peft_components import is_of_pipeline
from haori.library.head_files import stock_head
from haori.library.licences.verdict import effective_licence

__all__ = ["CARD_NAME", "adapter_id", "draft_card", "id_on_base", "is_id_of", "read_card"]

CARD_NAME = "card.json"
_CARD_LIMIT_BYTES = 32 << 20
_VOLATILE = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}
)
# PEFT keeps these as sets; their order in the file is accidental.
_SETS = frozenset({"target_modules", "exclude_modules", "modules_to_save", "target_parameters"})
_ALPHAS = frozenset({"lora_alpha", "alpha"})  # an alpha of zero is not the default
_PACKAGES = ("haori", "torch", "transformers", "peft")


def adapter_id(files: AdapterFiles) -> str:
    """Return the content id of an adapter as `sha256:<hex>`."""
    return _id(files, {field: list(files.config[field].items()) for field in files.ordered_patterns})


def is_id_of(identity: str, files: AdapterFiles, base: BaseReference) -> bool:
    """Say whether an adapter with these files, made for `base`, may be stored under an id.

    Haori 0.1 left the order of patterns out of it.
    """
    found = (adapter_id(files), _id(files, {}))
    return identity in found or identity in [id_on_base(plain, base) for plain in found]


def _id(files: AdapterFiles, ordered: dict[str, Any]) -> str:
    config: dict[str, Any] = {}
    for key, value in files.config.items():
        # A field at its empty value is the same as one that an older PEFT did not know.
        if key in _VOLATILE or (value in (None, False, [], {}) and not (key in _ALPHAS and value is not None)):
            continue
        config[key] = sorted(value, key=str) if key in _SETS and isinstance(value, list) else value
    named = files.head != stock_head(files.folder, files.config, files.tensors)
    labels = [files.head.model_dump(mode="json")] if files.head is not None and named else []
    words = [files.words.model_dump(mode="json")] if files.words is not None else []
    return hash_data([hash_file(files.weights), {**config, **ordered}, *labels, *words])


def id_on_base(identity: str, base: BaseReference) -> str:
    """Return the id of an adapter whose files are in the library as made for another base."""
    of = base.components
    if list(of) == [MODEL_COMPONENT]:
        return hash_data([identity, base.fingerprint.structure, base.fingerprint.weights])
    return hash_data([identity, *([name, of[name].structure, of[name].weights] for name in sorted(of))])


def draft_card(
    folder: Path, base: BaseReference, *, origin: Literal["trained", "added", "combined"], **fields: Any
) -> AdapterCard:
    """Build the card of the adapter in `folder`: what its files say, and the given fields.

    Args:
        folder: A PEFT folder.
        base: The base it belongs to.
        origin: `trained` here, `combined` from others here, or `added` from elsewhere.
        fields: Any other field of `AdapterCard` (data, recipe, run, verification, template_hash, seed, ...). Where no
            licence is given for a trained adapter, the effective licence of base, data and parents is entered.

    Raises:
        FileFormatError: The adapter's files are unusable.
    """
    files = inspect_adapter(folder)
    fields.setdefault("versions", _foreign_versions(files) if origin == "added" else _versions())
    fields.setdefault("created", now())
    fields.setdefault("head", files.head)
    task = "causal_lm" if files.head is None else "classification"
    fields.setdefault("task", "text_to_image" if is_of_pipeline(files.config) else task)
    fields.setdefault("components", changed_components(base.components, files))
    card = AdapterCard(
        id=adapter_id(files),
        origin=origin,
        base=base,
        method=files.method,
        rank=files.rank,
        alpha=files.alpha,
        target_modules=files.target_modules,
        trainable_parameters=files.parameters,
        size_bytes=files.size_bytes,
        **fields,
    )
    if card.licence is None and origin == "trained":
        card = card.with_fields(licence=effective_licence(card).expression)
    return card


def read_card(folder: Path) -> AdapterCard | None:
    """Read the card kept in an adapter's folder; None if there is none.

    Raises:
        LibraryError: The card is damaged.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.read(_CARD_LIMIT_BYTES)
    try:
        return AdapterCard.model_validate_json(text)
    except ValidationError as error:
        if any(
            problem["type"] == "extra_forbidden" or problem["loc"] == ("schema_version",) for problem in error.errors()
        ):
            raise LibraryError(
                f"The card {str(path)!r} was written by a newer Haori and cannot be read by this one; upgrade Haori."
            ) from None
        raise LibraryError(
            f"The card {str(path)!r} is damaged and cannot be read; restore it or remove its folder, then run "
            "`haori library rebuild`."
        ) from None


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _foreign_versions(files: AdapterFiles) -> dict[str, str]:
    written_by = files.config.get("peft_version")
    return {"peft": written_by} if isinstance(written_by, str) else {}
