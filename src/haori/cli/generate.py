"""`haori generate`: pictures from a prompt with tags, a sheet over strengths and seeds, or a picture once more."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from haori.bases import Base
    from haori.images.generation import DrawnPicture, PictureGenerator
    from haori.images.request import PictureRequest

__all__ = ["generate"]

_AXIS = re.compile(r"(strength|epoch|seed|steps|guidance)=")


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to draw, with adapters as <lora:NAME:0.7>; several are drawn together."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Image base to draw with: name, folder, hub id or file; that of the adapters if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("pictures"),
    n: Annotated[int | None, typer.Option("--n", "-n", help="Pictures of each prompt; 1 if not given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; drawn at random if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; 25 if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="CFG scale; the pipeline's own if not given.")] = None,
    sampler: Annotated[str | None, typer.Option(help="By A1111's name, like 'Euler a'; the base's own if not.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Schedule type by A1111's name, like Karras.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the pictures should not show.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, like 512x768; the base's own if not given.")] = None,
    init: Annotated[Path | None, typer.Option(help="Picture to begin from (img2img).")] = None,
    mask: Annotated[Path | None, typer.Option(help="Where it is drawn anew (inpainting): white parts.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of it is drawn anew, to 1; 0.75.")] = None,
    hires: Annotated[float | None, typer.Option(help="Enlarge by this factor and draw anew (hires fix).")] = None,
    hires_strength: Annotated[float | None, typer.Option(help="How much is drawn anew then, to 1; 0.7.")] = None,
    hires_steps: Annotated[int | None, typer.Option(help="Steps of that; as many as before if not given.")] = None,
    upscaler: Annotated[str | None, typer.Option(help="Lanczos, Nearest, Latent or another of A1111's.")] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="One labelled sheet: strength=0.4,0.7 epoch=1..5 seed=1..3 (one to three axes)."),
    ] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Draw this PNG again, from its own text.")] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out what cannot be used, and say so.")] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or auto; on a CPU fp32.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to draw; a GPU where there is one.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Pictures that are drawn at once.")] = 4,
) -> None:
    """Draw pictures; each PNG says how it was made, and can be drawn again from that."""
    from haori.core.errors import InputError

    options: dict[str, Any] = {
        "count": n, "seed": seed, "steps": steps, "guidance": guidance, "sampler": sampler, "schedule": schedule,
        "negative": negative, "size": size, "strength": strength, "hires": hires, "hires_strength": hires_strength,
        "hires_steps": hires_steps, "upscaler": upscaler,
    }  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    if source is not None:
        if prompts or grid or given:
            named = "prompt" if prompts else "grid" if grid else next(iter(given)).replace("_", "-")
            raise InputError(f"--from draws a picture as it was; leave {named!r} out, or give a prompt without --from.")
        _repeat(source, base, out, _picture(init), _mask(mask), lenient, dtype, device)
        return
    if not prompts:
        raise InputError('Give a prompt and a base: haori generate "a smiling cat" --base emoji-sd')
    # A shell gives the axes that follow the first as words of their own.
    texts = [*grid, *(text for text in prompts if _AXIS.match(text))] if grid else []
    prompts = [text for text in prompts if text not in texts]
    if not prompts:
        raise InputError("Give a prompt beside the axes of the grid.")
    requests = _requests(prompts, given, _picture(init), _mask(mask), lenient)
    _draw(requests, texts, out, partial(_generator, _base(base, prompts, lenient=lenient), dtype, device, batch))


def _draw(
    requests: "list[PictureRequest]", axes_texts: list[str], out: Path, load: "Callable[[], PictureGenerator]"
) -> None:
    from haori.core.errors import InputError
    from haori.images.drawing_bar import drawing_bar
    from haori.images.grid import grid_requests, grid_sheet, parse_axes

    axes = parse_axes(axes_texts)
    prompt = requests[0].prompt
    if axes:
        if len(requests) != 1:
            raise InputError(f"A grid is of one prompt, and {len(requests)} were given.")
        requests = grid_requests(requests[0], axes)
    generator = load()
    with drawing_bar() as on_step:
        drawn = generator.draw(requests, on_step)
    files = _write(drawn, out)
    if axes:
        _write_sheet(grid_sheet(drawn, axes, prompt), files[0])


def _requests(
    prompts: list[str], given: dict[str, Any], init: "Image | None", mask: "Image | None", lenient: bool
) -> "list[PictureRequest]":
    """Return a request for each prompt, checked before anything is loaded."""
    import secrets

    from haori.core.errors import InputError
    from haori.images.request import Hires, PictureRequest
    from haori.images.tags import parse_prompt

    settings = {
        key: given[key] for key in given.keys() - {"size", "hires", "hires_strength", "hires_steps", "upscaler"}
    }
    settings.setdefault("seed", secrets.randbelow(1 << 32))
    if "size" in given:
        settings["width"], settings["height"] = _read_size(given["size"])
    passed = {"strength": "hires_strength", "steps": "hires_steps", "upscaler": "upscaler"}
    second = {key: given[name] for key, name in passed.items() if name in given}
    if "hires" in given:
        settings["hires"] = Hires(given["hires"], **second)
    elif second:
        raise InputError("These settings are of the hires fix; give its factor too, as in --hires 2.")
    if init is None and "strength" in given:
        raise InputError("--strength says how much of a picture is drawn anew; give that picture with --init.")
    found = [PictureRequest(prompt, init=init, mask=mask, lenient=lenient, **settings) for prompt in prompts]
    for prompt in prompts:
        parse_prompt(prompt, lenient=lenient)
    return found


def _read_size(text: str) -> tuple[int, int]:
    from haori.core.errors import InputError

    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise InputError(f"The size {text[:40]!r} cannot be read; give width and height in pixels, like 512x768.")
    return int(match[1]), int(match[2])


def _picture(path: Path | None) -> "Image | None":
    from haori.data.pictures.opening import open_picture

    return None if path is None else open_picture(path, repr(str(path))).image


def _mask(path: Path | None) -> "Image | None":
    from haori.data.pictures.opening import open_mask

    return None if path is None else open_mask(path, repr(str(path)))


def _base(spec: str | None, prompts: list[str], *, lenient: bool) -> "Base":
    """Find the base that is given, or else the one that the adapters in the prompts were made on."""
    from haori.bases import find_base
    from haori.core.errors import InputError
    from haori.images.tags import parse_prompt
    from haori.library import Library, base_of

    if spec is not None:
        return find_base(spec)
    tags = dict.fromkeys(tag.name for text in prompts for tag in parse_prompt(text, lenient=lenient).tags)
    if not tags:
        raise InputError(
            'No adapter in the prompt tells the base; give it: haori generate "a smiling cat" --base emoji-sd'
        )
    found = {base.id: base for base in (base_of(Library().get(name).card) for name in tags)}
    if len(found) > 1:
        names = " and ".join(repr(base.name) for base in found.values())
        raise InputError(f"The adapters in the prompt were made on {names}; choose one with --base.")
    return next(iter(found.values()))


def _generator(base: "Base", dtype: str | None, device: str | None, batch: int) -> "PictureGenerator":
    from haori.bases.load_errors import check_device
    from haori.images.generation import PictureGenerator

    if device is not None:
        check_device(device)
    return PictureGenerator(base, dtype=dtype, device=device, batch=batch)


def _repeat(
    source: Path, base: str | None, out: Path, init: "Image | None", mask: "Image | None", lenient: bool,
    dtype: str | None, device: str | None,
) -> None:  # fmt: skip
    from haori.cli.console import results
    from haori.core.errors import InputError
    from haori.images.drawing_bar import drawing_bar
    from haori.images.repeating import read_recorded, repeat

    recorded = read_recorded(source, lenient=lenient)
    name = base or recorded.model
    if name is None:
        raise InputError(f"{str(source)!r} does not say which base it was drawn with; give it with --base.")
    generator = _generator(
        _base(name, [], lenient=lenient), dtype or recorded.dtype or "fp32", device, recorded.batch[0]
    )
    with drawing_bar() as on_step:
        done = repeat(source, recorded, generator, init=init, mask=mask, on_step=on_step)
    _write([done.picture], out)
    results().print(done.difference or "Its pixels are those of the picture it was drawn from.", markup=False)


def _write_sheet(sheet: "Image", first: Path) -> None:
    from rich.text import Text

    from haori.cli.console import results
    from haori.core.storage import staged_file

    path = first.with_name(f"{first.name[:5]}-grid.png")
    with staged_file(path) as stage:
        sheet.save(stage, format="PNG")
    results().print(Text(f"Written to {path}: all of them on one sheet."), soft_wrap=True)


def _write(drawn: "list[DrawnPicture]", out: Path) -> list[Path]:
    from rich.text import Text

    from haori.cli.console import results
    from haori.core.storage import make_folder, staged_file

    make_folder(out)
    taken = [int(path.name[:5]) for path in out.glob("[0-9]" * 5 + "-*.png")]
    files = []
    for number, picture in enumerate(drawn, max(taken, default=-1) + 1):
        path = out / f"{number:05d}-{picture.seed}.png"
        with staged_file(path) as stage:
            stage.write_bytes(picture.png())
        files.append(path)
        results().print(Text(f"Written to {path}."), soft_wrap=True)
    for note in dict.fromkeys(note for picture in drawn for note in picture.notes):
        results().print(Text(f"Note: {note}", style="yellow"))
    return files
