"""A conversion as text: the recipe with comments on what is not in it, and what became of every key."""

import yaml

from haori.conversion.convert import Conversion, printable

__all__ = ["commented_recipe", "report_lines"]


def commented_recipe(conversion: Conversion, file_name: str) -> str:
    """Return the recipe as YAML, with the keys that were left as comments."""
    left = [f"#   {key}: {said}" for key, said in conversion.left()]
    lines = [f"# From {printable(file_name)} of {conversion.tool.title}, by `haori import-config`."]
    lines += ["# Not carried over:", *left] if left else []
    text = yaml.safe_dump(conversion.document, sort_keys=False, allow_unicode=True)
    return "\n".join([*lines, text])


def report_lines(conversion: Conversion) -> list[str]:
    """Return what became of each key, one line each; those that need nothing together, by the reason."""
    title = conversion.tool.title
    lines = [f"{title}: what became of its keys."]
    for heading, rows in (
        ("Carried over:", conversion.carried()),
        (f"Not in the file; {title} does so by itself, and the recipe says it:", conversion.assumed()),
        ("Not carried over:", conversion.left()),
    ):
        lines += [heading, *(f"  {key}: {said}" for key, said in rows)] if rows else []
    for reason, keys in conversion.unneeded():
        lines.append(f"Nothing to carry ({reason}): {', '.join(keys)}")
    return lines
