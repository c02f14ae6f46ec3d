"""`haori blend`, `haori resize` and `haori extract`: adapters made of adapters and checkpoints."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from haori.library import Combined
    from haori.library.combining.energy import Energy

__all__ = ["blend", "extract", "resize"]

_LESS = 0.999  # of a module's energy: then a table says where the rest was
_ROWS = 10
_Base = Annotated[str | None, typer.Option(help="Base to use; by default the one on the card.")]


def blend(
    parts: Annotated[list[str], typer.Argument(help="Adapters with their weights, as in support:0.4 poet:0.6.")],
    name: Annotated[str, typer.Option(help="Name of the blend in the library.")],
    rank: Annotated[int | None, typer.Option(help="Most ranks of a module; without it the sum is exact.")] = None,
    method: Annotated[
        str, typer.Option(help="linear, ties, dare, dare-ties, knots-ties or knots-dare-ties.")
    ] = "linear",
    density: Annotated[float, typer.Option(help="Share of values that TIES and DARE keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of what DARE drops.")] = 0,
    search: Annotated[
        list[str] | None, typer.Option(help="Find the weights on these rows; give it once for each skill's file.")
    ] = None,
    base: _Base = None,
) -> None:
    """Make one adapter of several: the weighted sum of what each changes, proved on the base."""
    from haori.cli.console import results
    from haori.library import BlendOptions, blend_stored
    from haori.serve.adapters.blend import parse_blend

    given = [(part.spec, part.strength) for part in parse_blend("+".join(parts))]
    if search:
        given = _search(given, search, method, base)
    options = BlendOptions(method=method, rank=rank, density=density, seed=seed)
    made = blend_stored(given, name, options, base_spec=base)
    if made.stored.card.combination is None:
        results().print(f"Alone and at weight 1 an adapter stays as it is: it is called {made.stored.name} too.")
        return
    _print(made)


def resize(
    name: Annotated[str, typer.Argument(help="Adapter in the library: name or name@version.")],
    rank: Annotated[int, typer.Option(min=1, help="Most ranks of a module.")],
    new: Annotated[str | None, typer.Option("--name", help="Name of the result; by default a new version.")] = None,
    base: _Base = None,
) -> None:
    """Store an adapter at a lower rank: of every module the nearest change that has it."""
    from haori.library import resize_stored

    _print(resize_stored(name, rank, new, base_spec=base))


def extract(
    base: Annotated[str, typer.Option(help="The base.")],
    tuned: Annotated[str, typer.Option(help="The same model trained further: its folder.")],
    rank: Annotated[int, typer.Option(min=1, help="Most ranks of a module.")],
    name: Annotated[str, typer.Option(help="Name of the adapter in the library.")],
) -> None:
    """Make an adapter of what a full fine-tune did to its base."""
    from haori.library import extract_stored

    _print(extract_stored(base, tuned, rank, name))


def _search(given: list[tuple[str, float]], data: list[str], method: str, base: str | None) -> list[tuple[str, float]]:
    """Find weights, show what they are worth, and return them."""
    from haori.cli.console import results
    from haori.core.errors import InputError
    from haori.evaluation.blend_search import search_weights, skills_table

    if method != "linear" or any(weight != 1 for _, weight in given):
        raise InputError("With --search the weights are found: give adapters without weights, and the method linear.")
    found = search_weights([spec for spec, _ in given], data, base_spec=base)
    results().print(skills_table(found))
    results().print(
        f"{found.measured} blends were measured. The weights were chosen on these rows, so the blend's figures are a "
        "little too good: measure it on others.",
        markup=False,
    )
    if not any(weight for _, weight in found.parts):
        raise InputError("On these rows the bare base is better than any blend of these adapters; nothing was stored.")
    return list(found.parts)


def _print(made: "Combined") -> None:
    from haori.cli.console import results
    from haori.cli.library import print_meaning

    card = made.stored.card
    assert card.verification is not None
    checks = len(card.verification.checks)
    results().print(f"[bold green]{made.stored.name}[/] is in the library, rank {card.rank}: {checks} checks passed.")
    results().print(made.energy.sentence(), markup=False)
    if made.left_out:
        results().print(made.left_out, markup=False)
    if any(module.share < _LESS for module in made.energy.modules.values()):
        results().print(_table(made.energy))
    results().print(f"Licence: {card.licence or 'unknown'}.", markup=False)
    print_meaning(made.stored.name)


def _table(energy: "Energy") -> "Table":
    """Return the modules of which least was kept."""
    from rich.table import Table
    from rich.text import Text

    modules = sorted(energy.modules, key=lambda name: energy.modules[name].share)
    table = Table(
        "module", "energy kept", "norm of what is lost", title=f"{min(_ROWS, len(modules))} of {len(modules)} modules"
    )
    for name in modules[:_ROWS]:
        kept, total = energy.modules[name]
        table.add_row(Text(name), f"{energy.modules[name].share:.2%}", f"{max(0.0, total - kept) ** 0.5:.3g}")
    return table
