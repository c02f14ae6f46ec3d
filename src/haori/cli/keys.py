"""`haori keys`: who may use `haori serve`."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.server import ApiKey

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
    scopes: Annotated[str, typer.Option(help="What it is for, with commas: infer (answers), train.")] = "infer",
    owner: Annotated[
        str | None, typer.Option(help="Account that owns what it makes; keys of one account share files and jobs.")
    ] = None,
    bases: Annotated[str, typer.Option(help="Bases that it may train, with commas; * stands for any letters.")] = "*",
    max_jobs: Annotated[int | None, typer.Option(min=1, help="Jobs of its account that have not ended.")] = None,
    max_job_rows: Annotated[int | None, typer.Option(min=1, help="Training rows of one job.")] = None,
    max_job_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that its account may train in 30 days.")
    ] = None,
    max_files: Annotated[str | None, typer.Option(help="Size of all files that its account keeps: 500MB, 2GB.")] = None,
) -> None:
    """Make a key and show it, once."""
    from haori.cli.console import notes
    from haori.server import KeyStore, parse_duration, parse_size, training_spelling

    patterns = _listed(adapters)
    lifetime = None if expires is None else parse_duration(expires)
    created = KeyStore().create(
        name, adapters=patterns, admin=admin, lifetime=lifetime, max_concurrent=max_concurrent,
        tokens_per_minute=tokens_per_minute, scopes=_listed(scopes), owner=owner, bases=_listed(bases),
        max_jobs=max_jobs, max_job_rows=max_job_rows, max_job_tokens=max_job_tokens,
        max_file_bytes=None if max_files is None else parse_size(max_files),
    )  # fmt: skip
    notes().print(f"The key {name!r}; it is shown only now, and only its hash is kept:")
    typer.echo(created.secret)
    if "train" in created.key.scopes:
        notes().print("For clients of the training API, which want another spelling, the same key is:")
        notes().print(training_spelling(created.secret), soft_wrap=True)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@app.command("list")
def list_command() -> None:
    """List the keys; the keys themselves are not kept."""
    from rich.table import Column, Table

    from haori.cli.console import results
    from haori.server import KeyStore

    titles = ("name", "for", "adapters", "account", "admin", "created", "expires", "at once", "tokens/min", "training")
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for key in KeyStore().list():
        ends = "never" if key.expires is None else f"{key.expires}{' (over)' if key.expired else ''}"
        limits = (f"{limit:,}" if limit else "" for limit in (key.max_concurrent, key.tokens_per_minute))
        names = ", ".join(key.adapters) or "none"
        scopes = ", ".join(key.scopes) or "none"
        admin = "yes" if key.admin else ""
        table.add_row(key.name, scopes, names, key.account, admin, key.created, ends, *limits, _training(key))
    results().print(table)


def _training(key: "ApiKey") -> str:
    """Return what limits the training of a key."""
    if "train" not in key.scopes:
        return ""
    limits = {
        "jobs": key.max_jobs, "rows/job": key.max_job_rows, "tokens/30 d": key.max_job_tokens,
        "bytes": key.max_file_bytes,
    }  # fmt: skip
    said = [f"{limit:,} {what}" for what, limit in limits.items() if limit is not None]
    return ", ".join([*(key.bases if key.bases != ("*",) else ()), *said])


@app.command()
def revoke(name: _Name) -> None:
    """Delete a key; running servers refuse it from the next request on."""
    from haori.cli.console import results
    from haori.server import KeyStore

    KeyStore().revoke(name)
    results().print(f"The key {name!r} is revoked.")
