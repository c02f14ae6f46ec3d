"""`haori library licence`, `lineage` and `model-card`: what may be done with an adapter, and where it comes from."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["licence", "lineage", "model_card"]

_Name = Annotated[str, typer.Argument(help="Name, name@version, or the first digits of an id.")]


def licence(
    name: _Name,
    attribution: Annotated[
        bool, typer.Option("--attribution", help="Print the text to put beside the adapter when it is shared.")
    ] = False,
    notice: Annotated[Path | None, typer.Option(help="Write that text to this file.")] = None,
) -> None:
    """Say whether an adapter may be used commercially and shared, and why."""
    from haori.cli.console import results
    from haori.core.storage import write_text
    from haori.library import Library, ancestors, attribution_text, effective_licence, licence_table

    stored = Library().get(name)
    before = ancestors(stored)
    text = attribution_text(stored.name, stored.card, before)
    if notice is not None:
        write_text(notice, text)
        results().print(f"Written to {notice}.", soft_wrap=True, markup=False)
    if attribution:
        typer.echo(text, nl=False)
    elif notice is None:
        results().print(licence_table(stored.name, effective_licence(stored.card, before)))


def model_card(
    name: _Name,
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of printing it.")] = None,
) -> None:
    """Print an adapter's model card, as exports hold it."""
    from haori.cli.console import results
    from haori.core.storage import write_text
    from haori.library import Library, model_card_of

    text = model_card_of(Library().get(name))
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        results().print(f"Written to {out}.", soft_wrap=True, markup=False)


def lineage(
    name: _Name,
    bom: Annotated[Path | None, typer.Option(help="Write it as a CycloneDX ML-BOM (JSON) to this file.")] = None,
) -> None:
    """Show what an adapter was made from: base, data, recipe, run and parents."""
    from haori.cli.console import results
    from haori.core.storage import write_text
    from haori.library import Library, ancestors, lineage_tree, model_bom

    stored = Library().get(name)
    if bom is None:
        results().print(lineage_tree(stored.name, stored.card, ancestors(stored)))
    else:
        write_text(bom, model_bom(stored))
        results().print(f"Written to {bom}.", soft_wrap=True, markup=False)
