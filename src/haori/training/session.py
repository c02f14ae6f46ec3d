"""The part of a run that holds a model: load, train, save what was trained, and leave only figures behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from haori.adapters.rank_map import draw_ranks
from haori.core.events import EventSink, Said, Saved, discard, fan_out
from haori.core.methods import FullMethod
from haori.core.records import RunRecord, now
from haori.training.advice import advise, outcome_of
from haori.training.checkpoint import Position, step_of
from haori.training.diagnosis import diagnose, validations_of
from haori.training.fast_path import fast_path
from haori.training.finish import LiveProbes, save_final
from haori.training.loop import Loop
from haori.training.measurements import Measurements, draw_losses, track
from haori.training.memory import peak_memory_bytes
from haori.training.out_of_memory import explaining_memory
from haori.training.preparation import Prepared, adapted_model, total_parameters
from haori.training.signals import stop_on_signals

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

__all__ = ["Trained", "opened_loop", "train_prepared"]

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Trained(NamedTuple):
    """The end of training, without the live model."""

    record: RunRecord
    live: LiveProbes | None
    signal: int | None


def train_prepared(
    prepared: Prepared,
    folder: Path,
    checkpoint: Path | None,
    started: str,
    on_event: EventSink,
) -> Trained:
    """Train from a checkpoint or from the start, and write `adapter/` or `model/` unless a signal stopped it.

    Experiment trackers are told each step and validation, as `on_event` is.

    Raises:
        TrainingError: It could not go on; where memory ran out, the sentence says what would help.
    """
    with explaining_memory(prepared) as watched:
        accelerator = _accelerator(prepared, folder)
        model = _seeded_model(prepared, accelerator)
        reporting = fan_out(on_event, track(accelerator)) if prepared.recipe.training.trackers else on_event
        loop = _loop(accelerator, model, prepared, folder, checkpoint, reporting)
        watched.model, watched.loop = model, loop
        with fast_path(model, mixed=accelerator.mixed_precision != "no", on_event=on_event):
            for objective in (prepared.train, prepared.validation):
                if objective is not None:
                    objective.begin(model)  # may take long, and leaves nothing to be saved: a signal ends it at once
            with stop_on_signals() as stop:
                # Last of all, since it sets the random state, and trying the fast path may use up random numbers.
                position = loop.restore(checkpoint) if checkpoint else None
                if position is not None:
                    on_event(Said(text=f"Resuming after step {position.step} of {loop.total_steps}."))
                ended = loop.run(stop, position)
        stopped_by = loop.stopped_by or stop.signal  # the latter came after the last step; resuming ends the run
        record = _record(prepared, loop, ended, started, "stopped" if stopped_by else "finished")
        live = None
        if accelerator.is_main_process and stopped_by is None:
            plot, title, label = folder / "loss.png", f"{prepared.recipe.name}: loss", prepared.task.loss_label
            draw_losses(loop.measurements, plot, ended.best_step, title, label)
            start = getattr(prepared.recipe.method, "rank", None)
            if record.ranks and isinstance(start, int):
                draw_ranks(record.ranks, start, folder / "ranks.png", f"{prepared.recipe.name}: ranks")
            live = save_final(accelerator.unwrap_model(loop.wrapped, keep_fp32_wrapper=False), prepared, folder)
            what: Literal["adapter", "model"] = "model" if isinstance(prepared.recipe.method, FullMethod) else "adapter"
            held = ended.step if ended.best_step is None else ended.best_step
            on_event(Saved(what=what, path=str(folder / what), step=held))
            rows, things = len(prepared.split.train), prepared.task.rows_title
            found = outcome_of(prepared.recipe, rows, loop.measurements, folder / "adapter", things)
            record = record.with_fields(advice=advise(found))
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()
        watched.forget()
        return Trained(record, live, stopped_by)


@contextmanager
def opened_loop(prepared: Prepared, folder: Path) -> Iterator[Loop]:
    """Yield the loop of a fresh run before its first step, for tests of a recipe that keep nothing but figures."""
    with explaining_memory(prepared) as watched:
        accelerator = _accelerator(prepared, folder)
        model = _seeded_model(prepared, accelerator)
        loop = _loop(accelerator, model, prepared, folder, None, discard, observed=False)
        watched.model, watched.loop = model, loop
        with fast_path(model, mixed=accelerator.mixed_precision != "no"):
            prepared.train.begin(model)
            yield loop
    accelerator.free_memory()


def _accelerator(prepared: Prepared, folder: Path) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

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
    return accelerator


def _seeded_model(prepared: Prepared, accelerator: "Accelerator") -> "nn.Module":
    from accelerate.utils import set_seed

    device = str(accelerator.device)
    prepared.task.ready(prepared.recipe, prepared.base, prepared.processor, prepared.split, device)
    model = adapted_model(prepared, device)
    set_seed(prepared.recipe.training.seed + accelerator.process_index)
    return model


def _loop(
    accelerator: "Accelerator",
    model: "nn.Module",
    prepared: Prepared,
    folder: Path,
    checkpoint: Path | None,
    on_event: EventSink,
    *,
    observed: bool = True,
) -> Loop:
    done = step_of(checkpoint) if checkpoint else 0
    task, recipe = prepared.task, prepared.recipe
    measurements = Measurements(folder / "metrics.jsonl", done, write=accelerator.is_main_process)
    return Loop(
        accelerator,
        model,
        prepared.task,
        prepared.train,
        prepared.validation,
        prepared.recipe,
        folder,
        measurements,
        prepared.base.name,
        on_event,
        task.measured_training(prepared.split, prepared.processor, recipe),
        task.observer(recipe, prepared.base, prepared.processor, prepared.split, folder) if observed else None,
    )


def _record(prepared: Prepared, loop: Loop, ended: Position, started: str, status: str) -> RunRecord:
    validations = loop.measurements.series("validation")
    steps = loop.measurements.series("train")
    limit = prepared.recipe.optimizer.max_grad_norm
    initial = validations[0]["loss"] if validations else None
    found = validations_of(validations)
    diagnosis = diagnose(
        found[0] if found else float("nan"),
        found[1:],
        loop.measurements.training_losses(),
        sum(line["grad_norm"] > limit for line in steps) / max(1, len(steps)),
    )
    trainable = loop.trainable_parameters
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
            "cost": ended.cost,
            "unit": prepared.task.unit,
            "seconds": ended.seconds,
            "peak_memory_bytes": peak_memory_bytes(prepared.device),
            "processes": loop.accelerator.num_processes,
            "trainable_parameters": trainable,
            "total_parameters": total_parameters(prepared, trainable),
            "ranks": loop.behaviour.ranks() if status == "finished" else {},
            "diagnosis": diagnosis if status == "finished" else (),
        }
    )


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
