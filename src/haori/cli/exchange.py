"""Adapters from and to elsewhere: what `haori library add` is given by address, and `haori library push`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

if TYPE_CHECKING:
    from haori.library.stated import Stated

__all__ = ["Given", "given_files", "push"]


class Given(NamedTuple):
    """An adapter's files on this machine, what a name can be made of, and what is said of it where it came from."""

    path: Path
    called: Path
    said: "Stated"


@contextmanager
def given_files(given: str, *, allow_url: bool) -> Iterator[Given]:
    """Yield the files that a path or an address means; those fetched are deleted once the block came to its end."""
    from haori.cli.console import results
    from haori.library.exchange.addresses import parse_address
    from haori.library.exchange.fetching import fetch
    from haori.library.stated import Stated

    address = parse_address(given)
    if address is None:
        yield Given(Path(given), Path(given), Stated())
        return
    fetched = fetch(address, allow_url=allow_url)
    checked = "which is what its site states" if fetched.is_checked else "which its site does not state"
    results().print(f"Fetched {address}: sha256 {fetched.sha256[:12]}, {checked}.", markup=False, soft_wrap=True)
    yield Given(fetched.path, Path(fetched.called), fetched.said)
    fetched.discard()


def push(
    name: Annotated[str, typer.Argument(help="Name, name@version, or the first digits of an id.")],
    address: Annotated[str, typer.Argument(help="hub:OWNER/REPO; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    base: Annotated[str | None, typer.Option(help="Base to prove it on; by default the one on the card.")] = None,
) -> None:
    """Upload an adapter with its model card to the Hugging Face hub, logged in by `hf auth login` or HF_TOKEN."""
    from haori.cli.console import results
    from haori.library.exchange.pushing import push_stored

    results().print(f"Uploaded: {push_stored(name, address, private=private, base_spec=base)}", soft_wrap=True)
