"""The run folder, under `HAORI_HOME/runs`: everything a run leaves behind.

recipe.yaml         every value resolved; `haori train recipe.yaml` repeats the run
run.json            RunRecord: status, figures, diagnosis
run.lock            held while a process works on the run
base.json           the base it was trained on, by content
data.json           the data it was trained on, by hash
metrics.jsonl       each step and validation
checkpoints/        see checkpoint.py
loss.png            training and validation loss
ranks.png           learnt ranks by layer and head, after a method that learns them
adapter/            the final adapter, as stock PEFT files
model/              instead of it, after full fine-tuning: the model in Hugging Face layout
verification.json   the proof of either
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from haori.core.errors import InputError, StorageError
from haori.core.records import Record, RunRecord, now
from haori.core.settings import settings
from haori.core.storage import make_folder, make_stamped_folder, write_text
from haori.tasks.recipe import recipe_to_yaml
from haori.training.checkpoint import checkpoints_of
from haori.training.preparation import Prepared

__all__ = ["new_run_folder", "note_failure", "read_run_file", "write_record"]

_R = TypeVar("_R", bound=Record)


def new_run_folder(prepared: Prepared, folder: Path | None = None) -> Path:
    """Make the run folder, `folder` or a new one, with recipe and data record; all processes get the first one's."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=prepared.device == "cpu")
    made: list[str | None] = [None]
    if state.is_main_process:
        name = prepared.recipe.name
        folder = make_stamped_folder(settings().runs, name) if folder is None else make_folder(folder)
        write_text(folder / "recipe.yaml", recipe_to_yaml(prepared.recipe))
        write_text(folder / "data.json", prepared.split.reference().model_dump_json(indent=1))
        write_text(folder / "base.json", prepared.base.reference().model_dump_json(indent=1))
        made = [str(folder)]
    broadcast_object_list(made)
    return Path(str(made[0]))


def read_run_file(folder: Path, kind: type[_R], name: str) -> _R:
    """Read a record from a run folder.

    Raises:
        InputError: The folder is no run folder, or the record is damaged.
    """
    try:
        return kind.model_validate_json((folder / name).read_bytes())
    except OSError:
        raise InputError(f"{str(folder)!r} is not a run folder: it has no {name}.") from None
    except ValidationError:
        raise InputError(f"{str(folder / name)!r} is damaged; start a new run.") from None


def write_record(folder: Path, record: RunRecord) -> None:
    """Write `run.json`."""
    write_text(folder / "run.json", record.model_dump_json(indent=1))


def note_failure(folder: Path, record: RunRecord, error: BaseException) -> None:
    """Mark the run as failed; one that could not even begin for lack of storage leaves nothing behind."""
    if isinstance(error, StorageError) and not checkpoints_of(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(StorageError):
        write_record(folder, record.with_fields(status="failed", ended=now()))
