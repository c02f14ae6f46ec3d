"""Writes the tables of samplers into docs/guide/generate.md and its translation; --check compares."""

import re
import sys
from pathlib import Path

from haori.images.samplers import SAMPLERS, SCHEDULES

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
HEADS = {
    "generate.md": ("| sampler | scheduler of diffusers | `Automatic` is |", "the base's own spacing"),
    "generate.ja.md": ("| サンプラー | diffusers のスケジューラー | `Automatic` の意味 |", "ベースモデル本来の間隔"),
}


def tables(page: str) -> str:
    head, own = HEADS[page]
    rows = [head, "|---|---|---|"]
    for one in SAMPLERS:
        options = ", ".join(f"`{key}={value}`" for key, value in one.options.items())
        rows.append(f"| {one.name} | {one.scheduler}{', ' if options else ''}{options} | {one.automatic or own} |")
    schedules = [
        f"| {name} | {', '.join(f'`{key}={value}`' for key, value in options.items())} |"
        for name, options in SCHEDULES.items()
        if options
    ]
    second = "| schedule type | option |" if page == "generate.md" else "| スケジュール | 設定 |"
    return "\n".join([*rows, "", second, "|---|---|", *schedules])


def main() -> int:
    old = False
    for page in HEADS:
        path = GUIDE / page
        text = path.read_text("utf-8")
        new = re.sub(
            r"(<!-- samplers:begin -->\n).*?(\n<!-- samplers:end -->)",
            lambda match, page=page: f"{match[1]}{tables(page)}{match[2]}",
            text,
            flags=re.S,
        )
        old |= new != text
        if "--check" not in sys.argv:
            path.write_text(new, "utf-8")
    return int(old and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
