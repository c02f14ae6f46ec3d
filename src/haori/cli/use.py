"""`haori chat`, `haori generate-text` and `haori merge`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from haori.library import OpenAdapter

__all__ = ["chat", "generate_text", "merge"]

_Name = Annotated[str, typer.Argument(help="Adapter in the library: name or name@version.")]
_Base = Annotated[str | None, typer.Option(help="Base to use; by default the one on the adapter's card.")]
_Other = Annotated[
    bool,
    typer.Option("--allow-different-weights", help="Accept a base of the same structure with other weights."),
]
_MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
_Temperature = Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")]
_TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Sample from the likeliest tokens of this total share.")]
_Seed = Annotated[int | None, typer.Option(help="Seed of sampling.")]
_System = Annotated[str | None, typer.Option(help="System message; by default the one trained with.")]

_HELP = "/base talks to the bare base and back, /reset forgets the conversation, /quit leaves."


def chat(
    name: _Name,
    base: _Base = None,
    system: _System = None,
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = None,
    allow_different_weights: _Other = False,
) -> None:
    """Talk to an adapter in the terminal; /base switches it off for comparison."""
    from haori.cli.console import results

    opened = _open(name, base, system, allow_different_weights)
    settings: dict[str, Any] = {"max_new_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    console = results()
    console.print(f"[bold]{opened.adapter.name}[/] on {opened.base.name}. {_HELP}")
    messages: list[Any] = []
    with_adapter = True
    while (text := _ask(console)) is not None:
        command = text.strip().lower()
        if command in {"/quit", "/exit"}:
            break
        if command == "/base":
            with_adapter = not with_adapter
            console.print(f"[dim]now talking to {'the adapter' if with_adapter else 'the bare base'}[/]")
        elif command == "/reset":
            messages = []
            console.print("[dim]conversation forgotten[/]")
        elif command.startswith("/"):
            console.print(f"[dim]{_HELP}[/]")
        elif text.strip():
            console.print(f"[bold]{name if with_adapter else opened.base.name}[/] ", end="")
            messages = _exchange(opened, messages, text, with_adapter, settings)


def generate_text(
    name: _Name,
    prompt: Annotated[str, typer.Option(help="What the user says; '-' reads standard input.")],
    base: _Base = None,
    system: _System = None,
    max_tokens: _MaxTokens = 256,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    seed: _Seed = None,
    allow_different_weights: _Other = False,
) -> None:
    """Print one answer of an adapter."""
    import sys

    text = sys.stdin.read() if prompt == "-" else prompt
    opened = _open(name, base, system, allow_different_weights)
    typer.echo(
        opened.answer(
            text,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
    )


def merge(
    name: _Name,
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    base: _Base = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 (the default) or fp16, for a model merged in memory.")] = None,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Merge tensor by tensor on disk, as for images and models larger than memory."),
    ] = False,
    allow_different_weights: _Other = False,
) -> None:
    """Write base and adapter as one model, and prove that it is what they are together."""
    from contextlib import nullcontext

    from haori.cli.console import notes, results
    from haori.library import Library, base_of, merge_stored
    from haori.library.checkpoints.stored import needs_disk

    stream = stream or needs_disk(base_of(Library().get(name).card, base))
    # On disk there are bars instead, which say how far it is.
    with nullcontext() if stream else notes().status("merging and checking"):
        merged = merge_stored(
            name, out, base_spec=base, dtype=dtype, stream=stream, allow_different_weights=allow_different_weights
        )
    results().print(f"Written to {merged}.", soft_wrap=True)


def _exchange(
    opened: "OpenAdapter", messages: list[Any], text: str, with_adapter: bool, settings: dict[str, Any]
) -> list[Any]:
    """Print the answer to `text` as it is made and return the longer conversation; Ctrl-C ends the answer early."""
    from haori.bases import stream
    from haori.cli.console import results
    from haori.core.errors import InputError

    console = results()
    asked = [*messages, {"role": "user", "content": text}]
    answer = ""
    try:
        with opened.strength(with_adapter):
            for piece in stream(opened.model, opened.tokenizer, opened.prompts.prompt(asked), **settings):
                answer += piece
                console.file.write(piece)
                console.file.flush()
    except InputError as error:
        console.print(f"[yellow]{error} /reset begins a new conversation.[/]")
        return messages
    except KeyboardInterrupt:
        pass
    console.print()
    return [*asked, {"role": "assistant", "content": answer}]


def _open(name: str, base: str | None, system: str | None, allow_different_weights: bool) -> "OpenAdapter":
    """Open an adapter; a system message that is given takes the place of the trained one, an empty one means none."""
    from haori.library import Library, open_adapter
    from haori.library.opened import require_writer

    require_writer(Library().get(name))  # before weights are loaded
    opened = open_adapter(name, base_spec=base, allow_different_weights=allow_different_weights)
    return (
        opened
        if system is None
        else replace(opened, prompts=replace(opened.prompts, systems=(system,) if system else ()))
    )


def _ask(console: Any) -> str | None:
    """Read a line; None at end of input or Ctrl-C."""
    try:
        return str(console.input("[bold]you[/] "))
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
