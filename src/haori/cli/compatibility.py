"""`haori library check`: which bases an adapter can be used with."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.library import Compatibility, StoredAdapter

__all__ = ["check"]


def check(
    names: Annotated[list[str], typer.Argument(help="Adapters: name, name@version, or the first digits of an id.")],
    base: Annotated[
        list[str] | None, typer.Option(help="A base; several times for several. By default the one on the card.")
    ] = None,
    all_bases: Annotated[bool, typer.Option("--all", help="Ask about every installed base.")] = False,
) -> None:
    """Say whether adapters fit bases: yes, structure only, or no, with reasons; exit code 1 unless yes."""
    from haori.cli.console import results
    from haori.core.errors import InputError
    from haori.library import Library, compatibility_table

    if base and all_bases:
        raise InputError("Give either --base or --all, not both.")
    library = Library()
    adapters = [library.get(name) for name in names]
    found = _with_all(adapters) if all_bases else _with_named(adapters, base or [])
    results().print(compatibility_table(found))
    fits = {(one.adapter, one.base): one.answer == "yes" for one in found}
    named = {adapter.name for adapter in adapters}
    fitted = {adapter for (adapter, _), yes in fits.items() if yes}
    if not (fitted == named if all_bases else all(fits.values())):
        raise typer.Exit(1)


def _with_named(adapters: "list[StoredAdapter]", bases: list[str]) -> "tuple[Compatibility, ...]":
    from haori.bases import find_base
    from haori.library import base_of, check_compatibility

    if not bases:
        return tuple(check_compatibility(adapter, base_of(adapter.card)) for adapter in adapters)
    found = [find_base(spec) for spec in bases]
    return tuple(check_compatibility(adapter, base) for adapter in adapters for base in found)


def _with_all(adapters: "list[StoredAdapter]") -> "tuple[Compatibility, ...]":
    from haori.bases import find_base, list_bases
    from haori.core.errors import HaoriError, InputError
    from haori.core.progress_bar import progress_bar
    from haori.library import Compatibility, check_compatibility

    installed = [entry.name for entry in list_bases() if entry.installed]
    if not installed:
        raise InputError("No base is installed; add one with `haori bases add`, or name one with --base.")
    found: list[Compatibility] = []
    with progress_bar("Reading bases", len(installed), "bases") as advance:
        for name in installed:
            try:
                base = find_base(name)
                found.extend(check_compatibility(adapter, base) for adapter in adapters)
            except HaoriError as error:
                found.extend(Compatibility(adapter.name, name, "unknown", (str(error),)) for adapter in adapters)
            advance(1)
    return tuple(sorted(found, key=lambda one: [adapter.name for adapter in adapters].index(one.adapter)))
