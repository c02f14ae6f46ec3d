"""Names such as `ft:smollm2-135m-instruct:acme:support:a1b2c3d4`: which adapter each means, and whose it is.

An adapter that any of these rows names belongs to the accounts that have such a row: nobody else may use it, by its
name in the library or its id either. A row is there from the moment its job is submitted; its name answers once the
job has succeeded.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, or_, select

from haori.core.records import Record
from haori.jobs.database.connection import Database
from haori.jobs.database.tables import jobs, models
from haori.jobs.missing import MissingError

__all__ = ["PREFIX", "ModelMissingError", "ModelName", "ModelNames", "fine_tuned_name"]

PREFIX = "ft:"
_NOT_YET = ""  # the adapter of a job that has not ended
_UNNAMEABLE = re.compile(r"[^A-Za-z0-9._-]+")


class ModelMissingError(MissingError):
    """There is no such model, or it belongs to another account."""


class ModelName(Record):
    """A name and the adapter that it means.

    Attributes:
        adapter: Content id in the library; empty until its job has stored it.
        library_name: `name@version` there; without a version until then.
        base: What the base is called.
        step: Optimizer steps of a checkpoint; None for the end result.
    """

    name: str
    owner: str
    adapter: str = _NOT_YET
    library_name: str
    base: str
    job_id: str | None = None
    step: int | None = None
    created: float


class ModelNames:
    """The names of all accounts."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def put(self, names: Sequence[ModelName]) -> None:
        """Write rows, each in the place of one of the same name."""
        with self.database.writing() as connection:
            connection.execute(delete(models).where(models.c.name.in_([name.name for name in names])))
            connection.execute(insert(models), [name.model_dump() for name in names])

    def reserve(self, row: ModelName) -> bool:
        """Write the row of a name in the library, without version, unless another account has that name.

        Returns:
            Whether the account has it now.
        """
        with self.database.writing() as connection:
            owners = _owners(connection, row.library_name)
            if not owners:
                connection.execute(insert(models).values(**row.model_dump()))
        return owners <= {row.owner}

    def owners(self, library_name: str) -> set[str]:
        """Return the accounts that have a name in the library, or a version of it."""
        with self.database.reading() as connection:
            return _owners(connection, library_name)

    def find(self, name: str, owner: str | None) -> ModelName:
        """Return what a name means.

        Args:
            name: The name.
            owner: The account that asks; None for anybody.

        Raises:
            ModelMissingError: It means nothing, nothing yet, or belongs to another account.
        """
        found = self._usable(owner, models.c.name == name)
        if not found:
            raise ModelMissingError(
                f"There is no model {name[:200]!r}; /v1/models lists what can be asked for. A fine-tuned model is "
                "there once its job has succeeded."
            )
        return found[0]

    def list(self, owner: str | None) -> Sequence[ModelName]:
        """Return the names of an account that can be asked for, the oldest first."""
        return self._usable(owner)

    def drop_of(self, job_id: str) -> None:
        """Take the names of a job away that was not put in the queue."""
        with self.database.writing() as connection:
            connection.execute(delete(models).where(models.c.job_id == job_id))

    def claims(self, adapters: Iterable[str], library_names: Iterable[str]) -> Sequence[ModelName]:
        """Return every row that names one of these adapters, by content or by name in the library."""
        names = set(library_names)
        names |= {name.partition("@")[0] for name in names}
        ids = [adapter for adapter in adapters if adapter != _NOT_YET]
        query = select(models).where(or_(models.c.adapter.in_(ids), models.c.library_name.in_(names)))
        with self.database.reading() as connection:
            return [_read(row) for row in connection.execute(query)]

    def all(self) -> Sequence[ModelName]:
        """Return every row, of whatever state."""
        with self.database.reading() as connection:
            return [_read(row) for row in connection.execute(select(models))]

    def delete(self, name: str, owner: str | None) -> ModelName:
        """Take a name away, and the adapter out of the library unless another name means it.

        Raises:
            ModelMissingError: There is no such name for this account.
        """
        from haori.core.errors import LibraryError
        from haori.library import Library

        found = self.find(name, owner)
        with self.database.writing() as connection:
            connection.execute(delete(models).where(models.c.name == name))
        if not [row for row in self.claims([found.adapter], []) if row.name != name]:
            try:
                Library().remove(found.library_name)
            except LibraryError:  # it was removed there before
                return found
        return found

    def _usable(self, owner: str | None, *asked: ColumnElement[bool]) -> Sequence[ModelName]:
        succeeded = or_(jobs.c.state == "succeeded", jobs.c.id.is_(None))
        query = select(models).outerjoin(jobs, jobs.c.id == models.c.job_id).where(succeeded, *asked)
        query = query.where(models.c.adapter != _NOT_YET)
        query = query if owner is None else query.where(models.c.owner == owner)
        with self.database.reading() as connection:
            return [_read(row) for row in connection.execute(query.order_by(models.c.created, models.c.name))]


def fine_tuned_name(base: str, owner: str, suffix: str | None, identity: str, step: int | None = None) -> str:
    """Return the name of what a job made, or of its checkpoint at a step."""
    parts = [_UNNAMEABLE.sub("-", part)[:64].strip("-") for part in (base, owner, suffix or "")]
    name = ":".join([PREFIX[:-1], *parts, identity])
    return name if step is None else f"{name}:ckpt-step-{step}"


def _owners(connection: Connection, library_name: str) -> set[str]:
    named = models.c.library_name
    held = or_(named == library_name, named.startswith(f"{library_name}@", autoescape=True))
    return set(connection.execute(select(models.c.owner).where(held)).scalars())


def _read(row: Row[Any]) -> ModelName:
    return ModelName.model_validate(dict(row._mapping))
