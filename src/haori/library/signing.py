"""Signs adapters with a key of their maker, and tells whether one is still what was signed.

What is signed is the folder as `export` writes it: weights, configuration and all that stands beside them, and
`provenance.json`, the part of the card that never changes (base, data, parents, licence, recipe by its hash). Names,
descriptions, evaluations and proofs come and go, so they are outside, and with them the model card and the text of
credit, which are written from the card at every export.

The signature is a Sigstore bundle of the OpenSSF Model Signing specification 1.0, made by the package `model-signing`
with an elliptic-curve key (P-256, P-384 or P-521), so that its own command verifies an exported folder too.
"""

import base64
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import InputError, LibraryError, MissingExtraError, VerificationError
from haori.core.hashing import hash_data
from haori.core.records import AdapterCard
from haori.core.storage import write_text
from haori.data.seen import SEEN_NAME
from haori.library.adapter_files import WEIGHTS_NAME
from haori.library.cards import CARD_NAME
from haori.library.formats.peft import export_peft
from haori.library.licences.attribution import public_card
from haori.library.model_cards.fields import ATTRIBUTION_NAME
from haori.library.model_cards.text import MODEL_CARD_NAME

if TYPE_CHECKING:
    from haori.library.store import StoredAdapter

__all__ = [
    "RECORD_NAME",
    "SIGNATURE_NAME",
    "carry_signature",
    "copy_kept_files",
    "is_key_encrypted",
    "sign_stored",
    "signed_with",
    "verify_signed_folder",
    "verify_stored_signature",
]

SIGNATURE_NAME = "model.sig"
RECORD_NAME = "provenance.json"

_UNSIGNED = (SIGNATURE_NAME, MODEL_CARD_NAME, ATTRIBUTION_NAME)
_OF_GIT = (".git", ".gitattributes", ".github", ".gitignore")  # what the package passes over too
_KEPT_HERE = frozenset({CARD_NAME, SEEN_NAME, *_UNSIGNED})  # in the library's folder and in no signature
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
_RECORD = (
    "schema_version", "id", "origin", "created", "base", "components", "task", "head", "method", "rank", "alpha",
    "target_modules", "trainable_parameters", "data", "template_hash", "licence", "versions", "seed", "parents",
    "format", "trigger_words", "combination", "file_hashes", "downloaded_from", "permissions",
)  # fmt: skip
_SIGNATURE_LIMIT_BYTES = 16 << 20


def sign_stored(stored: "StoredAdapter", key: Path, *, password: bytes | None = None) -> None:
    """Sign a stored adapter; a signature that it has is replaced.

    Args:
        stored: The adapter.
        key: Private key, as PEM.
        password: Of the key, if it is encrypted.

    Raises:
        InputError: The key cannot be used.
        LibraryError: The stored files are damaged, or there are files that no export would hold.
        MissingExtraError: The package is not installed.
    """
    signing, hashing, _ = _package()
    _read_key(key, password)
    with _signed_form(stored) as folder:
        if strange := _strange_files(stored.path, folder):
            raise LibraryError(f"{strange}; remove it before {stored.name!r} is signed.")
        written = folder.parent / SIGNATURE_NAME
        # The package hands the password on to `cryptography`, which takes bytes.
        signer = signing.Config().use_elliptic_key_signer(private_key=key, password=password)
        signer.set_hashing_config(_hashing(hashing)).sign(folder, written)
        write_text(stored.path / SIGNATURE_NAME, written.read_text(encoding="utf-8"))


def verify_stored_signature(stored: "StoredAdapter", public_key: Path) -> None:
    """Check that a stored adapter is what was signed with the private key of `public_key`.

    Raises:
        VerificationError: It is not signed, was changed, or was signed with another key.
        InputError: The key cannot be used.
        MissingExtraError: The package is not installed.
    """
    signature = stored.path / SIGNATURE_NAME
    _require_signature(signature, stored.name)
    with _signed_form(stored) as folder:
        if strange := _strange_files(stored.path, folder):
            raise VerificationError(f"The adapter {stored.name!r} is not what was signed: {strange}.")
        _verify(folder, signature, public_key, stored.name)


def verify_signed_folder(folder: Path, public_key: Path) -> None:
    """Check that an exported folder is what was signed with the private key of `public_key`.

    Raises:
        VerificationError: It is not signed, was changed, or was signed with another key.
        InputError: The key cannot be used.
        MissingExtraError: The package is not installed.
    """
    _require_signature(folder / SIGNATURE_NAME, str(folder))
    _verify(folder, folder / SIGNATURE_NAME, public_key, str(folder))


def carry_signature(stored: "StoredAdapter", written: Path) -> None:
    """Put the signature of a stored adapter, if it has one, into the folder that it was exported to.

    Raises:
        VerificationError: The adapter is not what was signed.
    """
    signature = stored.path / SIGNATURE_NAME
    if not signature.is_file():
        return
    write_text(written / RECORD_NAME, _record(stored.card))
    if found := _changes(written, signature):
        raise VerificationError(
            f"The adapter {stored.name!r} was not exported: it is not what was signed ({found}). Sign it again with "
            f"`haori library sign`, or delete {str(signature)!r}."
        )
    shutil.copyfile(signature, written / SIGNATURE_NAME)


def copy_kept_files(stored: "StoredAdapter", folder: Path) -> None:
    """Copy the files of an adapter that is kept as the file it came as, without what the library keeps of it."""
    for path in stored.path.iterdir():
        if path.is_file() and path.name not in _KEPT_HERE:
            shutil.copyfile(path, folder / path.name)


def signed_with(folder: Path) -> str | None:
    """Return the first digits of the SHA-256 of the public key that a signature names; nothing of it is verified."""
    if not (folder / SIGNATURE_NAME).is_file():
        return None
    bundle = _bundle(folder / SIGNATURE_NAME)
    hint = bundle.get("verificationMaterial", {}).get("publicKey", {}).get("hint")
    return str(hint)[:12] if hint else "unknown"


def is_key_encrypted(key: Path) -> bool:
    """Say whether a private key asks for a password."""
    return key.is_file() and b"ENCRYPTED" in key.read_bytes()[:4096]


@contextmanager
def _signed_form(stored: "StoredAdapter") -> Iterator[Path]:
    """Yield a temporary folder that holds what a signature covers."""
    if stored.mounted is not None:
        raise InputError(
            f"{stored.name!r} lies in a mounted tree, where nothing is changed; add it to the library to sign it."
        )
    with tempfile.TemporaryDirectory(prefix="haori-signing-") as place:
        folder = Path(place) / "adapter"
        if (stored.path / WEIGHTS_NAME).is_file():
            export_peft(stored.path, stored.card, folder)
        else:  # kept as the file that it came as
            folder.mkdir()
            copy_kept_files(stored, folder)
        (folder / RECORD_NAME).write_text(_record(stored.card), encoding="utf-8")
        yield folder


def _record(card: AdapterCard) -> str:
    """Return the part of the card that is signed, as JSON. A field at its default is left out, known or not."""
    fields = public_card(card).model_dump(mode="json", include=set(_RECORD), exclude_defaults=True)
    if card.recipe_data is not None:
        fields["recipe"] = hash_data(card.recipe_data)
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _strange_files(kept: Path, form: Path) -> str:
    """Return in words the files in the library's folder that an export leaves behind."""
    known = {path.name for path in form.iterdir()} | _KEPT_HERE
    strange = sorted(path.name for path in kept.iterdir() if path.name not in known)
    return f"{', '.join(strange[:3])} in {str(kept)!r} belongs to no adapter" if strange else ""


def _verify(folder: Path, signature: Path, public_key: Path, name: str) -> None:
    from cryptography.exceptions import InvalidSignature

    _, hashing, verifying = _package()
    _read_public_key(public_key)
    if found := _changes(folder, signature):
        raise VerificationError(f"The adapter {name!r} is not what was signed: {found}.")
    verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    try:
        verifier.set_hashing_config(_hashing(hashing)).verify(folder, signature)
    except (ValueError, KeyError, TypeError, AttributeError, InvalidSignature) as error:
        raise VerificationError(
            f"The signature of {name!r} is not valid: it was not made with the private key of {str(public_key)!r}, or "
            "was changed afterwards."
        ) from error


def _changes(folder: Path, signature: Path) -> str:
    """Return in words how the files of a folder differ from those that a signature lists; no key is needed for it."""
    try:
        payload = json.loads(base64.b64decode(_bundle(signature)["dsseEnvelope"]["payload"]))["predicate"]
        listed = {entry["name"]: entry["digest"] for entry in payload["resources"]}
        how = payload["serialization"]
        ignored = {*_UNSIGNED, *_OF_GIT, *how.get("ignore_paths", ())}
        is_ours = (how["method"], how["hash_type"]) == ("files", "sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(f"{str(signature)!r} is no signature that can be read.") from error
    if not is_ours:  # made by another program, which counted otherwise: the package alone tells
        return ""
    names = {path: path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    files = {
        name.as_posix(): "link" if path.is_symlink() else _digest(path)
        for path, name in names.items()
        if not {name.as_posix(), *(parent.as_posix() for parent in name.parents)} & ignored
    }
    changed = sorted(name for name in listed.keys() & files.keys() if listed[name] != files[name])
    found = {"was changed": changed, "is missing": sorted(listed.keys() - files.keys()),
             "was added": sorted(files.keys() - listed.keys())}  # fmt: skip
    return "; ".join(f"{name} {what}" for what, names in found.items() for name in names[:3])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # never from a cache: times can be set back


def _bundle(signature: Path) -> dict[str, Any]:
    with signature.open("rb") as file:
        text = file.read(_SIGNATURE_LIMIT_BYTES)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{str(signature)!r} is no signature that can be read.") from error
    if not isinstance(found, dict):
        raise VerificationError(f"{str(signature)!r} is no signature that can be read.")
    return found


def _require_signature(signature: Path, name: str) -> None:
    if not signature.is_file():
        raise VerificationError(f"The adapter {name!r} is not signed: there is no {str(signature)!r}.")


def _read_key(key: Path, password: bytes | None) -> None:
    """Refuse what is no private key of a curve that the package signs with."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not key.is_file():
        raise InputError(f"There is no private key {str(key)!r}.")
    try:
        found = load_pem_private_key(key.read_bytes(), password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = "its password is missing or wrong" if is_key_encrypted(key) else "it holds no private key as PEM"
        raise InputError(f"The key {str(key)!r} cannot be used: {why}.") from error
    _require_curve(found, key)


def _read_public_key(key: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if not key.is_file():
        raise InputError(f"There is no public key {str(key)!r}.")
    try:
        found = load_pem_public_key(key.read_bytes())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"The key {str(key)!r} cannot be used: it holds no public key as PEM.") from error
    _require_curve(found, key)


def _require_curve(found: Any, key: Path) -> None:
    curve = getattr(getattr(found, "curve", None), "name", None)
    if curve not in _CURVES:
        raise InputError(
            f"The key {str(key)!r} cannot be used: it is no elliptic-curve key of {', '.join(_CURVES.values())}."
        )


def _hashing(hashing: Any) -> Any:
    return hashing.Config().set_ignored_paths(paths=_UNSIGNED)


def _package() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise MissingExtraError(
            "Signatures need the package model-signing, which is not installed; run `pip install 'haori[signing]'`."
        ) from error
    return signing, hashing, verifying
