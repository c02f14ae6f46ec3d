"""`haori import-config`: a recipe out of another tool's configuration."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.conversion import Conversion

__all__ = ["import_config"]


def import_config(
    file: Annotated[Path, typer.Argument(help="Configuration of another tool, in YAML or JSON.")],
    out: Annotated[Path | None, typer.Option(help="Write the recipe to this new file, not to the screen.")] = None,
    tool: Annotated[
        str | None,
        typer.Option(help="axolotl, llama-factory, trl, peft, unsloth or ms-swift; found by the keys if not given."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, in place of the file's.")] = None,
    data: Annotated[str | None, typer.Option(help="Data, in place of the file's.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter; that of the file by default.")] = None,
) -> None:
    """Convert a configuration of Axolotl, LLaMA-Factory, TRL, PEFT, Unsloth or ms-swift into a recipe.

    Every key that is not carried over is named, with the reason and the nearest thing to do here.
    """
    from haori.cli.console import notes
    from haori.conversion import import_config
    from haori.core.errors import StorageError

    if out is not None and out.exists():
        raise StorageError(f"{str(out)!r} is there already; give --out a new file.")
    conversion = import_config(file, tool, base=base, data=data, name=name)
    recipe = _commented(conversion, file)
    if out is None:
        typer.echo(recipe, nl=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(recipe, encoding="utf-8")
    for line in _report(conversion):
        notes().print(line, markup=False, soft_wrap=True)
    if out is not None:
        typer.echo(f"Next: haori train {out} --dry-run")


def _commented(conversion: "Conversion", file: Path) -> str:
    """Return the recipe as YAML, with what was left as a comment."""
    import yaml

    left = [f"#   {key}: {said}" for key, said in conversion.left()]
    lines = [f"# From {file.name} of {conversion.tool.title}, by `haori import-config`."]
    lines += ["# Not carried over:", *left] if left else []
    text = yaml.safe_dump(conversion.document, sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, text])


def _report(conversion: "Conversion") -> list[str]:
    lines = [f"{conversion.tool.title}: what became of its keys."]
    for title, rows in (
        ("Carried over:", conversion.carried()),
        (f"Not in the file; {conversion.tool.title} does so by itself, and the recipe says it:", conversion.assumed()),
        ("Not carried over:", conversion.left()),
    ):
        lines += [title, *(f"  {key}: {said}" for key, said in rows)] if rows else []
    for reason, keys in conversion.unneeded():
        lines.append(f"Nothing to carry ({reason}): {', '.join(keys)}")
    return lines
