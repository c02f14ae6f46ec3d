"""Takes an adapter made elsewhere into the library: inspected, proved on its base, and only then stored.

PEFT folders are kept as they are, and so is the one file of an adapter for images. An adapter of a language model in
another format, such as GGUF, is converted into a PEFT folder, which is what everything that runs text adapters reads.
"""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import FileFormatError, InputError
from haori.core.records import AdapterCard
from haori.library.adapter_files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, inspect_adapter
from haori.library.adapter_names import check_no_base_name
from haori.library.attaching import check_base
from haori.library.cards import draft_card, read_card
from haori.library.families import reference_of
from haori.library.formats.bundled_words import EMBEDDINGS, embedding_files
from haori.library.formats.format import open_source
from haori.library.formats.peft_components import component_folders, is_of_pipeline
from haori.library.model_cards.reading import read_model_card
from haori.library.prompt_formats import prompt_format
from haori.library.proof.logits import default_probes
from haori.library.proof.verify import require_passed, verify_adapter
from haori.library.stated import Stated
from haori.library.store import Library, StoredAdapter, check_name
from haori.library.validation import validate_tensors

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library.updates import AdapterUpdates

__all__ = ["import_adapter"]


def import_adapter(
    path: Path,
    base: "Base | None" = None,
    *,
    name: str,
    library: Library | None = None,
    licence: str | None = None,
    description: str | None = None,
    dtype: str = "auto",
    stated: Stated | None = None,
) -> StoredAdapter:
    """Prove the adapter at `path` and store it with the origin `added`.

    Args:
        path: A folder as PEFT's save_pretrained writes it, of any PEFT method; or one file of another format, or a
            folder that holds one such file.
        base: The base it was made for. An adapter for images may be added without: the family of its base, told by its
            shapes, goes on record then, and nothing is compared with the base.
        name: Name in the library, without version.
        library: The library to add to; by default that of this machine.
        licence: The terms its author gives it (SPDX id or expression); by default those of its model card.
        description: What it is for.
        dtype: Dtype to prove a text adapter in.
        stated: What else is said of it, such as where it came from; it goes before what its folder and header say.

    Raises:
        FileFormatError: A file is missing, unsafe or damaged.
        MismatchError: It does not fit the base, or the folder holds a card that names another.
        VerificationError: It failed its proof; nothing is stored.
        InputError: It needs its base to be proved, and none is given.
        LibraryError: The name is not allowed.
    """
    from haori.library.formats.registry import format_named, format_of
    from haori.library.single_file import import_file

    check_name(name)
    stated = Stated(licence=licence, description=description).before(stated or Stated())
    if path.is_dir():
        said = read_model_card(path)
        stated = stated.before(Stated(licence=said.licence, tags=said.tags, stated_bases=said.bases))
    if component_folders(path) or any((path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)):
        return _import_peft(path, _needed(base, path), name=name, library=library, dtype=dtype, stated=stated)
    file = _only_file(path) if path.is_dir() else path
    validate_tensors(file)
    source = open_source(file, _configuration(base))
    updates = format_of(source).read(source)
    if embedding_files(source):
        return _import_joined(updates, base, name=name, library=library, stated=stated)
    if updates.components != ("model",):
        return import_file(file, updates, len(source.tensors), name=name, base=base, library=library, stated=stated)
    if updates.format == "peft":
        raise InputError(
            f"{str(path)!r} holds the tensors of a PEFT adapter alone; its scale is in {CONFIG_NAME}. Give the folder "
            "with both files."
        )
    of_text = _needed(base, path)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "adapter"
        format_named("peft").write(updates, converted, base_config=_configuration(base))
        return _import_peft(converted, of_text, name=name, library=library, dtype=dtype, stated=stated)


def _import_joined(
    updates: "AdapterUpdates", base: "Base | None", *, name: str, library: Library | None, stated: Stated
) -> StoredAdapter:
    """Store an adapter whose new words came in files beside it as one file, in the format that holds them too."""
    from haori.library.formats.registry import format_named
    from haori.library.single_file import import_file

    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / f"{name}.safetensors"
        kohya = format_named("kohya")
        kohya.write(updates, joined)
        source = open_source(joined)
        return import_file(
            joined, kohya.read(source), len(source.tensors), name=name, base=base, library=library, stated=stated
        )


def _import_peft(
    folder: Path, base: "Base", *, name: str, library: Library | None, dtype: str, stated: Stated
) -> StoredAdapter:
    from haori.bases import load_tokenizer
    from haori.data import template_hash

    check_no_base_name(name, base.name)
    for part in component_folders(folder).values() or (folder,):
        validate_tensors(inspect_adapter(part).weights)
    if base.pipeline is not None:
        return _import_pictures(folder, base, name=name, library=library, dtype=dtype, stated=stated)
    card: AdapterCard | None = read_card(folder)
    if card is not None:
        check_base(card, base.reference())
    tokenizer = load_tokenizer(base)
    verification = verify_adapter(base, folder, probes=default_probes(tokenizer), dtype=dtype)
    require_passed(verification)
    drafted = draft_card(
        folder,
        base.reference(),
        origin="added",
        verification=verification,
        template_hash=template_hash(prompt_format(tokenizer, folder, None).tokenizer),
        **stated.card_fields(),
    )
    return (library or Library()).add(folder, name, drafted)


def _import_pictures(
    folder: Path, base: "Base", *, name: str, library: Library | None, dtype: str, stated: Stated
) -> StoredAdapter:
    """Prove and store a PEFT folder over a pipeline, of one of its components, or a folder with one for each."""
    if component_folders(folder) or not is_of_pipeline(inspect_adapter(folder).config):
        with tempfile.TemporaryDirectory() as place:
            converted = _as_one_folder(folder, Path(place) / "adapter")
            return _import_pictures(converted, base, name=name, library=library, dtype=dtype, stated=stated)
    card = read_card(folder)
    if card is not None:
        check_base(card, base.reference())
    verification = verify_adapter(base, folder, dtype=dtype)
    require_passed(verification)
    drafted = draft_card(folder, reference_of(base), origin="added", verification=verification, **stated.card_fields())
    return (library or Library()).add(folder, name, drafted)


def _as_one_folder(path: Path, out: Path) -> Path:
    """Write PEFT folders of a pipeline's components as one over the pipeline."""
    from haori.library.formats.format import Source
    from haori.library.formats.peft_reading import read_peft
    from haori.library.formats.peft_writing import write_pipeline_peft

    write_pipeline_peft(read_peft(Source(path)), out)
    return out


def _needed(base: "Base | None", path: Path) -> "Base":
    if base is None:
        raise InputError(f"The adapter in {str(path)!r} is proved on the base it was made for: name that with --base.")
    return base


def _only_file(folder: Path) -> Path:
    """Return the one weight file in a folder that is no PEFT folder, such as that of a diffusers adapter.

    The files of its new words, which its header names, go with it.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", ".gguf"} and path.is_file())
    if len(found) > 1:
        sources = [open_source(path) for path in found]
        words = {
            file for source in sources if EMBEDDINGS in source.metadata for file in embedding_files(source).values()
        }
        found = [path for path in found if path not in words]
    if len(found) == 1:
        return found[0]
    if not found:
        inspect_adapter(folder)  # says what is missing
    raise FileFormatError(
        f"{str(folder)!r} holds {len(found)} weight files ({', '.join(repr(path.name) for path in found[:5])}); give "
        "one of them."
    )


def _configuration(base: "Base | None") -> dict[str, Any] | None:
    """Return the config.json of a base of one model."""
    if base is None or not (base.path / "config.json").is_file():
        return None
    found: dict[str, Any] = json.loads((base.path / "config.json").read_bytes())
    return found
