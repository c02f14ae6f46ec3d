"""`haori bases`: base models on this machine."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from haori.bases import Base
    from haori.core.records import Fingerprint

__all__ = ["app"]

app = typer.Typer(help="Base models: list, add, show, remove.", no_args_is_help=True)


@app.command("list")
def list_command() -> None:
    """List registered bases and those that can be fetched by name."""
    from rich.table import Column, Table

    from haori.bases import list_bases
    from haori.cli.console import results

    table = Table(
        *(Column(title, overflow="fold") for title in ("name", "installed", "parameters", "licence", "source"))
    )
    for entry in list_bases():
        table.add_row(
            entry.name,
            "yes" if entry.installed else "on first use",
            f"{entry.parameters / 1e6:,.0f}M" if entry.parameters else "",
            entry.licence or "unknown",
            entry.source,
        )
    results().print(table)


@app.command()
def add(
    spec: Annotated[
        str, typer.Argument(help="Catalogue name, folder, GGUF file, checkpoint (.safetensors), or hub id.")
    ],
    name: Annotated[str | None, typer.Option(help="Name to register it under.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
) -> None:
    """Fetch or register a base."""
    from haori.bases import add_base
    from haori.cli.console import results

    base = add_base(spec, name=name, revision=revision)
    results().print(f"[bold green]{base.name}[/] is ready: {base.parameters / 1e6:,.0f}M parameters, {base.id}.")


@app.command()
def show(spec: Annotated[str, typer.Argument(help="Name, folder, GGUF file, checkpoint, or hub id.")]) -> None:
    """Show a base with its fingerprint, or its components with theirs."""
    from rich.table import Column, Table

    from haori.bases import choose_dtype, find_base
    from haori.cli.console import results

    base = find_base(spec)
    dtype = choose_dtype("auto")
    table = Table("", Column(overflow="fold"), title=base.name, show_header=False, title_justify="left")
    for key, value in (
        ("source", base.source),
        ("revision", base.revision or ""),
        ("licence", base.licence or "unknown"),
        ("folder", str(base.path)),
        *([("pipeline", base.pipeline)] if base.pipeline else [("architecture", base.fingerprint.architecture)]),
        ("parameters", f"{base.parameters:,}"),
        ("weights on disk", f"{base.size_bytes / 1e6:,.0f} MB"),
        *([] if base.pipeline else [("context", f"{base.context_length:,} tokens")]),
        ("quantization", base.quantization or "none"),
        ("dtype here", f"{dtype.name}: {dtype.reason}"),
        ("fingerprint", base.id),
        *([] if base.pipeline else _hashes(base.fingerprint)),
    ):
        table.add_row(key, value)
    results().print(table)
    if base.pipeline:
        results().print(_components(base))


def _hashes(of: "Fingerprint") -> list[tuple[str, str]]:
    return [
        ("  structure", of.structure),
        ("  weights", of.weights),
        ("  tokenizer", of.tokenizer or "none"),
        ("  chat template", of.chat_template or "none"),
    ]


def _components(base: "Base") -> "Table":
    """List the components of a pipeline."""
    from rich.table import Column, Table

    titles = ("component", "architecture", "parameters", "on disk", "fingerprint", "hashes")
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for name, part in base.components.items():
        hashes = "\n".join(f"{key.strip()} {value}" for key, value in _hashes(part.fingerprint) if value != "none")
        table.add_row(
            name,
            part.architecture,
            f"{part.parameters:,}",
            f"{part.size_bytes / 1e6:,.0f} MB",
            part.fingerprint.id,
            hashes,
        )
    return table


@app.command()
def remove(name: Annotated[str, typer.Argument(help="Name of a registered base.")]) -> None:
    """Forget a base; copies made by Haori are deleted, your own folders are not touched."""
    from haori.bases import remove_base
    from haori.cli.console import results

    remove_base(name)
    results().print(f"{name} is removed.")
