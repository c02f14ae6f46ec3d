"""Puts checkpoints of training runs into the library: proved like any adapter, with what was done to them.

Nothing of a checkpoint that fails its proof stays in the library.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.client_runs import ClientRun
from haori.core.errors import BaseError, FileFormatError, InputError, MismatchError
from haori.core.events import EventSink
from haori.core.lock import file_lock
from haori.core.records import DataReference
from haori.jobs.sessions.library_saves import LIBRARY_KEY

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.jobs.tenants.files import Session
    from haori.library import StoredAdapter

__all__ = ["add_checkpoint", "add_saved", "base_of_checkpoint", "name_of_checkpoint"]

_PROOF_WAIT_S = 600.0  # for the proof of a server that was killed, whose process ends a moment later


def base_of_checkpoint(folder: Path) -> "Base":
    """Return the base that a checkpoint was trained over, by its name.

    Raises:
        InputError: It is not found by that.
    """
    from haori.bases import find_base
    from haori.library import inspect_adapter

    name = str(inspect_adapter(folder).config.get("base_model_name_or_path"))
    try:
        return find_base(name)
    except BaseError:
        raise InputError(
            f"The checkpoint was trained over the base {name!r}, which is not found by that name; give it with --base."
        ) from None


def name_of_checkpoint(folder: Path) -> str:
    """Return what a checkpoint is called in the library: what its run asked for, or else as its folder.

    Raises:
        FileFormatError: What it says of itself is damaged.
    """
    from haori.jobs.tenants.files import read_session
    from haori.library import name_for

    session = read_session(folder)
    asked = None if session is None or not session.runs else (session.runs[-1].metadata or {}).get(LIBRARY_KEY)
    return asked if isinstance(asked, str) else name_for(folder)


def add_saved(arguments: dict[str, Any], on_event: EventSink) -> dict[str, Any]:
    """Add a checkpoint that a server has just saved, unless it was added before; returns its name with version.

    Args:
        arguments: `folder`, `base`, `name`; `checkpoint` and `request`, which say what was saved; and `lock`, a file
            that one such process holds at a time.
        on_event: Receives nothing.

    Raises:
        HaoriError: As `add_checkpoint`.
    """
    from haori.bases import find_base

    checkpoint, request = arguments["checkpoint"], arguments["request"]
    with file_lock(Path(arguments["lock"]), holds="proofs of checkpoints", timeout_s=_PROOF_WAIT_S):
        before = _added_before(arguments["name"], checkpoint, request)
        if before is None:
            folder, base = Path(arguments["folder"]), find_base(arguments["base"])
            before = add_checkpoint(folder, base, name=arguments["name"], request=request).name
    return {"name": before}


def _added_before(name: str, checkpoint: str, request: int) -> str | None:
    """Return the version that a request made before its server was killed; its weights may differ in the last bits."""
    from haori.library import Library
    from haori.library.cards import read_card

    library = Library()
    for row in sorted(library.names().versions(name), key=lambda row: -row.version):
        card = read_card(library.folder(row.adapter))
        if card is not None and card.client_runs:
            last = card.client_runs[-1]
            if (last.checkpoint, last.request) == (checkpoint, request):
                return f"{name}@{row.version}"
    return None


def add_checkpoint(
    folder: Path, base: "Base", *, name: str, licence: str | None = None, request: int | None = None
) -> "StoredAdapter":  # fmt: skip
    """Prove a checkpoint and store it as the next version of a name, with its lineage.

    Args:
        folder: As a training session saved it.
        base: What it was trained over.
        name: In the library, without version.
        licence: The terms of whoever trained it, for the rows that they sent and the adapter; by default the rows'
            are unknown, and the adapter's follow from base, rows and the library adapter it began with.
        request: The request that saved it, where no other may have replaced it since.

    Raises:
        FileFormatError: It is no checkpoint, or damaged.
        MismatchError: It was trained over another base.
        VerificationError: It failed its proof; nothing is stored.
        LibraryError: The name is not allowed.
    """
    from haori.bases import load_tokenizer
    from haori.library import (
        Library,
        StoredAdapter,
        ancestors,
        default_probes,
        draft_card,
        effective_licence,
        inspect_adapter,
        require_passed,
        verify_adapter,
    )
    from haori.library.adapter_names import check_no_base_name
    from haori.library.store import check_name
    from haori.library.validation import validate_tensors

    check_no_base_name(check_name(name), base.name)
    with _copied(folder) as copy:
        session = _session(copy, base)
        if request is not None and session.runs[-1].request != request:
            raise InputError("it was replaced by a later one of that name before its proof; choose a name for each.")
        validate_tensors(inspect_adapter(copy).weights)
        verification = verify_adapter(base, copy, probes=default_probes(load_tokenizer(base)))
        require_passed(verification)
        parents = tuple(dict.fromkeys(run.parent for run in session.runs if run.parent is not None))
        card = draft_card(
            copy, base.reference(), origin="trained", verification=verification, client_runs=session.runs,
            parents=parents, data=tuple(_data(run, licence) for run in session.runs if run.data_hash is not None),
            seed=session.spec.seed, licence=licence,
        )  # fmt: skip
        library = Library()
        if licence is None and parents:
            before = ancestors(StoredAdapter(library.folder(card.id), card, name))
            card = card.with_fields(licence=effective_licence(card, before).expression)
        stored = library.add(copy, name, card)
        if licence is not None and stored.card.licence != licence:  # it was there already
            data = card.data if stored.card.client_runs else stored.card.data
            stored = library.update(stored.name, licence=licence, data=data)
        return stored


@contextmanager
def _copied(folder: Path) -> Iterator[Path]:
    """Yield a copy of the files, which nobody replaces meanwhile."""
    from haori.jobs.tenants.files import SESSION_NAME
    from haori.library.formats.peft import copy_adapter

    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "adapter"
        copy.mkdir()
        try:
            copy_adapter(folder, copy)
            shutil.copyfile(folder / SESSION_NAME, copy / SESSION_NAME)
        except FileNotFoundError as error:
            raise FileFormatError(
                f"{str(folder)!r} is no whole checkpoint: {Path(error.filename).name!r} is missing; save it again."
            ) from None
        yield copy


def _session(folder: Path, base: "Base") -> "Session":
    from haori.jobs.tenants.files import read_session

    session = read_session(folder)
    assert session is not None
    if session.base != base.id:
        raise MismatchError(
            f"The checkpoint was trained over the base {session.base}, and {base.name!r} is {base.id}; give the base "
            "that the server trains with."
        )
    return session


def _data(run: ClientRun, licence: str | None) -> DataReference:
    """Return the rows that a client sent, as far as they are known here."""
    assert run.data_hash is not None
    return DataReference(
        source=f"rows sent to {run.run or 'a training session'}", hash=run.data_hash, format="token ids",
        rows={"train": run.rows}, tokens={"train": run.tokens}, licence=licence,
    )  # fmt: skip
