"""The fine-tuning jobs of accounts: made from files and a model name, looked at, stopped. Knows nothing about HTTP."""

import hashlib
import os
import secrets
import shutil
import string
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from haori.bases import Base
from haori.core.errors import InputError, LibraryError, nearest
from haori.core.settings import settings
from haori.core.storage import explain_os_errors
from haori.jobs.files import FileStore, StoredFile
from haori.jobs.fine_tuning.recipe import Wanted, recipe_document
from haori.jobs.fine_tuning.trainable import NotTrainableError, require_text_base, text_bases
from haori.jobs.model_names import PREFIX, ModelName, ModelNames, fine_tuned_name
from haori.jobs.queue.records import ENDED, Job, JobEvent, JobNotFoundError
from haori.jobs.queue.store import JobStore
from haori.jobs.quotas import Quotas

__all__ = ["DATA", "KIND", "TRAINING", "VALIDATION", "FineTuning", "Order", "event_id"]

KIND = "fine_tune"
DATA, TRAINING, VALIDATION = "data", "training.jsonl", "validation.jsonl"
_KINDS = {"supervised": "text", "dpo": "preference"}
_FITS = {"text": "supervised", "preference": "dpo"}
_CHARACTERS_PER_TOKEN = 3.5
_EPOCHS = ((200, 10), (2_000, 3), (20_000, 2))  # as training chooses them
_LETTERS = string.ascii_lowercase


class Order(NamedTuple):
    """What a client asks for.

    Attributes:
        wanted: Everything but names and files; its `name` and `base` are set here.
        model: The base, or a model to go on from.
        request: As it was sent, for the job's face.
        key: The same key of an account gives the same job back.
    """

    wanted: Wanted
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    request: Mapping[str, Any] = {}
    key: str | None = None


class FineTuning:
    """Jobs over a queue, files and names.

    Args:
        store: The queue.
        files: Training files.
        names: Names of what was made.
        served: The base that the server answers with, which need not be registered.
    """

    def __init__(self, store: JobStore, files: FileStore, names: ModelNames, served: Base | None) -> None:
        self.store, self.files, self.names, self.served = store, files, names, served

    def create(
        self, order: Order, owner: str, *, quotas: Quotas | None = None,
        may_train: Callable[[str], None] = lambda base: None, may_use: Callable[[str], bool] = lambda name: True,
    ) -> Job:  # fmt: skip
        """Put a job in the queue.

        Args:
            order: What is asked for.
            owner: The account.
            quotas: What the account may have.
            may_train: Raises where the caller may not train a base.
            may_use: Says whether the caller may use an adapter of the library.

        Raises:
            MissingError: A file is not there.
            InputError: What is asked for cannot be done.
            QuotaError: The account has to wait.
        """
        training = self._file(order.training_file, owner, order.wanted.method, "training_file")
        validation = None
        if order.validation_file is not None:
            validation = self._file(order.validation_file, owner, order.wanted.method, "validation_file")
        base, spec, start = self.resolve_start(order.model, owner, may_use)
        may_train(base)
        seed = secrets.token_bytes(32) if order.key is None else f"{owner}\0{order.key}".encode()
        digest = hashlib.sha256(seed).hexdigest()
        job_id, identity = f"ftjob-{digest[:24]}", f"{_LETTERS[int(digest[24:32], 16) % 26]}{digest[32:39]}"
        if order.key is not None:
            with suppress(JobNotFoundError):
                return self.store.find(job_id, owner)
        library_name = f"ft-{identity}"
        wanted = order.wanted.model_copy(
            update={"name": library_name, "base": spec, "start": start, "validates": validation is not None}
        )
        data = self.store.folder / job_id / DATA
        paths = (str(data / TRAINING), str(data / VALIDATION) if validation else None)
        recipe = recipe_document(wanted, *paths)
        summary = training.summary
        assert summary is not None
        name = ModelName(
            name=fine_tuned_name(base, owner, order.suffix, identity), owner=owner, library_name=library_name,
            base=base, job_id=job_id, created=time.time(),
        )  # fmt: skip
        tokens = self.estimated_tokens(training, recipe)
        spec_of_job = {
            "recipe": recipe, "wanted": wanted.model_dump(mode="json"), "model": order.model, "base": base,
            "name": name.model_dump(mode="json"), "suffix": order.suffix, "identity": identity, "owner": owner,
            "training_file": training.id, "validation_file": None if validation is None else validation.id,
            "rows": summary.rows, "request": dict(order.request),
        }  # fmt: skip
        return self._submit(spec_of_job, name, (training, validation), summary.rows, tokens, quotas or Quotas())

    def _submit(
        self, spec: dict[str, Any], name: ModelName, sources: tuple[StoredFile, StoredFile | None], rows: int,
        tokens: int, quotas: Quotas,
    ) -> Job:  # fmt: skip
        """Copy the files and put the job in; of a job that is refused nothing remains."""
        assert name.job_id is not None
        owner, folder = name.owner, self.store.folder / name.job_id

        def admit(connection: Connection) -> None:
            quotas.check_job(connection, owner, rows=rows, tokens=tokens)

        try:
            for source, called in zip(sources, (TRAINING, VALIDATION), strict=True):
                if source is not None:
                    self._copy(source, folder / DATA / called)
            self.names.put([name])  # before the job can run: from the first moment nobody else may use its adapter
            return self.store.submit(
                KIND, spec, owner=owner, rows=rows, tokens=tokens, job_id=name.job_id, admit=admit
            )  # fmt: skip
        except BaseException:
            self.names.drop_of(name.job_id)
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def planned(
        self, order: Order, owner: str, *, may_use: Callable[[str], bool] = lambda name: True
    ) -> tuple[str, int]:
        """Return the base as the recipe of an order names it, and about how many tokens it would train.

        Raises:
            HaoriError: As `create`, but for what the account has left.
        """
        training = self._file(order.training_file, owner, order.wanted.method, "training_file")
        _, spec, start = self.resolve_start(order.model, owner, may_use)
        wanted = order.wanted.model_copy(update={"name": "estimate", "base": spec, "start": start})
        return spec, self.estimated_tokens(training, recipe_document(wanted, TRAINING, None))

    def resolve_start(
        self, model: str, owner: str, may_use: Callable[[str], bool] = lambda name: True
    ) -> tuple[str, str, str | None]:
        """Return name and spec of the base, and the adapter to go on from, that `model` means.

        Raises:
            NotTrainableError: It means nothing that can be trained.
        """
        if model.startswith(PREFIX):
            found = self.names.find(model, owner)
            return found.base, self._spec(found.base), found.library_name
        name = settings().model_aliases.get(model, model)
        if name in self.bases():
            return name, self._spec(name), None
        if (start := self._adapter(name, owner, may_use)) is not None:
            return start
        known = text_bases(self.bases(), self.served)
        hint = nearest(model, known)
        raise NotTrainableError(
            f"'model' cannot be {model[:120]!r}: this server trains {', '.join(known)}, and goes on from "
            f"fine-tuned models and adapters of them{'; ' + hint if hint else '.'} Other names are given a base by "
            "HAORI_MODEL_ALIASES."
        )

    def bases(self) -> dict[str, str]:
        """Return the bases that can be trained, by name, with what they are found by."""
        from haori.bases.catalogue import CATALOGUE
        from haori.bases.registry import registered_names

        found = {name: name for name in (*CATALOGUE, *registered_names())}
        if self.served is not None and self.served.pipeline is None:
            of_folder = self.served.source.startswith("folder:")
            found.setdefault(self.served.name, str(self.served.path) if of_folder else self.served.name)
        return found

    def find(self, job_id: str, owner: str | None) -> Job:
        """Return a job.

        Raises:
            JobNotFoundError: There is none, or it belongs to another account.
        """
        job = self.store.find(job_id, owner)
        if job.kind != KIND:
            raise JobNotFoundError(f"The job {job_id!r} is no fine-tuning job; `haori jobs show` tells what it is.")
        return job

    def list(
        self, owner: str | None, *, after: str | None, limit: int, metadata: Mapping[str, str] | None = None
    ) -> tuple[Sequence[Job], bool]:
        """Return jobs, the newest first, and whether there are more; those alone that have all of `metadata`."""
        wanted = dict(metadata or {})
        found: list[Job] = []
        while True:
            page, more = self.store.list(owner, kinds=[KIND], after=after, limit=limit)
            for job in page:
                held = job.spec["request"].get("metadata") or {}
                if all(held.get(key) == value for key, value in wanted.items()):
                    found.append(job)
            if len(found) > limit or not more:
                return found[:limit], len(found) > limit or (more and bool(page))
            if len(found) == limit:
                return found, True
            after = page[-1].id

    def events(self, job: Job, *, after: str | None, limit: int) -> tuple[Sequence[JobEvent], bool]:
        """Return events of a job, the newest first, and whether there are more.

        Raises:
            InputError: `after` is no event of it.
        """
        before = None
        if after is not None:
            before = _number_of(after, job)
            there = () if before is None else self.store.events(job.id, after_n=before - 1, limit=1)
            if [event.n for event in there] != [before]:
                raise InputError(f"'after' cannot be {after[:80]!r}: it is no event of the job {job.id!r}.")
        found = self.store.events_newest(job.id, limit + 1, before)[::-1]
        return found[:limit], len(found) > limit

    def delete(self, job: Job) -> None:
        """Delete a job that has ended, with the names and adapters that it made.

        Raises:
            InputError: It has not ended.
        """
        if job.state not in ENDED:
            raise InputError(f"The job {job.id!r} is {job.state}; cancel it, and delete it once it has ended.")
        for name in [name for name in self.names.list(job.owner) if name.job_id == job.id]:
            self.names.delete(name.name, job.owner)
        self.names.drop_of(job.id)
        self.store.prune(older_than_s=0.0, owner=job.owner, job_id=job.id)

    def tokens_of(self, file: StoredFile) -> int:
        """Return about how many tokens a training file has, from the length of its texts."""
        assert file.summary is not None
        return round(file.summary.characters / _CHARACTERS_PER_TOKEN)

    def estimated_tokens(self, training: StoredFile, recipe: Mapping[str, Any]) -> int:
        """Return about how many tokens a job will train, from the length of its texts."""
        assert training.summary is not None
        rows, epochs = training.summary.rows, recipe["training"]["epochs"]
        if epochs == "auto":
            epochs = next((count for most, count in _EPOCHS if rows < most), 1)
        return self.tokens_of(training) * int(epochs)

    def _adapter(self, name: str, owner: str, may_use: Callable[[str], bool]) -> tuple[str, str, str | None] | None:
        """Return an adapter of the library to go on from, by its own name; never a path."""
        from haori.library import Library

        if "/" in name or "\\" in name or "@" in name[:1] or not may_use(name):
            return None
        with suppress(LibraryError):
            stored = Library().get(name)
            if name not in (stored.name, stored.name.partition("@")[0]):
                return None  # digits of an id, which could stand for any adapter
            claims = self.names.claims([stored.card.id], [stored.name])
            if not claims or any(claim.owner == owner for claim in claims):
                base = stored.card.base.name
                return base, self._spec(base), stored.name
        return None

    def _spec(self, base: str) -> str:
        known = self.bases()
        if base not in known:
            raise NotTrainableError(
                f"The base {base!r} of this model is not here any more; add it with `haori bases add`."
            )
        require_text_base(base, known[base], self.served)
        return known[base]

    def _file(self, file_id: str, owner: str, method: str, field: str) -> StoredFile:
        file = self.files.find(file_id, owner)
        if file.purpose != "fine-tune" or file.summary is None:
            raise InputError(f"{field!r} is a file for {file.purpose!r}; upload it with purpose fine-tune.")
        if file.summary.kind != _KINDS[method]:
            held = "pairs of answers" if file.summary.kind == "preference" else "conversations"
            raise InputError(
                f"{field!r} holds {held}, which the method {method!r} does not learn from; use "
                f"{_FITS[file.summary.kind]!r}."
            )
        return file

    def _copy(self, file: StoredFile, place: Path) -> None:
        """Keep the content for the job, even once the file is deleted."""
        with explain_os_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.files.path(file), place)
            except OSError:
                shutil.copyfile(self.files.path(file), place)


def event_id(event: JobEvent) -> str:
    """Return the id of an event, as clients know it."""
    return f"{_event_prefix(event.job_id)}{event.n}"


def _event_prefix(job_id: str) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-"


def _number_of(event: str, job: Job) -> int | None:
    """Return the number within its job of an event given by its id; None for what is no such id."""
    prefix, digits = _event_prefix(job.id), event.removeprefix(_event_prefix(job.id))
    known = event.startswith(prefix) and digits.isascii() and digits.isdigit() and len(digits) < 10
    return int(digits) if known and digits == str(int(digits)) else None
