"""`haori library convert-pickle`: tensors out of a .pt, .bin or .ckpt file, without running what is in it."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert_pickle"]


def convert_pickle(
    file: Annotated[Path, typer.Argument(help="A pickled checkpoint: .pt, .pth, .bin, .ckpt.")],
    out: Annotated[Path, typer.Option(help="New file to write, ending in .safetensors.")],
) -> None:
    """Write the tensors of a pickle as safetensors, in a process with limits that reads nothing but tensors."""
    from haori.cli.console import results
    from haori.library.pickles.converting import convert_pickle as convert

    made = convert(file, out)
    results().print(f"{made.tensors} tensors are in {made.path}.", markup=False, soft_wrap=True)
    if made.left_out:
        shown = ", ".join(repr(name) for name in made.left_out[:10])
        more = f" and {len(made.left_out) - 10} more" if len(made.left_out) > 10 else ""
        results().print(f"Left out, as they are no tensors by name: {shown}{more}.", markup=False)
