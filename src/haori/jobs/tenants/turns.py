"""Fair turns: who has had the fewest tokens goes next, and nobody saves turns up by being idle."""

from collections.abc import Collection

__all__ = ["Turns"]


class Turns:
    """Tokens that each tenant has had (virtual token counter, Sheng et al., OSDI 2024)."""

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._floor = 0.0

    def enter(self, name: str, waiting: Collection[str]) -> None:
        """Note that a tenant begins to wait beside others; it starts level with the one that has had least."""
        floor = min((self._had[other] for other in waiting if other != name), default=self._floor)
        self._had[name] = max(self._had.get(name, floor), floor)

    def order(self, waiting: Collection[str]) -> list[str]:
        """Return those that wait, whose turn it is first."""
        return sorted(waiting, key=lambda name: self._had[name])

    def take(self, name: str, tokens: int) -> None:
        """Note that a tenant had a turn of so many tokens."""
        self._floor = max(self._floor, self._had[name])
        self._had[name] += max(tokens, 1)

    def leave(self, name: str) -> None:
        """Forget a tenant."""
        self._had.pop(name, None)
