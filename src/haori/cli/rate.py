"""`haori rate`: which of two pictures is better, asked blindly; wins and strengths of the systems behind them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from haori.evaluation.rating.session import Session
    from haori.images.rated import DrawnSystems
    from haori.images.request import PictureRequest

__all__ = ["rate"]

_ANSWERS = {
    "left": "left", "l": "left", "1": "left", "right": "right", "r": "right", "2": "right", "tie": "tie", "t": "tie",
    "=": "tie", "skip": "skip", "s": "skip", "undo": "undo", "u": "undo", "quit": "quit", "q": "quit",
}  # fmt: skip
_QUESTION = "Which picture is better?"


def rate(
    session: Annotated[Path, typer.Argument(help="Folder of the session: a new one, or one to go on with.")],
    systems: Annotated[
        list[str] | None,
        typer.Option("--system", help="What to draw with: base, lineart:0.7, a:0.4+b:0.6; NAME=... names it."),
    ] = None,
    folders: Annotated[
        list[str] | None, typer.Option("--folder", help="Instead: pictures of one system, as NAME=FOLDER or FOLDER.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Image base to draw with.")] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="What to draw; give it once for each.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompts", help="Text file with a prompt on each line.")] = None,
    seeds: Annotated[str, typer.Option(help="Of the pictures, like 1..3 or 1,5.")] = "0",
    steps: Annotated[int | None, typer.Option(help="Steps of the sampler; 25 if not given.")] = None,
    guidance: Annotated[float | None, typer.Option(help="CFG scale; the pipeline's own if not given.")] = None,
    sampler: Annotated[str | None, typer.Option(help="By A1111's name; the base's own if not given.")] = None,
    negative: Annotated[str | None, typer.Option(help="What the pictures should not show.")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs to rate, taken by chance; all if not given.")] = None,
    order: Annotated[int | None, typer.Option(help="Seed of order and sides; at random if not given.")] = None,
    question: Annotated[str | None, typer.Option(help=f"What raters are asked: {_QUESTION}")] = None,
    rater: Annotated[str, typer.Option(help="Who votes, where several do.")] = "",
    report: Annotated[
        bool, typer.Option("--report", help="Print the results so far, which names the systems.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or auto; on a CPU fp32.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to draw; a GPU where there is one.")] = None,
) -> None:
    """Rate pictures of two or more systems blindly, pair by pair; report wins and Bradley-Terry strengths."""
    from haori.core.errors import InputError
    from haori.evaluation.rating.session import Session

    drawing: dict[str, Any] = {
        "base": base, "prompt": prompts, "prompts": prompt_file, "steps": steps, "guidance": guidance,
        "sampler": sampler, "negative": negative, "dtype": dtype, "device": device,
    }  # fmt: skip
    making = {**drawing, "system": systems, "folder": folders, "pairs": pairs, "order": order, "question": question}
    given = [name for name, value in making.items() if value is not None]
    if given and ((session / "session.json").exists() or report):
        raise InputError(
            f"--{given[0]} is for a new session, and {str(session)!r} is one that is there; leave it out to go on, or "
            "choose another folder."
        )
    if not given:
        opened = Session(session)
    elif folders:
        if wrong := [name for name, value in drawing.items() if value is not None] or (["system"] if systems else []):
            raise InputError(f"--{wrong[0]} is for drawing, and pictures of --folder are drawn already; leave it out.")
        opened = _make(session, *_found(folders), pairs, order, question)
    else:
        settings = {"steps": steps, "guidance": guidance, "sampler": sampler, "negative": negative}
        template = _template({name: value for name, value in settings.items() if value is not None})
        asked = _drawn(systems or [], base, [*(prompts or []), *_lines(prompt_file)], seeds, template, dtype, device)
        opened = _make(session, *asked, pairs, order, question)
    if report or _vote(opened, rater):
        _report(opened)


def _template(settings: dict[str, Any]) -> "PictureRequest":
    from haori.images.request import PictureRequest

    return PictureRequest("", **settings)


def _drawn(
    systems: list[str], base: str | None, prompts: list[str], seeds: str, template: "PictureRequest",
    dtype: str | None, device: str | None,
) -> "tuple[dict[str, str], DrawnSystems]":  # fmt: skip
    from haori.bases import find_base
    from haori.bases.load_errors import check_device
    from haori.core.errors import InputError
    from haori.images.drawing_bar import drawing_bar
    from haori.images.generation import PictureGenerator
    from haori.images.grid import parse_axes
    from haori.images.rated import draw_systems, system_tags

    read = [system_tags(text) for text in systems]
    found = dict(read)
    if len(found) < 2 or len(found) < len(read):
        raise InputError(
            "Rating compares two systems or more with names of their own: --system base --system lineart:0.7, or two "
            "folders with --folder."
        )
    if base is None or not prompts:
        raise InputError("Give a base and prompts to draw: --base emoji-sd --prompt 'a cat', or --prompts FILE.")
    numbers = [int(value) for value in parse_axes([f"seed={seeds}"])[0].values]
    if device is not None:
        check_device(device)
    generator = PictureGenerator(find_base(base), dtype=dtype, device=device)
    with drawing_bar() as on_step:
        return found, draw_systems(generator, found, template, prompts, numbers, on_step)


def _found(texts: list[str]) -> "tuple[dict[str, str], DrawnSystems]":
    from haori.core.errors import InputError
    from haori.images.rated import found_systems

    folders: dict[str, Path] = {}
    for text in texts:
        # A folder may have the sign in its name.
        name, sign, path = text.partition("=")
        folder = Path(text) if not sign or Path(text).is_dir() else Path(path)
        label = folder.name if not sign or Path(text).is_dir() else name
        if label in folders:
            raise InputError(f"Two folders are called {label!r}; give them names: --folder base=FOLDER.")
        folders[label] = folder
    if len(folders) < 2:
        raise InputError("Rating compares two systems or more; give --folder at least twice.")
    return {name: str(path) for name, path in folders.items()}, found_systems(folders)


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    from haori.core.errors import InputError

    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{str(path)!r} is no text in UTF-8; give a file with a prompt on each line.") from None
    if not found:
        raise InputError(f"{str(path)!r} holds no prompts; give a file with one on each line.")
    return found


def _make(
    folder: Path, systems: dict[str, str], work: "DrawnSystems", pairs: int | None, order: int | None,
    question: str | None,
) -> "Session":  # fmt: skip
    import secrets

    from haori.cli.console import results
    from haori.evaluation.rating.session import RatedWork, create_session

    made = create_session(
        folder,
        RatedWork(systems=systems, prompts=work.prompts, notes=work.notes),
        work.pictures,
        seed=secrets.randbelow(1 << 32) if order is None else order,
        most=pairs,
        question=question or _QUESTION,
        drawn=work.files,
    )
    results().print(f"{len(made.document.pairs)} pairs are in {made.folder / 'pairs'}.", markup=False, soft_wrap=True)
    for note in made.key().notes:
        results().print(f"Note: {note}", markup=False, style="yellow")
    return made


def _vote(session: "Session", rater: str) -> bool:
    """Ask for votes; return whether the rater has voted on every pair."""
    from haori.cli.console import results
    from haori.evaluation.rating.votes import Vote

    console, total = results(), len(session.document.pairs)
    while waiting := session.waiting(rater):
        pair = waiting[0]
        console.print(f"\n{total - len(waiting) + 1} of {total}: {pair.prompt}", markup=False)
        console.print(str(session.picture(pair)), markup=False, soft_wrap=True)
        answer = _ask(session.document.question)
        if answer is None or answer == "quit":
            sentence = f"\n{total - len(waiting)} of {total} pairs are rated. Go on: haori rate {session.folder}"
            console.print(sentence, markup=False, soft_wrap=True)
            return False
        if answer != "undo":
            session.vote(Vote(pair=pair.id, rater=rater, choice=answer))
        elif last := session.last(rater):
            session.vote(Vote(pair=last.pair, rater=rater, choice="undo"))
        else:
            console.print("There is no vote to take back.")
    return True


def _ask(question: str) -> Any:
    """Return an answer as it is recorded, `undo` or `quit`; None at the end of the input."""
    from haori.cli.console import results

    while True:
        try:
            text = results().input(f"{question} \\[l]eft, \\[r]ight, \\[t]ie, \\[s]kip, \\[u]ndo, \\[q]uit: ")
        except EOFError:
            return None
        if answer := _ANSWERS.get(text.strip().lower()):
            return answer
        results().print(f"{text.strip()[:40]!r} is no answer; type one of the letters in brackets.", markup=False)


def _report(session: "Session") -> None:
    from haori.cli.console import results
    from haori.core.storage import write_text
    from haori.evaluation.rating.show import show_rating

    found = session.results()
    path = session.folder / "results.json"
    write_text(path, found.model_dump_json(indent=1) + "\n")
    show_rating(found, results())
    results().print(f"Written to {path}.", markup=False, soft_wrap=True)
