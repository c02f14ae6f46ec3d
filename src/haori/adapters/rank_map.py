"""A picture of learnt ranks: one row per layer, the last on top, one cell per module or attention head.

Drawn as a PNG and as SVG to stand inside a page. Blue has given ranks away, red has gained some, pale is where
training began. Knows nothing of any method: it takes ranks by module name.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["draw_ranks", "ranks_svg"]

_FEWER, _SAME, _MORE = (0x2F, 0x5D, 0x8A), (0xF1, 0xEE, 0xE8), (0xC4, 0x50, 0x2E)
_LEAST_WIDTH = 3  # cells, so that a module's name fits above it
_GAP = 0.5
_CELL = 22
_LEFT, _TOP, _BOTTOM = 46, 62, 34
_LETTER = 6.0  # width of a letter of a layer's name
# unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q: the block is what ends before `attn1`.
_BLOCK = re.compile(r"(?:unet|transformer|text_encoder\w*)\.((?:\w+\.)*?(?:\w+\.\d+\.)+)(.+)")
_DARK = 0.65  # how far from pale a cell's number turns white


class _Cell(NamedTuple):
    """One head: left edge and width in cells, row from the bottom, rank, and what it is."""

    x: float
    width: float
    row: int
    rank: int
    name: str


class _Grid(NamedTuple):
    """Cells with the modules above (name and middle) and the layers beside them, from the bottom."""

    cells: tuple[_Cell, ...]
    modules: tuple[tuple[str, float], ...]
    layers: tuple[str, ...]
    width: float

    @property
    def left(self) -> float:
        """Return the space for the names of layers in a page."""
        return max(_LEFT, 12 + _LETTER * max(map(len, self.layers), default=0))


def draw_ranks(ranks: Mapping[str, int | Sequence[int]], start: float, path: Path, title: str) -> None:
    """Draw ranks as a PNG.

    Args:
        ranks: Rank of each module by full name, or of each of its heads.
        start: Rank at the start of training, which is pale.
        path: File to write.
        title: Heading.

    Raises:
        StorageError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from haori.core.storage import explain_os_errors

    grid = _grid(ranks)
    colours = LinearSegmentedColormap.from_list("ranks", [_hex(c) for c in (_FEWER, _SAME, _MORE)])
    norm = TwoSlopeNorm(vmin=0, vcenter=start, vmax=2 * start)
    longest = max(map(len, grid.layers), default=0)
    size = (2.2 + 0.24 * grid.width + 0.06 * max(0, longest - 3), 1.9 + 0.24 * len(grid.layers))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for cell in grid.cells:
        place = (cell.x + 0.03, cell.row + 0.03)
        axes.add_patch(Rectangle(place, cell.width - 0.06, 0.94, facecolor=_colour(cell.rank, start)))
        axes.text(
            cell.x + cell.width / 2, cell.row + 0.47, str(cell.rank), fontsize=7, ha="center", va="center",
            color=_ink(cell.rank, start),
        )  # fmt: skip
    axes.set(xlim=(0, grid.width), ylim=(0, len(grid.layers)), ylabel="layer", title=title)
    axes.set_xticks([middle for _, middle in grid.modules], [name for name, _ in grid.modules], rotation=35, ha="right")
    axes.set_yticks([row + 0.5 for row in range(len(grid.layers))], grid.layers, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="rank", fraction=0.03, pad=0.01)
    bar.set_ticks([0, start / 2, start, 1.5 * start, 2 * start])
    with explain_os_errors(path):
        figure.savefig(path)


def ranks_svg(ranks: Mapping[str, int | Sequence[int]], start: float, label: str) -> "Markup":
    """Return the same picture as inline SVG; text takes the page's colour, and each cell says what it is.

    Args:
        ranks: Rank of each module by full name, or of each of its heads.
        start: Rank at the start of training, which is pale.
        label: What the figure shows, for screen readers.
    """
    from markupsafe import Markup

    grid = _grid(ranks)
    rows = len(grid.layers)
    width, height = grid.left + _CELL * grid.width + 40, _TOP + _CELL * rows + _BOTTOM
    svg = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}" font-size="10" fill="currentColor">')
    parts = [svg.format(width, height, label)]
    for row, layer in enumerate(grid.layers):
        text = Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>')
        parts.append(text.format(f"{grid.left - 6:g}", _TOP + _CELL * (rows - row - 0.35), layer))
    for name, middle in grid.modules:
        x = grid.left + _CELL * middle
        turned = Markup('<text x="{0:.1f}" y="{1}" transform="rotate(-35 {0:.1f} {1})">{2}</text>')
        parts.append(turned.format(x, _TOP - 6, name))
    for cell in grid.cells:
        parts.append(_svg_cell(cell, start, rows, grid.left))
    parts.append(_svg_scale(start, grid.left, _TOP + _CELL * rows + 14))
    return Markup("").join(parts) + Markup("</svg>")


def _svg_cell(cell: _Cell, start: float, rows: int, left: float) -> "Markup":
    from markupsafe import Markup

    x, y = left + _CELL * cell.x, _TOP + _CELL * (rows - cell.row - 1)
    rect = Markup(
        '<g><title>{}: rank {}</title><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill="{}"/>'
        '<text x="{:.1f}" y="{:.1f}" text-anchor="middle" fill="{}">{}</text></g>'
    )
    return rect.format(
        cell.name, cell.rank, x + 0.5, y + 0.5, _CELL * cell.width - 1, _CELL - 1, _colour(cell.rank, start),
        x + _CELL * cell.width / 2, y + _CELL * 0.65, _ink(cell.rank, start), cell.rank,
    )  # fmt: skip


def _svg_scale(start: float, left: float, y: float) -> "Markup":
    """Return a legend of five colours with their ranks."""
    from markupsafe import Markup

    parts = []
    for place, share in enumerate((0.0, 0.5, 1.0, 1.5, 2.0)):
        x = left + 70 * place
        box = Markup('<rect x="{}" y="{}" width="12" height="12" fill="{}"/><text x="{}" y="{}">rank {}</text>')
        parts.append(box.format(x, y, _colour(share * start, start), x + 17, y + 10, f"{max(share * start, 1):g}"))
    return Markup("").join(parts)


def _grid(ranks: Mapping[str, int | Sequence[int]]) -> _Grid:
    """Place every head. Modules with the same name but for the layer's number share a column."""
    of_module: dict[str, dict[int | str | None, tuple[str, tuple[int, ...]]]] = {}
    for name, found in ranks.items():
        layer, module = _parted(name)
        heads: tuple[int, ...] = (found,) if isinstance(found, int) else tuple(found)
        of_module.setdefault(module, {})[layer] = (name, heads)
    # By number; the blocks of a denoiser, which have names, in the order in which they come.
    layers: list[int | str | None] = list(dict.fromkeys(_parted(name)[0] for name in ranks))
    layers.sort(key=lambda layer: -1 if layer is None else layer if isinstance(layer, int) else sys.maxsize)
    row_of = {layer: row for row, layer in enumerate(layers)}
    leaves = [re.sub(r".*\.(?=[A-Za-z_])", "", module) for module in of_module]  # `to_out.0` is one name
    cells: list[_Cell] = []
    modules: list[tuple[str, float]] = []
    x = 0.0
    for module, leaf in zip(of_module, leaves, strict=True):
        wide = max(_LEAST_WIDTH, *(len(found) for _, found in of_module[module].values()))
        modules.append((leaf if leaves.count(leaf) == 1 else module, x + wide / 2))
        for layer, (name, found) in of_module[module].items():
            each = wide / len(found)
            for head, rank in enumerate(found):
                label = name if len(found) == 1 else f"{name}, head {head}"
                cells.append(_Cell(x + head * each, each, row_of[layer], rank, label))
        x += wide + _GAP
    names = tuple("-" if layer is None else str(layer) for layer in layers)
    return _Grid(tuple(cells), tuple(modules), names, x - _GAP)


def _parted(name: str) -> tuple[int | str | None, str]:
    """Split `model.layers.3.mlp.up_proj` into 3 and `model.layers.mlp.up_proj`, and a denoiser's module by its block.

    `unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q` is `attn1.to_q` of the block `down 0.1.0`.
    """
    if (block := _BLOCK.fullmatch(name)) is not None:
        kind, numbers = block[1].partition("_")[0].partition(".")[0], re.findall(r"\.(\d+)(?=\.)", f".{block[1]}")
        return " ".join([kind, ".".join(numbers)]), block[2]
    found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return (int(found[1]), name[: found.start()] + name[found.end() :]) if found else (None, name)


def _share(rank: float, start: float) -> float:
    """Return how far a rank is from the start, from -1 (none left) to 1 (twice as many)."""
    return max(-1.0, min(1.0, (rank - start) / start))


def _colour(rank: float, start: float) -> str:
    share = _share(rank, start)
    end = _MORE if share > 0 else _FEWER
    mixed = (round(a + (b - a) * abs(share)) for a, b in zip(_SAME, end, strict=True))
    return _hex(tuple(mixed))


def _ink(rank: float, start: float) -> str:
    return "#ffffff" if abs(_share(rank, start)) > _DARK else "#333333"


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)
