"""What `haori library list` and `search` print."""

__all__ = ["print_search"]

_MOST = 20


def print_search(query: str) -> None:
    """Print the adapters that a query describes; all of them if it is empty."""
    from haori.cli.console import results
    from haori.library import Library, list_table

    library = Library()
    scans = library.mounts.rescan()
    found = library.search(query)
    for word, near in found.close.items():
        results().print(
            f"No adapter has the word {word!r}; shown are those with {', '.join(map(repr, near))}.", markup=False
        )
    results().print(list_table(found.listed))
    broken = [listed.entry for listed in found.listed if listed.entry.problem]
    for entry in broken[:_MOST]:
        results().print(f"{entry.name} cannot be used: {entry.problem}", style="red", markup=False, soft_wrap=True)
    if len(broken) > _MOST:
        results().print(
            f"{len(broken) - _MOST:,} more cannot be used; `haori library show NAME` says why.", style="red"
        )
    for problem in (problem for scan in scans for problem in scan.problems):
        results().print(problem, style="yellow", markup=False)
