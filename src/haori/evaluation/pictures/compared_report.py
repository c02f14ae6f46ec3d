"""A comparison of epochs and strengths as files and on the terminal: table, plots, one labelled sheet, a page."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from haori.core.hashing import short
from haori.core.storage import make_folder, staged_file, write_text
from haori.evaluation.pictures.embedding import embedded
from haori.evaluation.pictures.files import save_png
from haori.evaluation.pictures.line_plot import Line, Point, line_plot
from haori.evaluation.report import report_style
from haori.evaluation.result import figure, interval_of
from haori.metrics.kinds import KINDS
from haori.tasks.examination import spread
from haori.tasks.text_to_image.sheet import SheetRow, draw_sheet

if TYPE_CHECKING:
    from haori.evaluation.pictures.choosing import Setting
    from haori.evaluation.pictures.compared import ComparedSettings
    from haori.images.generation import DrawnPicture

__all__ = ["advice", "show_settings", "write_comparison"]

_SHOWN = ("data_similarity", "subject_retrieval", "prompt_retrieval", "clip_score", "memorised", "drift",
          "unrelated_retrieval", "kid")  # fmt: skip
_IN_TERMINAL = {
    "data_similarity": "Like the data [95%]", "prompt_retrieval": "Kept", "memorised": "Copies", "drift": "Drift",
    "unrelated_retrieval": "Kept, unrelated",
}  # fmt: skip
_PLOTTED = ("data_similarity", "prompt_retrieval", "drift", "memorised")
_RELATED_COLUMNS, _UNRELATED_COLUMNS = 8, 4
_SHEET = "comparison.png"


class SettingLine(NamedTuple):
    """A setting as people read it: figures with their intervals, and what the rule says of it."""

    label: str
    loss: str
    figures: tuple[tuple[str, str], ...]
    said: str
    recommended: bool


def write_comparison(
    compared: "ComparedSettings", folder: Path, drawn: "Sequence[list[list[DrawnPicture]]]"
) -> tuple[Path, Path]:
    """Write everything into `folder`; return the paths of comparison.json and comparison.html.

    Args:
        compared: What was found.
        folder: Made already.
        drawn: Pictures of the base and then of each setting, related and unrelated.

    Raises:
        StorageError: The folder cannot be written.
    """
    make_folder(folder / "pictures")
    names = ["base", *(one.label.replace(" ", "-") for one in compared.settings)]
    for name, sets in zip(names, drawn, strict=True):
        for picture in (one for some in sets for one in some):
            save_png(picture, folder / "pictures" / f"{picture.seed:05d}-{name}.png")
    _write_sheet(compared, folder / _SHEET, drawn)
    table, page = folder / "comparison.json", folder / "comparison.html"
    html = _page(compared, embedded(folder / _SHEET, longest=None))
    write_text(table, json.dumps(compared.to_dict(), ensure_ascii=False, indent=1) + "\n")
    write_text(page, html)
    return table, page


def show_settings(compared: "ComparedSettings", console: Console) -> None:
    """Print the recommendation, the table, what to type, and how to read it."""
    for number, reason in enumerate(compared.choice.reasons):
        console.print(Text(reason, style="" if number else "bold"))
    caption = "The page has every figure with its 95% interval."
    table = Table(box=SIMPLE_HEAD, caption=Text(caption), caption_justify="left")
    table.add_column("Setting", no_wrap=True)
    names = [name for name in _metrics(compared) if name in _IN_TERMINAL]
    for name in names:
        table.add_column(_IN_TERMINAL[name], justify="right", no_wrap=True)
    table.add_column("Loss", justify="right")
    table.add_column("", no_wrap=True)
    for line in setting_lines(compared, names):
        cells = [_cell(at, *one) for at, one in enumerate(line.figures)]
        style = "green" if line.recommended else ""
        table.add_row(Text(line.label, style=style), *cells, line.loss, Text(line.said, style=style))
    console.print(table)
    for command in advice(compared):
        console.print(Text(command), soft_wrap=True)
    for note in (compared.rule, *compared.notes):
        console.print(Text(f"- {note}", style="dim"))


def advice(compared: "ComparedSettings") -> list[str]:
    """Return the commands that use what is recommended."""
    if compared.choice.recommended is None:
        return []
    chosen = compared.settings[compared.choice.recommended]
    name, commands = chosen.adapter, []
    if chosen.epoch is not None:
        name = f"{compared.name}-epoch-{chosen.epoch:.3g}".replace(".", "-")
        commands.append(f"haori library add {chosen.adapter} --base {compared.base.name} --name {name}")
    prompt = compared.prompts[0].replace('"', "")
    how = f"--steps {compared.drawn_with['Steps']} --guidance {compared.drawn_with['CFG scale']}"
    commands.append(f'haori generate "{prompt} <lora:{name}:{chosen.strength:g}>" --base {compared.base.name} {how}')
    return commands


def setting_lines(compared: "ComparedSettings", names: Sequence[str]) -> list[SettingLine]:
    """Return the lines of the table with these metrics, that of the base first."""
    choice = compared.choice
    first = compared.settings[0].metrics
    of_base = tuple((figure(KINDS[name], first[name].base), "") for name in names)
    lines = [SettingLine("base", "", of_base, "", recommended=False)]
    for place, setting in enumerate(compared.settings):
        said = choice.left_out.get(place, "")
        if place == choice.recommended:
            said = "recommended"
        elif place in choice.equal:
            said = "as similar"
        loss = "" if setting.loss is None else f"{setting.loss:.4f}"
        figures = tuple(_figures(setting, name) for name in names)
        lines.append(SettingLine(setting.label, loss, figures, said, place == choice.recommended))
    return lines


def _figures(setting: "Setting", name: str) -> tuple[str, str]:
    kind, metric = KINDS[name], setting.metrics[name]
    return figure(kind, metric.value), interval_of(kind, metric.low, metric.high)


def _metrics(compared: "ComparedSettings") -> list[str]:
    return [name for name in _SHOWN if name in compared.settings[0].metrics]


def _cell(column: int, value: str, interval: str) -> Text:
    """A figure; that of the first column, by which settings are judged first, with its interval."""
    return Text(f"{value} [{interval}]" if interval and column == 0 else value)


def _page(compared: "ComparedSettings", sheet: str) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("haori.evaluation.pictures").joinpath("compared.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        compared=compared,
        style=report_style(),
        titles=[KINDS[name] for name in _metrics(compared)],
        lines=setting_lines(compared, _metrics(compared)),
        plots=_plots(compared),
        epochs=[line.name for line in _lines(compared, "data_similarity")],
        commands=advice(compared),
        sheet=sheet,
        short=short,
    )


def _plots(compared: "ComparedSettings") -> list[tuple[str, Markup]]:
    chosen, first = compared.choice.recommended, compared.settings[0].metrics
    plots = []
    for name in _PLOTTED:
        if name not in first:
            continue
        ring = None
        if chosen is not None:
            epochs = list(dict.fromkeys(one.epoch for one in compared.settings))
            ring = epochs.index(compared.settings[chosen].epoch), compared.settings[chosen].strength
        factor = 100 if KINDS[name].scale == "share" else 1
        base = first[name].base
        title = KINDS[name].title + (" (%)" if factor == 100 else "")
        plot = line_plot(
            _lines(compared, name), f"{title} by strength", y_title=title,
            level=None if base is None else factor * base, recommended=ring,
        )  # fmt: skip
        plots.append((f"{KINDS[name].title}, {KINDS[name].better} is better", plot))
    return plots


def _lines(compared: "ComparedSettings", name: str) -> list[Line]:
    factor = 100 if KINDS[name].scale == "share" else 1
    lines: dict[float | None, list[Point]] = {}
    for one in compared.settings:
        metric = one.metrics[name]
        ends = (None if end is None else factor * end for end in (metric.low, metric.high))
        lines.setdefault(one.epoch, []).append(Point(one.strength, factor * metric.value, *ends))
    return [
        Line("adapter" if epoch is None else f"epoch {epoch:.3g}", tuple(sorted(points)))
        for epoch, points in lines.items()
    ]


def _write_sheet(compared: "ComparedSettings", path: Path, drawn: "Sequence[list[list[DrawnPicture]]]") -> None:
    """Write a row for each setting, and a column for prompts of both kinds, by their first seed."""
    chosen = []
    for which, prompts, most in (
        (0, compared.prompts, _RELATED_COLUMNS), (1, compared.unrelated, _UNRELATED_COLUMNS)
    ):  # fmt: skip
        chosen += [(which, number * compared.seeds, prompts[number]) for number in spread(most, range(len(prompts)))]
    labels = ["base"]
    for place, one in enumerate(compared.settings):
        epoch = "" if one.epoch is None else f"epoch {one.epoch:.3g}\n"
        mark = "\nrecommended" if place == compared.choice.recommended else ""
        labels.append(f"{epoch}strength {one.strength:g}{mark}")
    rows = [
        SheetRow(label, [sets[which][at].image for which, at, _ in chosen])
        for label, sets in zip(labels, drawn, strict=True)
    ]
    with staged_file(path) as stage:
        draw_sheet(rows, [title for _, _, title in chosen], f"{compared.name} on {compared.base.name}").save(
            stage, format="PNG"
        )
