"""`haori data caption`: captions for pictures, by a model that says what they show."""

from typing import Annotated, Literal

import typer

__all__ = ["caption"]

_SHOWN = 10


def caption(
    folder: Annotated[str, typer.Argument(help="Folder of pictures.")],
    model: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of an image-text model (BLIP, GIT, Qwen-VL), or of an image classifier for tags."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="What an image-text model is asked, or what its captions begin with.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least probability of a tag, for classifiers.")
    ] = 0.35,
    max_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Longest caption in tokens.")] = 60,
    ending: Annotated[Literal[".txt", ".caption"], typer.Option(help="Ending of the caption files.")] = ".txt",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions that are there.")] = False,
    device: Annotated[str | None, typer.Option(help="Where the model runs; a GPU where there is one.")] = None,
) -> None:
    """Write a caption beside each picture that has none.

    Ends with 1 when a picture could not be captioned.
    """
    from rich.table import Table
    from rich.text import Text

    from haori.bases import default_device
    from haori.bases.load_errors import check_device
    from haori.cli.console import results
    from haori.data.pictures.captioners import open_captioner
    from haori.data.pictures.captioning import caption_folder, pictures_to_caption

    files = pictures_to_caption(folder)
    place = device or default_device()
    check_device(place)
    captioner = open_captioner(model, prompt=prompt, max_tokens=max_tokens, threshold=threshold, device=place)
    done = caption_folder(files, captioner, ending=ending, overwrite=overwrite)
    if done.written:
        table = Table("File", "Caption")
        for path, text in done.written[:_SHOWN]:
            table.add_row(Text(path.name), Text(text))
        results().print(table)
    kept = f" {len(done.kept):,} had one and keep it (--overwrite replaces them)." if done.kept else ""
    results().print(f"Captions written: {len(done.written):,} of {len(files):,} pictures.{kept} Read and mend them.")
    for problem in done.problems:
        results().print(Text(f"Problem: {problem}", style="red"))
    if done.problems:
        raise typer.Exit(1)
