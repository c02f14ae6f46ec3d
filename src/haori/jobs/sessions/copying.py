"""Copies a checkpoint into a run of its own, which stays when the run that it came from, or its owner's, is deleted."""

import shutil
from typing import TYPE_CHECKING

from haori.core.errors import InputError
from haori.core.storage import staged_folder
from haori.jobs.sessions.checkpoints import given_metadata
from haori.jobs.sessions.paths import CheckpointPath
from haori.jobs.sessions.runs import run_id

if TYPE_CHECKING:
    from haori.jobs.sessions.service import TrainingService

__all__ = ["copy_weights"]


def copy_weights(
    service: "TrainingService", owner: str, source: CheckpointPath, session: str, number: int, ttl_s: int | None
) -> CheckpointPath:
    """Copy a checkpoint; the same copy that is asked for again is made once.

    Args:
        service: Holds the runs and checkpoints.
        owner: The account that asks, and that the copy belongs to.
        source: A checkpoint that it may read.
        session: A session of the account.
        number: The new run's in it.
        ttl_s: How long the copy is kept; None for ever.

    Returns:
        The copy's path.

    Raises:
        MissingError: There is no such checkpoint for this account.
        InputError: There is a run of that number that is another.
    """
    row = service.shelf.find(source, owner)
    made = source._replace(run=run_id(session, number))
    spec = {**service.runs.spec(service.runs.row(source.run, row.owner))}
    spec |= {"path": str(made), "optimizer": source.kind == "training", "adapter": None}
    values = {"spec": spec, "user_metadata": {"given": None, "base_model": service.base.name}}
    if service.runs.add(session, number, owner, values).get("path") != str(made):
        raise InputError(f"There is a training run {made.run!r} already; take the next model_seq_id.")
    folder = service.shelf.folder(made)
    if not folder.is_dir():
        with staged_folder(folder) as stage:
            shutil.copytree(service.shelf.folder(source), stage, dirs_exist_ok=True)
    service.shelf.add(made, owner, 0, ttl_s=ttl_s, user_metadata=given_metadata(row))
    return made
