"""`haori library sign` and `verify-signature`."""

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["sign", "verify_signature"]


def sign(
    name: Annotated[str, typer.Argument(help="Name, name@version, or the first digits of an id.")],
    key: Annotated[Path, typer.Option(help="Private key: a PEM file of an elliptic-curve key.")],
) -> None:
    """Sign an adapter with a private key; exports carry the signature."""
    from haori.cli.console import results
    from haori.library import Library, is_key_encrypted, sign_stored, signed_with

    stored = Library().get(name)
    password = typer.prompt("Password of the key", hide_input=True, err=True) if is_key_encrypted(key) else None
    sign_stored(stored, key, password=None if password is None else password.encode())
    results().print(
        f"[bold green]{stored.name}[/] is signed with the key {signed_with(stored.path)}. Give others its public key; "
        "`haori library verify-signature` checks with that."
    )


def verify_signature(
    name: Annotated[str, typer.Argument(help="Adapter in the library, or a folder that one was exported to.")],
    public_key: Annotated[Path, typer.Option(help="Public key of whoever signed it: a PEM file.")],
) -> None:
    """Check that an adapter is what was signed; exit code 1 if it is not."""
    from haori.cli.console import results
    from haori.library import Library, verify_signed_folder, verify_stored_signature

    if os.sep in name or name in {".", ".."}:
        verify_signed_folder(Path(name), public_key)
    else:
        stored = Library().get(name)
        name = stored.name
        verify_stored_signature(stored, public_key)
    results().print(f"{name} is what was signed with the private key of {public_key}.", markup=False, soft_wrap=True)
