"""Writes a stored adapter in a format that is one file, alone or as a folder with its model card and text of credit.

A folder holds the signature too where the file is the one that was signed: written in the format it is kept in.
"""

from pathlib import Path

from haori.core.storage import staged_folder
from haori.library.contents import is_single_file
from haori.library.format_export import convert_stored
from haori.library.formats.peft import check_new_folder
from haori.library.model_cards.text import write_model_card
from haori.library.signing import carry_signature, copy_kept_files, signed_with
from haori.library.store import Library

__all__ = ["export_in_format"]

_ENDS = (".safetensors", ".gguf")
_NAMES = {"diffusers": "pytorch_lora_weights.safetensors"}  # the name that diffusers looks for


def export_in_format(
    name: str, out: Path, wanted: str, *, base_spec: str | None = None, library: Library | None = None
) -> Path:
    """Write an adapter of the library in the format `wanted`.

    Args:
        name: `support`, `support@2` or the first digits of an id.
        out: A new file that ends in .safetensors or .gguf; any other path is a new folder.
        wanted: Name of the format.
        base_spec: A base by name or path, for formats that need it.
        library: The library; by default the one of this machine.

    Raises:
        LibraryError: There is no such adapter.
        InputError: `out` exists, there is no such format, or it cannot represent the adapter.
        VerificationError: Read again, the file says something else, or the adapter is not what was signed.
    """
    if out.suffix.lower() in _ENDS:
        return convert_stored(name, out, wanted, base_spec=base_spec, library=library)
    stored = (library or Library()).get(name)
    check_new_folder(out)
    with staged_folder(out) as stage:
        is_kept = wanted == stored.card.format and stored.mounted is None and is_single_file(stored.path)
        if is_kept and signed_with(stored.path) is not None:  # under the names that were signed
            copy_kept_files(stored, stage)
            carry_signature(stored, stage)
        else:
            file = _NAMES.get(wanted) or stored.name.rpartition("/")[2].partition("@")[0] + _ENDS[wanted == "gguf"]
            convert_stored(name, stage / file, wanted, base_spec=base_spec, library=library)
        write_model_card(stored, stage)
    return out
