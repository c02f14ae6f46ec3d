"""`haori library mount`, `unmount` and `mounts`: folders of LoRA files that are listed and found in place."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from haori.library.mounts.mounts import Scan

__all__ = ["mount", "mounts", "unmount"]


def mount(
    folder: Annotated[Path, typer.Argument(help="Folder of LoRA files, such as models/Lora; nothing is copied.")],
    name: Annotated[str | None, typer.Option(help="What its names begin with; by default the folder's name.")] = None,
) -> None:
    """List and find the LoRA files in a folder where they are."""
    from haori.library import Library

    scan = Library().mounts.add(folder, name)
    _print_scans([scan])


def unmount(name: Annotated[str, typer.Argument(help="Name of the mount.")]) -> None:
    """Forget a mounted folder; its files stay as they are."""
    from haori.cli.console import results
    from haori.library import Library

    folder = Library().mounts.remove(name)
    results().print(f"{name} is no longer mounted; {folder} is as it was.", markup=False, soft_wrap=True)


def mounts(
    hashes: Annotated[
        bool, typer.Option("--hash", help="Read every file in full, so that it is found by its hashes.")
    ] = False,
) -> None:
    """Show the mounted folders, after looking through them for changes."""
    from haori.cli.console import results
    from haori.library import Library

    held = Library().mounts
    scans = held.rescan()
    if not scans:
        results().print("Nothing is mounted; `haori library mount FOLDER` does it.")
        return
    _print_scans(scans)
    if hashes:
        results().print(f"{held.hash_all():,} files were hashed.")


def _print_scans(scans: "list[Scan] | tuple[Scan, ...]") -> None:
    from rich.table import Column, Table
    from rich.text import Text

    from haori.cli.console import results

    table = Table("mount", Column("folder", overflow="fold"), Column("files", justify="right"))
    for scan in scans:
        table.add_row(Text(scan.mount), Text(str(scan.path)), f"{scan.files:,}")
    results().print(table)
    for problem in (problem for scan in scans for problem in scan.problems):
        results().print(problem, style="yellow", markup=False, soft_wrap=True)
