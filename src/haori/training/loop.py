"""The one training loop: optimizer steps, validation, early stopping, checkpoints, exact resume.

It runs on Accelerate, so one process or many, CPU or GPU, fp32 or mixed precision. A task's objective supplies batches
and summed losses (tasks/task.py); nothing else in the package calls `backward`. The loop knows nothing about where
data or adapters are kept.

Gradient of a step: sum of the losses of all its microbatches on all processes, divided by the number of things that
carry loss among them (labelled tokens, rows, pairs).
"""

import math
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from haori.adapters.behaviour import Behaviour
from haori.adapters.methods import behaviour_of
from haori.core.errors import HaoriError, TrainingError
from haori.core.events import EventSink, Measured, Progress, Saved, Warned, discard
from haori.core.free_memory import release_free_memory
from haori.tasks.recipe import Recipe
from haori.tasks.task import Objective, Observer, Task
from haori.training.averaging import Average
from haori.training.batches import Step, count_steps, epoch_steps, share_of_process
from haori.training.checkpoint import (
    Position,
    load_behaviour,
    load_checkpoint,
    load_trained,
    prune,
    random_states,
    save_checkpoint,
)
from haori.training.lanes import Lanes, lanes_for
from haori.training.measurements import Measurements
from haori.training.memory import peak_memory_bytes
from haori.training.paired import change
from haori.training.schedule import rate_at
from haori.training.signals import StopRequest
from haori.training.validation import Means, mean_losses

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Loop"]

_WITHOUT_BEST = 3  # times the patience: rises within their noise do not count, yet must not go on for ever
_STEPS_BETWEEN_RELEASES = (
    8  # what is given back must be asked for again, page by page: after each step that takes a tenth
)


class Loop:
    """Trains one adapter, or a whole model; `run` returns where it ended, with the best weights in the model."""

    def __init__(
        self,
        accelerator: "Accelerator",
        model: torch.nn.Module,
        task: Task,
        train: Objective,
        validation: Objective | None,
        recipe: Recipe,
        run_folder: Path,
        measurements: Measurements,
        base_name: str,
        on_event: EventSink = discard,
        measured_training: Objective | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.total_steps = count_steps(train.costs, recipe.training)
        self.behaviour = behaviour_of(model, recipe.method, self.total_steps)
        self.average: Average | None = None
        if recipe.training.ema is not None:
            self.behaviour = self.average = Average(self.behaviour, recipe.training.ema)
        self.optimizer = build_optimizer(self.behaviour, recipe, task)
        self.trainable_parameters = sum(
            p.numel() for p in self._parameters()
        )  # a method may cut or add some at the end
        self.wrapped: Any
        self.wrapped, self.prepared_optimizer = accelerator.prepare(model, self.optimizer)
        self.task, self.train, self.validation = task, train, validation
        self.measured_training, self.observer = measured_training, observer
        self.recipe, self.run_folder, self.measurements = recipe, run_folder, measurements
        self.base_name, self.on_event = base_name, on_event
        self.position = Position()
        self.stopped_early = False
        self.stopped_by: int | None = None
        self._plan: tuple[int, list[Step]] = (-1, [])
        self._found_lanes: Lanes | None = None
        self._lanes_decided = False
        settings = recipe.training
        assert settings.epochs != "auto"
        self.epochs = settings.epochs

    def plan(self, epoch: int) -> list[Step]:
        """Return the steps of an epoch (the last one asked for is remembered)."""
        if self._plan[0] != epoch:
            self._plan = (epoch, epoch_steps(self.train.costs, self.recipe.training, epoch))
        return self._plan[1]

    def restore(self, checkpoint: Path) -> Position:
        """Bring model, optimizer, method and random state to those of a checkpoint, and return its position."""
        accelerator = self.accelerator
        return load_checkpoint(
            checkpoint, self.model, self.optimizer, self.behaviour,
            process=accelerator.process_index, scaler=accelerator.scaler,
        )  # fmt: skip

    def run(self, stop: StopRequest, position: Position | None = None) -> Position:
        """Train from `position` (already restored into model and optimizer) or from the start.

        Raises:
            TrainingError: Loss or gradient is not finite; the rows are named.
        """
        if position is None:
            self.validate(first=True)
        else:
            self.position = position
        while not self._stops(stop) and not self._finished():
            steps = self.plan(self.position.epoch)
            marks = self._validation_marks(len(steps))
            for index in range(self.position.step_in_epoch, len(steps)):
                self.step(steps[index], last_of_epoch=index + 1 == len(steps))
                stops = self._stops(stop)
                if index + 1 in marks or self.position.step == self.total_steps:
                    self.validate()
                    self.save()
                elif stops or self._due():
                    self.save()
                if stops or self._finished():
                    break
        if self.stopped_by is None:
            self._restore_best()
            self.behaviour.finish()
        return self.position

    def step(self, step: Step, *, last_of_epoch: bool) -> None:
        """Do one optimizer step and move the position."""
        started = time.perf_counter()
        before = self.position
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate_of(group)
        loss, count, cost, penalty = self._forward_backward(step)
        norm = float(self.accelerator.clip_grad_norm_(self._parameters(), self.recipe.optimizer.max_grad_norm))
        if not math.isfinite(norm) and self.accelerator.mixed_precision != "fp16":
            rows = [row for micro in step for row in micro]
            raise TrainingError(self._not_finite("gradient norm", norm, rows))
        self.prepared_optimizer.step()
        self.behaviour.after_step(before.step + 1)
        self.prepared_optimizer.zero_grad()
        if self.accelerator.device.type == "cpu" and self.position.step % _STEPS_BETWEEN_RELEASES == 0:
            release_free_memory()
        seconds = time.perf_counter() - started
        self.position = before.with_fields(
            step=before.step + 1,
            epoch=before.epoch + last_of_epoch,
            step_in_epoch=0 if last_of_epoch else before.step_in_epoch + 1,
            cost=before.cost + cost,
            seconds=before.seconds + seconds,
            epoch_loss=before.epoch_loss + loss,
            epoch_count=before.epoch_count + count,
        )
        mean = loss / max(1, count)
        rate = rate_at(before.step, self.total_steps, self._peak_rate(), self.recipe.schedule)
        done = Progress(
            step=self.position.step, total_steps=self.total_steps, epoch=self.epochs_done(), loss=mean,
            rate_per_s=cost / seconds, unit=self.task.unit,
            peak_memory_bytes=peak_memory_bytes(self.accelerator.device.type),
            values={
                "lr": rate, "grad_norm": norm, self.task.unit: cost, self.task.counted: count, "seconds": seconds,
                **({} if penalty is None else {"penalty": penalty}),
            },
        )  # fmt: skip
        self.measurements.add(done)
        self.on_event(done)

    def validate(self, *, first: bool = False) -> None:
        """Measure validation loss, note whether it is the best so far, and reset the stretch's training loss."""
        before = self.position
        train_loss = before.epoch_loss / before.epoch_count if before.epoch_count else None
        changes: dict[str, Any] = {"epoch_loss": 0.0, "epoch_count": 0}
        with self.average.in_place() if self.average is not None else nullcontext():
            means = self._mean_losses(self.validation)
            of_training = self._mean_losses(self.measured_training)
            self._observe()
        if of_training is not None:
            train_loss = of_training.values["loss"]
        if means is None:
            changes |= {"best_step": before.step, "best_epoch": math.ceil(self.epochs_done())}
        else:
            loss = means.values["loss"]
            values = {"loss": loss, **({} if train_loss is None else {"train_loss": train_loss}), **means.values}
            measured = Measured(step=before.step, epoch=self.epochs_done(), values=values)
            self.measurements.add(measured, means.each, of_training.each if of_training is not None else ())
            counts = not first and self.behaviour.settled(before.step)
            if counts and (before.best_loss is None or loss < before.best_loss):
                changes |= {"best_loss": loss, "best_step": before.step, "bad_validations": 0}
                changes |= {"best_epoch": math.ceil(self.epochs_done())}
            elif counts and self._is_rise(means.each):
                changes |= {"bad_validations": before.bad_validations + 1}
            self.on_event(measured)
        self.position = before.with_fields(**changes)

    def save(self) -> None:
        """Write a checkpoint of the present position."""
        random = random_states(self.accelerator)
        if self.accelerator.is_main_process:
            folder = save_checkpoint(
                self.run_folder / "checkpoints", self.model, self.optimizer, self.behaviour, self.position,
                self.base_name, random, self.accelerator.scaler,
            )  # fmt: skip
            prune(self.run_folder, self.recipe.training.keep_checkpoints, self.position.best_step)
            self.on_event(Saved(what="checkpoint", path=str(folder), step=self.position.step))
        self.accelerator.wait_for_everyone()

    def epochs_done(self) -> float:
        """Return epochs completed, with the fraction of the present one."""
        position = self.position
        return position.epoch + position.step_in_epoch / max(1, len(self.plan(position.epoch)))

    def _forward_backward(self, step: Step) -> tuple[float, int, int, float | None]:
        """Accumulate the gradient of a step; return its summed loss, count, cost and penalty.

        Every process computes the same penalty, and exchanging gradients takes their mean: it counts once.
        """
        accelerator = self.accelerator
        turns = share_of_process(step, accelerator.process_index, accelerator.num_processes)
        batches = [self._batch(turn, step) for turn in turns]
        sizes = [self.train.size(batch) for batch in batches]
        summed_sizes = torch.tensor([[size.count, size.cost] for size in sizes], device=accelerator.device).sum(0)
        count, cost = (int(n) for n in accelerator.reduce(summed_sizes, "sum"))
        self.wrapped.train()
        summed = torch.zeros((), device=accelerator.device)
        penalty: torch.Tensor | None = None
        bad: list[int] = []
        lanes = self._lanes()
        for index, batch in enumerate(batches):
            last = index + 1 == len(batches)
            context = nullcontext() if last else accelerator.no_sync(self.wrapped)
            with context:
                share = accelerator.num_processes / max(1, count)
                if lanes is not None and len(batch.rows) > 1:
                    loss = lanes.backward(self.wrapped, self.train, batch, share)
                else:
                    loss = self.train.loss(self.wrapped, batch)
                if not torch.isfinite(loss.each).all():
                    bad += [batch.rows[i] for i in set(loss.row_of[~torch.isfinite(loss.each)].tolist())]
                goals = [loss.total * share] if loss.total.requires_grad else []
                if index == 0 and (penalty := self.behaviour.penalty()) is not None:
                    goals.append(penalty)
                if goals:
                    accelerator.backward(sum(goals[1:], goals[0]))
            summed += loss.total.detach()
        total = float(accelerator.reduce(summed, "sum"))
        if bad or not math.isfinite(total):  # all processes see it in the sum, and stop together
            raise TrainingError(self._not_finite("loss", total, sorted(bad)))
        extra = None if penalty is None else float(penalty.detach())
        return total, count, cost, extra

    def _lanes(self) -> Lanes | None:
        """Return the lanes of this run; decided at its first step, when the model is on the path it trains on."""
        if not self._lanes_decided:
            recomputes = self.recipe.training.gradient_checkpointing
            self._found_lanes = lanes_for(self.accelerator, self.model, self.train, recomputes=recomputes)
            self._lanes_decided = True
        return self._found_lanes

    def _batch(self, rows: list[int] | None, step: Step) -> Any:
        batch = self.train.batch(rows or step[0], self.accelerator.device)
        return batch if rows is not None else self.train.blank(batch)

    def _is_rise(self, losses: Sequence[float]) -> bool:
        """Say whether losses are above those of the best validation by more than noise, where that can be told."""
        found = change(self.measurements.losses_at(self.position.best_step), losses)
        return found is None or found.is_rise

    def _mean_losses(self, objective: Objective | None) -> Means | None:
        budget = self.recipe.training.budgets().microbatch
        return mean_losses(self.accelerator, self.wrapped, objective, budget, self.position.step)

    def _observe(self) -> None:
        """Let the observer look at the model; random numbers and training flags are as before afterwards."""
        if self.observer is None or not self.accelerator.is_main_process:
            return
        model = self.model  # unwrapping would take mixed precision away for good
        modes = {module: module.training for module in model.modules()}
        model.eval()
        device = self.accelerator.device
        try:
            forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
            with torch.no_grad(), forked, self.accelerator.autocast():
                self.observer(model, self.position.step, self.epochs_done())
        except (HaoriError, RuntimeError, ValueError, OSError, MemoryError) as error:  # training is worth more
            self.on_event(Warned(text=f"looking at the model at step {self.position.step} failed: {error}"))
        finally:
            for module, training in modes.items():
                module.training = training

    def _validation_marks(self, steps: int) -> set[int]:
        wanted = self.recipe.training.evaluations_per_epoch
        assert wanted != "auto"
        count = min(steps, wanted)
        return {math.ceil(steps * (k + 1) / count) for k in range(count)}

    def _stops(self, stop: StopRequest) -> bool:
        """Say whether to stop; a signal may reach one of several processes only, and all stop at the same step."""
        asked = (stop.signal or signal.SIGTERM) if stop else 0
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([asked], device=self.accelerator.device)
            asked = int(self.accelerator.gather(mine).max())
        self.stopped_by = self.stopped_by or asked or None
        return self.stopped_by is not None

    def _finished(self) -> bool:
        position = self.position
        over = position.step >= self.total_steps or position.epoch >= self.epochs
        patience = self.recipe.training.patience
        without_best = position.best_loss is not None and self._since_best() >= _WITHOUT_BEST * patience
        self.stopped_early = not over and (position.bad_validations >= patience or without_best)
        return over or self.stopped_early

    def _since_best(self) -> int:
        """Return how many validations there were since the best."""
        best = self.position.best_step or 0
        since = takewhile(lambda line: line["step"] > best, reversed(self.measurements.lines))
        return sum(line["kind"] == "validation" for line in since)

    def _due(self) -> bool:
        every = self.recipe.training.save_every
        return every is not None and self.position.step % every == 0

    def _restore_best(self) -> None:
        best = self.position.best_step
        if best is not None and best != self.position.step:
            folder = self.run_folder / "checkpoints" / f"step-{best:08d}"
            load_trained(folder, self.model)
            load_behaviour(folder, self.behaviour)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _rate_of(self, group: dict[str, Any]) -> float:
        """Return a group's learning rate: of its own peak, or of a factor on the recipe's."""
        peak = group["lr_peak"] if "lr_peak" in group else self._peak_rate() * group["rate"]
        return rate_at(self.position.step, self.total_steps, peak, self.recipe.schedule)

    def _peak_rate(self) -> float:
        rate = self.recipe.optimizer.lr
        assert rate != "auto"
        return rate

    def _not_finite(self, what: str, value: float, rows: list[int]) -> str:
        where = ", ".join(self.train.origins(rows[:5])) if rows else f"{self.task.rows_title} of another process"
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        return (
            f"The {what} became {value} at step {self.position.step + 1} in {where}{more}; "
            f"look at these {self.task.rows_title} or lower optimizer.lr (now {self._peak_rate():g})."
        )


def build_optimizer(behaviour: Behaviour, recipe: Recipe, task: Task) -> torch.optim.AdamW:
    """Return AdamW over the parameter groups of a method, parted where a task has rates of its own for some."""
    section = recipe.optimizer
    assert section.lr != "auto"
    factors = {id(parameter): task.rate(recipe, name) for name, parameter in behaviour.model.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in behaviour.parameter_groups(section.weight_decay):
        parts: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
        for factor, parameters in parts.items():
            scaled: dict[str, Any] = {key: group[key] * factor for key in ("rate", "lr_peak") if key in group}
            groups.append({**group, **scaled, "params": parameters})
    return torch.optim.AdamW(
        groups,
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
