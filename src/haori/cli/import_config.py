"""`haori import-config`: a recipe out of another tool's configuration."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["import_config"]


def import_config(
    file: Annotated[Path, typer.Argument(help="Configuration of another tool, in YAML or JSON.")],
    out: Annotated[Path | None, typer.Option(help="Write the recipe to this new file, not to the screen.")] = None,
    tool: Annotated[
        str | None,
        typer.Option(help="The tool that wrote it, such as axolotl; found by its keys if not given."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, in place of the file's.")] = None,
    data: Annotated[str | None, typer.Option(help="Data, in place of the file's.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter; that of the file by default.")] = None,
) -> None:
    """Convert a configuration of another training tool, such as Axolotl, into a recipe.

    Every key that is not carried over is named, with the reason and the nearest thing to do here.
    """
    from haori.cli.console import notes
    from haori.conversion import commented_recipe, import_config, report_lines
    from haori.core.errors import StorageError
    from haori.core.storage import make_folder, write_text

    if out is not None and out.exists():
        raise StorageError(f"{str(out)!r} is there already; give --out a new file.")
    conversion = import_config(file, tool, base=base, data=data, name=name)
    recipe = commented_recipe(conversion, file.name)
    if out is None:
        typer.echo(recipe, nl=False)
    else:
        make_folder(out.parent)
        write_text(out, recipe)
    for line in report_lines(conversion):
        notes().print(line, markup=False, soft_wrap=True)
    if out is not None:
        typer.echo(f"Next: haori train {out} --dry-run")
