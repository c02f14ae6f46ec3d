"""One run from recipe to proved, stored adapter, and the same run continued after an interruption.

The run folder, under `HAORI_HOME/runs`:

    recipe.yaml     every value resolved; `haori train recipe.yaml` repeats the run
    run.json        RunRecord: status, figures, diagnosis
    run.lock        held while a process works on the run
    base.json       the base it was trained on, by content
    data.json       the data it was trained on, by hash
    metrics.jsonl   each step and validation
    checkpoints/    see checkpoint.py
    loss.png        training and validation loss
    adapter/        the final adapter, as stock PEFT files
"""

import gc
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import ValidationError

from haori.core.errors import InputError, MismatchError, StorageError, TrainingError
from haori.core.lock import file_lock
from haori.core.recipe import Recipe, load_recipe, recipe_to_yaml
from haori.core.records import BaseReference, DataReference, Record, RunRecord, now
from haori.core.settings import settings
from haori.core.storage import make_folder, sweep, write_text
from haori.library import Library
from haori.library.formats.peft import check_new_folder
from haori.train.checkpoint import Position, checkpoints_of, load_checkpoint
from haori.train.diagnosis import Validation, diagnose
from haori.train.finish import LiveProbes, prove_and_store, save_final
from haori.train.loop import Loop, Progress
from haori.train.measurements import Measurements, draw_losses
from haori.train.memory import peak_memory_bytes
from haori.train.preparation import Prepared, adapted_model, prepare
from haori.train.signals import stop_on_signals

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

    from haori.library import StoredAdapter

__all__ = ["TrainedRun", "resume_run", "train_run"]

_R = TypeVar("_R", bound=Record)
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class TrainedRun:
    """What `train_run` returns."""

    folder: Path
    recipe: Recipe
    record: RunRecord
    adapter: "StoredAdapter | None"
    """The stored adapter; None when the run was stopped before its end."""
    signal: int | None = None
    """The signal that stopped the run, if one did."""


def train_run(
    recipe: Recipe,
    *,
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    show: Callable[[Progress], None] = lambda _: None,
    prepared: Prepared | None = None,
) -> TrainedRun:
    """Train, verify and store an adapter.

    Args:
        recipe: What to train; `auto` values are resolved.
        out: Also write the finished adapter to this new folder.
        say: Receives lines for the user.
        show: Receives progress.
        prepared: The result of `prepare(recipe)`, if it was made already.

    Raises:
        HaoriError: Anything that is wrong, before training where it can be known before.
    """
    if out is not None:
        check_new_folder(out)
        make_folder(out.parent)
    make_folder(settings().home)
    prepared = prepared or prepare(recipe)
    folder = _new_run_folder(prepared)
    return _execute(prepared, folder, out, say, show)


def resume_run(
    folder: Path,
    *,
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    show: Callable[[Progress], None] = lambda _: None,
) -> TrainedRun:
    """Continue a run from its last complete checkpoint (or from the start, if it had none).

    Raises:
        InputError: The folder is no run, or the run is finished.
        MismatchError: The base or the data changed since the run began.
    """
    record = _read(folder, RunRecord, "run.json")
    if record.status == "finished":
        raise InputError(f"The run {str(folder)!r} is finished; its adapter is {record.adapter}.")
    if out is not None:
        check_new_folder(out)
        make_folder(out.parent)
    prepared = prepare(load_recipe(folder / "recipe.yaml"))
    before = _read(folder, DataReference, "data.json")
    if prepared.data.reference().hash != before.hash:
        raise MismatchError(f"The data {before.source!r} changed since the run began; restore it, or start a new run.")
    base = _read(folder, BaseReference, "base.json")
    if prepared.base.fingerprint.compare(base.fingerprint) != "same":
        raise MismatchError(
            f"The base {base.name!r} changed since the run began (fingerprint {base.fingerprint.id}, now "
            f"{prepared.base.fingerprint.id}); restore it, or start a new run."
        )
    return _execute(prepared, folder, out, say, show)


def _execute(
    prepared: Prepared,
    folder: Path,
    out: Path | None,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
) -> TrainedRun:
    """Hold the run folder and go on from its newest checkpoint, or from the start.

    Of several processes the first one holds the folder, and it alone writes there.
    """
    from accelerate import PartialState

    if not PartialState(cpu=prepared.device == "cpu").is_main_process:
        return _go_on(prepared, folder, out, say, show, main=False)
    with file_lock(folder / "run.lock", holds="run", timeout_s=0):
        for place in (folder, folder / "checkpoints"):
            sweep(place)
        return _go_on(prepared, folder, out, say, show, main=True)


def _go_on(
    prepared: Prepared,
    folder: Path,
    out: Path | None,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
    *,
    main: bool,
) -> TrainedRun:
    found = checkpoints_of(folder)
    checkpoint = found[-1] if found else None
    record = RunRecord(name=prepared.recipe.name, status="running", started=now())
    if not main:
        trained = _train(prepared, folder, checkpoint, record.started, _silent, _silent)
        return TrainedRun(folder, prepared.recipe, trained.record, None, trained.signal)
    _write_record(folder, record)
    try:
        trained = _train(prepared, folder, checkpoint, record.started, say, show)
        record = trained.record
        if trained.signal is not None:
            _write_record(folder, record)
            return TrainedRun(folder, prepared.recipe, record, None, trained.signal)
        gc.collect()  # the live model, before a fresh base is loaded beside it
        stored = prove_and_store(prepared, folder, record, trained.live, say)
        if out is not None:
            Library().export(stored.name, out)
    except BaseException as error:
        _note_failure(folder, record, error)
        raise
    record = record.with_fields(adapter=stored.name, ended=now())
    _write_record(folder, record)
    return TrainedRun(folder, prepared.recipe, record, stored)


def _note_failure(folder: Path, record: RunRecord, error: BaseException) -> None:
    """Mark the run as failed; one that could not even begin for lack of storage leaves nothing behind."""
    if isinstance(error, StorageError) and not checkpoints_of(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(StorageError):
        _write_record(folder, record.with_fields(status="failed", ended=now()))


class _Trained(NamedTuple):
    """The end of training, without the live model."""

    record: RunRecord
    live: LiveProbes | None
    signal: int | None


def _train(
    prepared: Prepared,
    folder: Path,
    checkpoint: Path | None,
    started: str,
    say: Callable[[str], None],
    show: Callable[[Progress], None],
) -> _Trained:
    accelerator, model = _model(prepared, folder)
    loop = _loop(accelerator, model, prepared, folder, checkpoint, show)
    position = load_checkpoint(checkpoint, model, loop.optimizer) if checkpoint else None
    if position is not None:
        say(f"Resuming after step {position.step} of {loop.total_steps}.")
    with stop_on_signals() as stop, _adapter_input_dtype(model, accelerator):
        ended = loop.run(stop, position)
    record = _record(prepared, loop, ended, started, "stopped" if stop else "finished")
    live = None
    if accelerator.is_main_process and not stop:
        draw_losses(loop.measurements, folder / "loss.png", ended.best_step, f"{prepared.recipe.name}: loss")
        live = save_final(accelerator.unwrap_model(loop.wrapped, keep_fp32_wrapper=False), prepared, folder)
    accelerator.end_training()
    accelerator.free_memory()
    return _Trained(record, live, stop.signal)


def _model(prepared: Prepared, folder: Path) -> "tuple[Accelerator, PeftModel]":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    training = prepared.recipe.training
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        cpu=prepared.device == "cpu",
        mixed_precision=_PRECISION[training.dtype],
        log_with=list(training.trackers) or None,
        project_dir=str(folder),
    )
    if training.trackers:
        accelerator.init_trackers(
            "haori", {"name": prepared.recipe.name, **_flat(prepared.recipe.model_dump(mode="json"))}
        )
    adapted = adapted_model(prepared, str(accelerator.device))
    set_seed(training.seed + accelerator.process_index)
    return accelerator, adapted


def _loop(
    accelerator: "Accelerator",
    model: "PeftModel",
    prepared: Prepared,
    folder: Path,
    checkpoint: Path | None,
    show: Callable[[Progress], None],
) -> Loop:
    from haori.train.causal_lm import CausalLM

    pad = prepared.tokenizer.pad_token_id
    done = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0
    measurements = Measurements(
        folder / "metrics.jsonl",
        accelerator if prepared.recipe.training.trackers else None,
        done,
        write=accelerator.is_main_process,
    )
    return Loop(
        accelerator,
        model,
        CausalLM(prepared.data.train, pad),
        CausalLM(prepared.data.validation, pad) if len(prepared.data.validation) else None,
        prepared.recipe,
        folder,
        measurements,
        prepared.base.name,
        show,
    )


def _silent(_: object) -> None:
    """Say nothing: only the first of several processes reports."""


def _adapter_input_dtype(model: "PeftModel", accelerator: "Accelerator") -> Any:
    """Let autocast choose the dtype of an adapter's input; PEFT would cast it to fp32, which is slower."""
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model, active=accelerator.mixed_precision != "no")


def _record(prepared: Prepared, loop: Loop, ended: Position, started: str, status: str) -> RunRecord:
    validations = loop.measurements.series("validation")
    steps = loop.measurements.series("train")
    limit = prepared.recipe.optimizer.max_grad_norm
    initial = validations[0]["loss"] if validations else None
    diagnosis = diagnose(
        initial if initial is not None else float("nan"),
        [Validation(v["epoch"], v["loss"], v.get("train_loss", v["loss"])) for v in validations[1:]],
        [line["loss"] for line in steps],
        sum(line["grad_norm"] > limit for line in steps) / max(1, len(steps)),
    )
    trainable = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
    return RunRecord.model_validate(
        {
            "name": prepared.recipe.name,
            "status": status,
            "started": started,
            "ended": now(),
            "steps": ended.step,
            "epochs": loop.epochs_done(),
            "best_step": ended.best_step,
            "best_epoch": ended.best_epoch,
            "train_loss": sum(line["loss"] for line in steps[-10:]) / max(1, len(steps[-10:])) if steps else None,
            "validation_loss": ended.best_loss,
            "initial_validation_loss": initial,
            "tokens": ended.tokens,
            "seconds": ended.seconds,
            "peak_memory_bytes": peak_memory_bytes(prepared.device),
            "processes": loop.accelerator.num_processes,
            "trainable_parameters": trainable,
            "total_parameters": prepared.base.parameters + trainable,
            "diagnosis": diagnosis if status == "finished" else (),
        }
    )


def _new_run_folder(prepared: Prepared) -> Path:
    """Make the run folder with recipe and data record; with several processes, all get the first one's."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=prepared.device == "cpu")
    made: list[str | None] = [None]
    if state.is_main_process:
        folder = _free_folder(make_folder(settings().runs), prepared.recipe.name)
        write_text(folder / "recipe.yaml", recipe_to_yaml(prepared.recipe))
        write_text(folder / "data.json", prepared.data.reference().model_dump_json(indent=1))
        write_text(folder / "base.json", prepared.base.reference().model_dump_json(indent=1))
        made = [str(folder)]
    broadcast_object_list(made)
    return Path(str(made[0]))


def _free_folder(root: Path, name: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = root / f"{name}-{stamp}{'' if attempt == 1 else f'-{attempt}'}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise TrainingError(f"No free run folder could be made in {str(root)!r}.")


def _read(folder: Path, kind: type[_R], name: str) -> _R:
    try:
        return kind.model_validate_json((folder / name).read_bytes())
    except OSError:
        raise InputError(f"{str(folder)!r} is not a run folder: it has no {name}.") from None
    except ValidationError:
        raise InputError(f"{str(folder / name)!r} is damaged; start a new run.") from None


def _write_record(folder: Path, record: RunRecord) -> None:
    write_text(folder / "run.json", record.model_dump_json(indent=1))


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
