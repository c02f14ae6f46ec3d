"""What `haori library list` and `search` print."""

__all__ = ["print_search"]


def print_search(query: str) -> None:
    """Print the adapters that a query describes; all of them if it is empty."""
    from haori.cli.console import results
    from haori.library import Library, list_table

    found = Library().search(query)
    for word, near in found.close.items():
        results().print(
            f"No adapter has the word {word!r}; shown are those with {', '.join(map(repr, near))}.", markup=False
        )
    results().print(list_table(found.listed))
