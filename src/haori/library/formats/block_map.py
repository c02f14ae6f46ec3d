"""How one naming of a model's modules maps to that of diffusers and transformers, block by block.

The maps themselves are data (`bfl_names.py`, `transformer_names.py`); a trainer's file holds the names with dots or, as
kohya writes them, with underscores throughout.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

__all__ = ["BlockMap", "Place", "Rows"]

Rows = Literal["whole", "equal", "hidden_and_rest", "swapped"]
"""How the output rows of a module are those of others.

- `whole`: it is one module of diffusers.
- `equal`: one below the other, of equal size (a fused query, key and value).
- `hidden_and_rest`: all but the last have as many rows as the module has inputs (Flux's `linear1`).
- `swapped`: one module, with its two halves of rows exchanged (shift and scale of the last modulation).
"""


class Place(NamedTuple):
    """Which modules of diffusers a module is, in the order of its rows."""

    modules: tuple[str, ...]
    rows: Rows = "whole"

    def inside(self, outer: str) -> "Place":
        """Return the place whose modules lie inside another one, or a component."""
        return Place(tuple(f"{outer}.{module}" for module in self.modules), self.rows)


Blocks = Mapping[tuple[str, str], Mapping[str, Place]]


@dataclass(frozen=True)
class BlockMap:
    """Module names of one naming and what they are in diffusers.

    Attributes:
        blocks: For each list of blocks, by its own name and that in diffusers, the places of a block's modules.
        others: The places of modules outside blocks.
    """

    blocks: Blocks
    others: Mapping[str, Place]

    def place_of(self, name: str, joint: Literal[".", "_"] = ".") -> Place | None:
        """Return where a module belongs; None if it is not known.

        Args:
            name: Its name in this naming.
            joint: What joins the parts of the name.
        """
        blocks, others = self._joined[joint]
        if name in others:
            return others[name]
        for (own, theirs), table in blocks.items():
            if not name.startswith(own + joint):
                continue
            number, _, rest = name[len(own) + 1 :].partition(joint)
            if number.isdecimal() and rest in table:
                return table[rest].inside(f"{theirs}.{number}")
        return None

    def own_name(self, module: str) -> str | None:
        """Return the name, with dots, of the module that holds a module of diffusers; None if it is not known."""
        if module in self._own_others:
            return self._own_others[module]
        for (own, theirs), table in self._own_blocks.items():
            number, _, rest = module.removeprefix(f"{theirs}.").partition(".")
            if module.startswith(f"{theirs}.") and number.isdecimal() and rest in table:
                return f"{own}.{number}.{table[rest]}"
        return None

    def and_diffusers(self) -> "BlockMap":
        """Return the map that knows the names of diffusers as well as its own."""
        return self._or(self.diffusers())

    def diffusers(self) -> "BlockMap":
        """Return the map that knows the same modules by the names of diffusers alone."""
        blocks: dict[tuple[str, str], dict[str, Place]] = {}
        for (_, theirs), table in self.blocks.items():
            blocks.setdefault((theirs, theirs), {}).update(_by_themselves(table.values()))
        return BlockMap(blocks, _by_themselves(self.others.values()))

    def and_numbered(self) -> "BlockMap":
        """Return the map that knows the parts of a fused module as well, as `qkv.0`, `qkv.1` and `qkv.2`."""
        blocks = {pair: dict(_numbered(table)) for pair, table in self.blocks.items()}
        return self._or(BlockMap(blocks, dict(_numbered(self.others))))

    def _or(self, other: "BlockMap") -> "BlockMap":
        blocks: dict[tuple[str, str], Mapping[str, Place]] = dict(self.blocks)
        for pair, table in other.blocks.items():
            blocks[pair] = {**table, **blocks.get(pair, {})}
        return BlockMap(blocks, {**other.others, **self.others})

    @cached_property
    def first_words(self) -> frozenset[str]:
        """Return what its names begin with, as far as the first dot."""
        return frozenset(name.partition(".")[0] for name in (*(own for own, _ in self.blocks), *self.others))

    @cached_property
    def _joined(self) -> dict[str, tuple[Blocks, Mapping[str, Place]]]:
        flat = {
            (own.replace(".", "_"), theirs): {name.replace(".", "_"): place for name, place in table.items()}
            for (own, theirs), table in self.blocks.items()
        }
        return {
            ".": (self.blocks, self.others),
            "_": (flat, {name.replace(".", "_"): place for name, place in self.others.items()}),
        }

    @cached_property
    def _own_blocks(self) -> dict[tuple[str, str], dict[str, str]]:
        return {pair: _inverse(table) for pair, table in self.blocks.items()}

    @cached_property
    def _own_others(self) -> dict[str, str]:
        return _inverse(self.others)


def _inverse(table: Mapping[str, Place]) -> dict[str, str]:
    return {module: name for name, place in table.items() for module in place.modules}


def _by_themselves(places: Iterable[Place]) -> dict[str, Place]:
    return {module: Place((module,)) for place in places for module in place.modules}


def _numbered(table: Mapping[str, Place]) -> Iterator[tuple[str, Place]]:
    for name, place in table.items():
        if len(place.modules) == 1:
            yield name, place
        else:
            yield from ((f"{name}.{number}", Place((module,))) for number, module in enumerate(place.modules))
