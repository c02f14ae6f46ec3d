"""Amounts that several keys say together: batches in tokens, epochs, warm-up, and how often is measured and saved.

Other tools count rows and steps; a recipe counts tokens and shares, which do not change with the length of the rows
or the size of the data. What cannot be turned into the one without the data is left, with the way to find it.
"""

import math

from haori.conversion.draft import Draft

__all__ = ["combine_batches", "combine_measuring", "combine_run_length"]

_MOST_EPOCHS = 100
_FIND_STEPS = "schedule.warmup_ratio is a share of all steps, which `haori train --dry-run` counts"


_JOINED = "rows are not joined here; a batch takes as many as its tokens allow, whose lengths are near"


def combine_batches(draft: Draft) -> None:
    """Turn rows into tokens.

    Facts: `rows` (of one forward pass), `accumulation` (passes of a step) or `step_rows` (rows of a step), and
    `length` (tokens of the longest row), which stays a fact of its own; `packing`.
    """
    packed = bool(draft.value("packing"))
    draft.unneeded("packing", _JOINED)
    if not draft.has("rows") and not draft.has("step_rows"):
        draft.leave("accumulation", "without the rows of one pass it says nothing", "training.batch_tokens")
        return
    step_rows = draft.value("step_rows")
    rows = draft.value("rows", step_rows)
    accumulation = draft.value("accumulation") or (math.ceil(step_rows / rows) if step_rows and rows else 1)
    length = draft.ours.get("data.max_length")
    names = [name for name in ("rows", "accumulation", "step_rows") if draft.has(name)]
    if not isinstance(length, int) or rows < 1 or accumulation < 1:
        for name in names:
            draft.leave(
                name, "rows cannot be turned into tokens without a length of rows",
                "training.batch_tokens; `auto` takes 4 to 32 rows of average length",
            )  # fmt: skip
        return
    tokens = rows * length
    one = f"{rows} x {length:,} tokens"
    if packed:
        remark = f"a pass of {one}, {accumulation} of them to a step on each device"
    else:
        of_all = rows * accumulation
        remark = (
            f"a pass of {rows} rows of at most {length:,} tokens, {accumulation} to a step on each device; of shorter "
            f"rows more fit: for {of_all} rows, set training.batch_tokens to {of_all} times the mean length that "
            "`haori data check` shows"
        )
    ours = {"training.micro_batch_tokens": tokens, "training.batch_tokens": tokens * accumulation}
    draft.carry(names, ours, remark)


def combine_run_length(draft: Draft) -> None:
    """Settle `epochs`, `max_steps`, `warmup_steps` and `warmup_ratio`."""
    steps = draft.value("max_steps")
    if draft.has("max_steps"):
        if steps > 0:
            draft.carry("max_steps", {"training.max_steps": steps})
        else:
            draft.unneeded("max_steps", "no limit, as here")
    if draft.has("epochs"):
        _epochs(draft, draft.value("epochs"), steps or 0)
    _warmup(draft, steps or 0)


def _epochs(draft: Draft, epochs: float, steps: int) -> None:
    if steps > 0 and (draft.is_assumed("epochs") or epochs <= 0):
        draft.carry("epochs", {"training.epochs": _MOST_EPOCHS}, "an upper limit; the steps end the run")
    elif epochs <= 0:
        draft.leave("epochs", "no epochs and no steps", "training.epochs")
    else:
        remark = f"epochs are whole here; {epochs:g} is rounded up" if epochs != int(epochs) else ""
        if steps > 0:
            remark = "what comes first ends the run, these or training.max_steps; there, the steps alone do"
        draft.carry("epochs", {"training.epochs": math.ceil(epochs)}, remark)


def _warmup(draft: Draft, steps: int) -> None:
    if "schedule.warmup_ratio" in draft.ours:
        for name in ("warmup_steps", "warmup_ratio"):
            draft.unneeded(name, "that schedule has no warm-up")
        return
    wanted = draft.value("warmup_steps")
    if wanted and draft.has("warmup_ratio") and not draft.is_assumed("warmup_steps"):
        draft.unneeded("warmup_ratio", f"{draft.key('warmup_steps')!r} comes before it")
    if wanted and wanted < 1:
        draft.carry("warmup_steps", {"schedule.warmup_ratio": wanted}, "less than 1 is a share of the steps")
    elif wanted and 0 < wanted < steps:
        draft.carry("warmup_steps", {"schedule.warmup_ratio": wanted / steps}, f"{wanted:g} of {steps:,} steps")
    elif wanted:
        draft.leave("warmup_steps", f"{wanted:g} steps are an unknown share of the run", _FIND_STEPS)
    elif draft.has("warmup_ratio"):
        draft.unneeded("warmup_steps", "none")
        draft.carry("warmup_ratio", {"schedule.warmup_ratio": draft.value("warmup_ratio")})
    elif draft.has("warmup_steps"):
        draft.carry("warmup_steps", {"schedule.warmup_ratio": 0.0})


def combine_measuring(draft: Draft) -> None:
    """Settle `validation_size` (a share, or a number of rows), `eval_steps` and `save_steps` (below 1: shares)."""
    if draft.has("validation_size"):
        size = draft.value("validation_size")
        if 0 <= size <= 0.5:
            draft.carry("validation_size", {"data.validation_share": size})
        else:
            counted = "a number of rows" if size >= 1 else "more than half of the rows"
            draft.leave("validation_size", f"{size:g} is {counted}", "data.validation_share, up to 0.5")
        draft.unneeded("no_validation", "rows are held out, and measured")
    draft.carry("no_validation", {"data.validation_share": 0.0} if draft.has("no_validation") else {})
    if "training.evaluations_per_epoch" in draft.ours:
        draft.unneeded("eval_steps", "another key says how often")
    if draft.has("eval_steps"):
        share, epochs = draft.value("eval_steps"), draft.ours.get("training.epochs")
        if 0 < share < 1 and isinstance(epochs, int):
            times = max(1, math.ceil(1 / (share * epochs)))
            draft.carry("eval_steps", {"training.evaluations_per_epoch": times}, "a share of the run")
        else:
            draft.leave(
                "eval_steps", f"validation every {share:g} steps is an unknown part of an epoch",
                "training.evaluations_per_epoch, automatic by default",
            )  # fmt: skip
    if draft.has("save_steps"):
        every = draft.value("save_steps")
        if every >= 1 and draft.value("saves_by_steps", True):
            draft.carry(("save_steps", "saves_by_steps"), {"training.save_every": int(every)})
        elif every == 0 or not draft.value("saves_by_steps", True):
            draft.unneeded("save_steps", "a checkpoint is saved after each epoch")
        else:
            draft.leave("save_steps", "a share of the run is an unknown number of steps", "training.save_every")
    draft.unneeded("saves_by_steps", "a checkpoint is saved after each epoch, and every training.save_every steps")
