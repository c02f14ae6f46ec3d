"""The task of a configuration: only texts are trained on; what asks for another task is refused, not bent."""

from collections.abc import Mapping
from pathlib import Path

from haori.conversion.draft import Draft
from haori.core.errors import RecipeError

__all__ = ["check_task"]

_TASKS: Mapping[str, str] = {
    "": "causal language modelling", "pretraining": "causal language modelling",
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "kto", "cpo"), "preference training"),
    **dict.fromkeys(("seq_cls", "token_cls"), "classification"),
    **dict.fromkeys(("rm", "reward model", "process reward model"), "training of a reward model"),
    **dict.fromkeys(("ppo", "grpo", "gdpo"), "reinforcement learning"),
}  # fmt: skip
_TRAINED = "causal language modelling"


def check_task(draft: Draft, path: Path) -> None:
    """Settle the fact `task`.

    Raises:
        RecipeError: There is no such task here.
    """
    if not draft.has("task"):
        return
    value = draft.value("task")
    found = _TASKS.get(value.lower(), "another task")
    if found != _TRAINED:
        raise RecipeError(
            f"{draft.key('task')!r} in {str(path)!r} asks for {found} ({value}), which is not carried over: a recipe "
            f"of this file would train something else. Only {_TRAINED} is; `haori schema` shows what a recipe holds."
        )
    if value != "pretraining":
        draft.unneeded("task", "texts are trained on, as here")
