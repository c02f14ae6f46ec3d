"""`haori library`: adapters kept with their base, data, licence and proof."""

from pathlib import Path
from typing import Annotated

import typer

from haori.cli import compatibility, convert_pickle, exchange, mounts, provenance, signing
from haori.cli.checkpoints import add_trained

__all__ = ["app", "print_meaning"]

app = typer.Typer(
    help="Adapters: list, show, search, add, verify, licence, lineage, check, promote, export, remove.",
    no_args_is_help=True,
)
app.command("licence")(provenance.licence)
app.command("lineage")(provenance.lineage)
app.command("model-card")(provenance.model_card)
app.command("check")(compatibility.check)
app.command("convert-pickle")(convert_pickle.convert_pickle)
app.command("push")(exchange.push)
app.command("sign")(signing.sign)
app.command("verify-signature")(signing.verify_signature)
for command in (mounts.mount, mounts.unmount, mounts.mounts):
    app.command()(command)
_Name = Annotated[str, typer.Argument(help="Name, name@version, or the first digits of an id.")]


@app.command("list")
def list_command() -> None:
    """List the adapters."""
    from haori.cli.library_search import print_search

    print_search("")


@app.command()
def search(
    words: Annotated[
        list[str],
        typer.Argument(
            help="Words to look for; base:, licence:, tag:, trigger:, method:, mount:; accuracy>0.8, rank<=8."
        ),
    ],
) -> None:
    """Find adapters by words, by fields such as base:sd15, and by figures such as 'accuracy>0.8'."""
    from haori.cli.library_search import print_search

    print_search(" ".join(f'"{word}"' if " " in word and '"' not in word else word for word in words))


@app.command()
def show(name: _Name, json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False) -> None:
    """Show an adapter's card."""
    from haori.cli.console import results
    from haori.library import Library, card_table

    stored = Library().get(name)
    if json:
        typer.echo(stored.card.model_dump_json(indent=2))
    else:
        results().print(card_table(stored))


@app.command()
def add(
    path: Annotated[
        str,
        typer.Argument(
            help="A PEFT folder or a file (kohya, diffusers, LyCORIS, ComfyUI, GGUF and others), or where one is: "
            "hub:OWNER/REPO, civitai:VERSION_ID (with CIVITAI_API_TOKEN set, where it asks for a login), https://...; "
            "or a checkpoint of the training API on this machine, tinker://RUN/weights/NAME."
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="The base it was trained on; image adapters and checkpoints can be added without."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name in the library; by default that of the file or checkpoint.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the adapter (SPDX id).")] = None,
    allow_url: Annotated[bool, typer.Option("--allow-url", help="Fetch from a plain https URL, too.")] = False,
) -> None:
    """Add an adapter made elsewhere, after proving it: on its base, or for pictures from the file alone."""
    from haori.bases import find_base
    from haori.cli.console import results
    from haori.cli.exchange import given_files
    from haori.library import card_table, import_adapter, name_for
    from haori.library.adapter_files import adapters_below
    from haori.library.stated import Stated

    if path.startswith("tinker://"):
        print_meaning(add_trained(path, base=base, name=name, licence=licence))
        return
    found = find_base(base) if base is not None else None
    with given_files(path, allow_url=allow_url) as given:
        stated = Stated(licence=licence).before(given.said)
        stored = import_adapter(given.path, found, name=name or name_for(given.called), stated=stated)
        below = adapters_below(given.path)
    card = stored.card
    assert card.verification is not None
    results().print(f"[bold green]{stored.name}[/] is in the library: {len(card.verification.checks)} checks passed.")
    if card.format != "peft":
        results().print(card_table(stored))
        for check in card.verification.checks:
            results().print(f"{check.name}: {check.detail}.", markup=False)
    elif licence is None and card.licence is not None:
        results().print(f"Licence, as the adapter's folder states it: {card.licence}.", markup=False)
    if below:
        names = ", ".join(repr(path.name) for path in below[:20])
        results().print(
            f"Not added: the adapters in its sub-folders, {names}. Add each by its own folder and name.", markup=False
        )
    print_meaning(stored.name)


@app.command()
def verify(
    name: _Name,
    base: Annotated[str | None, typer.Option(help="Base to verify against; by default the one on the card.")] = None,
) -> None:
    """Prove again that a stored adapter works; exit code 1 if it does not."""
    from haori.cli.console import results
    from haori.library import Library, require_passed, verification_table, verify_stored

    verification = verify_stored(Library(), name, base_spec=base)
    results().print(verification_table(verification))
    require_passed(verification)


@app.command()
def promote(name: Annotated[str, typer.Argument(help="Name with version, such as support@3.")]) -> None:
    """Make a bare name mean this version, until another is promoted."""
    from haori.cli.console import results
    from haori.library import Library

    stored = Library().promote(name)
    results().print(
        f"[bold]{stored.name.partition('@')[0]}[/] means [bold green]{stored.name}[/] from now on. New versions do not "
        "take its place until they are promoted."
    )


@app.command()
def rollback(name: Annotated[str, typer.Argument(help="Name without version.")]) -> None:
    """Make a bare name mean what it did before its last promotion."""
    from haori.cli.console import results
    from haori.library import Library

    stored = Library().rollback(name)
    results().print(f"[bold]{name}[/] means [bold green]{stored.name}[/] again.")


@app.command()
def export(
    name: _Name,
    out: Annotated[Path, typer.Option(help="New folder, or new file ending in .safetensors or .gguf.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="peft, diffusers, kohya, comfyui, onetrainer or gguf; by default the one that it is kept in.",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base to prove it on; by default the one on the card.")] = None,
) -> None:
    """Write an adapter for other tools, after proving that what is written does what is stored."""
    from haori.cli.console import results
    from haori.library import Library, ancestors, effective_licence, export_in_format, export_stored, licence_line

    stored = Library().get(name)
    wanted = to or stored.card.format
    if wanted == "peft":
        written = export_stored(name, out, base_spec=base)
    else:
        written = export_in_format(name, out, wanted, base_spec=base)
    results().print(f"Written to {written}.", soft_wrap=True)
    verdict = effective_licence(stored.card, ancestors(stored))
    results().print(licence_line(verdict), markup=False, soft_wrap=True)


@app.command()
def remove(name: _Name) -> None:
    """Remove a name; the adapter goes with its last name."""
    from haori.cli.console import results
    from haori.library import Library

    removed = Library().remove(name)
    results().print(f"Removed: {', '.join(removed)}.")
    for full in removed:
        print_meaning(full)


@app.command()
def rebuild() -> None:
    """Recreate the index from the adapters' folders."""
    from haori.cli.console import results
    from haori.library import Library

    rebuilt = Library().rebuild()
    for problem in rebuilt.problems:
        results().print(f"[yellow]{problem}[/]")
    results().print(f"The index holds {rebuilt.adapters} adapters.")


def print_meaning(full: str) -> None:
    """Say what a bare name means, if it is another version than `full`, which was added or removed."""
    from haori.cli.console import results
    from haori.library import Library

    name = full.partition("@")[0]
    names = Library().names()
    held = {f"{name}@{row.version}" for row in names.versions(name)}
    if not held or (meant := f"{name}@{names.find(name).version}") == full:
        return
    change = f"; `haori library promote {full}` makes it mean the new one" if full in held else ""
    results().print(f"[bold]{name}[/] means {meant}{change}.")
