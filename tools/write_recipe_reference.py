"""Writes docs/guide/recipe.md from the recipe's JSON schema (`haori schema`); `--check` only compares.

The descriptions stand in src/haori/tasks, src/haori/data/section.py and src/haori/core/methods.py. A test keeps the
committed page up to date.
"""

import sys
from pathlib import Path
from typing import Any

from haori.tasks.recipe import recipe_schema

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "recipe.md"

INTRODUCTION = """\
# Recipe reference

<!-- Written by tools/write_recipe_reference.py from `haori schema`; the descriptions stand in src/haori. -->

A recipe is one YAML file with every choice of a training run. Only `name`, `base` and `data.path` are required:

```yaml
name: support
base: smollm2-135m-instruct
data:
  path: my.jsonl
method:
  rank: 16
optimizer:
  lr: 2e-4
training:
  epochs: 3
```

- `haori train recipe.yaml` runs it. `--set optimizer.lr=1e-4` overrides any key, and may be given several times.
- Keys are strict: an unknown key is an error that names the nearest known one.
- `auto` is replaced when the run starts, by the rules in [choosing settings](choosing-settings.md). Each choice is
  printed with its reason, and the recipe in the run folder holds the resolved values.
- `haori schema` prints the JSON schema that this page is made from, for editors that check YAML.
"""


def kind_of(field: dict[str, Any]) -> str:
    """Say in words what a field takes."""
    if "anyOf" in field:
        return " or ".join(kind_of(option) for option in field["anyOf"])
    if "$ref" in field:
        return "table"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {kind_of(field['items'])}" if "items" in field else "list"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"table of {kind_of(field['additionalProperties'])}"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "none"}
    words["object"] = "table"
    limits = ((">=", "minimum"), (">", "exclusiveMinimum"), ("<=", "maximum"), ("<", "exclusiveMaximum"))
    bounds = [f"{sign} {field[key]:g}" for sign, key in limits if key in field]
    return " ".join([words.get(kind, str(kind)), *([", ".join(bounds)] if bounds else [])])


def default_of(name: str, field: dict[str, Any], required: list[str]) -> str:
    """Write a field's default as YAML would."""
    if name in required:
        return "required"
    value = field.get("default")
    if value in (None, [], {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def reference_of(field: dict[str, Any]) -> str | None:
    """Return the name of the section that a field holds, if it holds one."""
    for option in (field, *field.get("anyOf", [])):
        if "$ref" in option:
            return str(option["$ref"]).rpartition("/")[2]
    return None


def section(title: str, schema: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> list[str]:
    """Return the lines of a section and of the sections inside it."""
    lines = [f"## {title}", "", *([schema["description"], ""] if "description" in schema else [])]
    lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
    inside: list[str] = []
    for name, field in schema["properties"].items():
        if "oneOf" in field:
            inside += union(f"{prefix}{name}", field["oneOf"], definitions)
            continue
        found = reference_of(field)
        if found is not None:
            inside += section(f"`{prefix}{name}`", definitions[found], f"{prefix}{name}.", definitions)
            if "description" not in field:
                continue
        default = default_of(name, field, schema.get("required", []))
        cells = (f"`{prefix}{name}`", kind_of(field), default, field.get("description", ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, "", *inside]


def union(key: str, options: list[dict[str, Any]], definitions: dict[str, Any]) -> list[str]:
    """Return a section for each variant of a field, in the order of the variants."""
    lines: list[str] = []
    for option in options:
        schema = definitions[str(option["$ref"]).rpartition("/")[2]]
        kind = schema["properties"]["kind"]
        ordered = {"kind": kind, **{name: field for name, field in schema["properties"].items() if name != "kind"}}
        title = f"`{key}`, kind `{kind['const']}`"
        lines += section(title, {**schema, "properties": ordered}, f"{key}.", definitions)
    return lines


def own_sections(title: str, schema: dict[str, Any], usual: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """Return what a task's recipe has that the usual one has not: keys, and whole sections of its own."""
    fields = {name: field for name, field in schema["properties"].items() if usual["properties"].get(name) != field}
    fields = {name: field for name, field in fields.items() if name != "task"}
    return section(title, {**schema, "properties": fields}, "", definitions)


def page() -> str:
    """Return the whole page."""
    schema = recipe_schema()
    definitions = schema["$defs"]
    if "oneOf" not in schema:
        return INTRODUCTION + "\n" + "\n".join(section("The recipe", schema, "", definitions)).rstrip() + "\n"
    by_task = {task: definitions[ref.rpartition("/")[2]] for task, ref in schema["discriminator"]["mapping"].items()}
    usual = by_task.pop("causal_lm")
    lines = section("The recipe", usual, "", definitions)
    for task, own in by_task.items():
        lines += own_sections(f"Task `{task}`", own, usual, definitions)
    return INTRODUCTION + "\n" + "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write the page, or with `--check` return 1 if the file differs."""
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
