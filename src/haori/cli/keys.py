"""`haori keys`: who may use `haori serve`."""

from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="API keys of the server: create, list, revoke.", no_args_is_help=True)
_Name = Annotated[str, typer.Argument(help="What logs call the key.")]


@app.command()
def create(
    name: _Name,
    adapters: Annotated[
        str, typer.Option(help="Names it may use (the base's among them), with commas; * stands for any letters.")
    ] = "*",
    admin: Annotated[bool, typer.Option("--admin", help="It may load and unload adapters and read metrics.")] = False,
    expires: Annotated[str | None, typer.Option(help="When it ends by itself: 90m, 12h, 30d.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Answers it may have under way at once.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompts and answers that it may use in a minute.")
    ] = None,
) -> None:
    """Make a key and show it, once."""
    from haori.cli.console import notes
    from haori.server import KeyStore, parse_duration

    patterns = [pattern.strip() for pattern in adapters.split(",") if pattern.strip()]
    lifetime = None if expires is None else parse_duration(expires)
    created = KeyStore().create(
        name, adapters=patterns, admin=admin, lifetime=lifetime, max_concurrent=max_concurrent,
        tokens_per_minute=tokens_per_minute,
    )  # fmt: skip
    notes().print(f"The key {name!r}; it is shown only now, and only its hash is kept:")
    typer.echo(created.secret)


@app.command("list")
def list_command() -> None:
    """List the keys; the keys themselves are not kept."""
    from rich.table import Column, Table

    from haori.cli.console import results
    from haori.server import KeyStore

    titles = ("name", "adapters", "admin", "created", "expires", "at once", "tokens/min")
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for key in KeyStore().list():
        ends = "never" if key.expires is None else f"{key.expires}{' (over)' if key.expired else ''}"
        limits = (f"{limit:,}" if limit else "" for limit in (key.max_concurrent, key.tokens_per_minute))
        names = ", ".join(key.adapters) or "none"
        table.add_row(key.name, names, "yes" if key.admin else "", key.created, ends, *limits)
    results().print(table)


@app.command()
def revoke(name: _Name) -> None:
    """Delete a key; running servers refuse it from the next request on."""
    from haori.cli.console import results
    from haori.server import KeyStore

    KeyStore().revoke(name)
    results().print(f"The key {name!r} is revoked.")
