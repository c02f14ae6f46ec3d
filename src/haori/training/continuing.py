"""Training that goes on from a stored adapter: continued in place, at its rank and on its targets.

The new adapter is one of its own, with the old one among its parents. What the recipe asks for must be what the old
adapter is; only what leaves its shape alone may be changed (learning rate, dropout, epochs, data).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haori.core.errors import LibraryError, MismatchError, RecipeError
from haori.core.methods import AdaptedMethod, DoraMethod, LoraMethod, LowRankMethod, Method, QloraMethod
from haori.core.records import Check, Head
from haori.core.user_path import user_path
from haori.library import Library, check_base, inspect_adapter
from haori.library.adapter_files import AdapterFiles
from haori.library.attaching import attach_files, check_keys
from haori.library.cards import adapter_id, read_card
from haori.tasks.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from haori.bases import Base

__all__ = ["Origin", "check_learnt", "find_origin", "locate_origin"]

_FREE = frozenset({"kind", "dropout", "lr_ratio", "init"})  # of a method's keys; they leave the adapter's shape alone
_BIAS = {"none": "none", "lora_only": "adapted", "all": "all"}


class Origin(NamedTuple):
    """The adapter that a run goes on from.

    Attributes:
        name: As it is called: a name with version, or its folder.
        files: What its folder holds.
        parent: Its id by content.
        method: Its method, with what the recipe may change as the recipe has it.
        targets: Full names of the adapted modules.
    """

    name: str
    files: AdapterFiles
    parent: str
    method: Method
    targets: tuple[str, ...]

    def attach(self, model: "PreTrainedModel", task_type: str | None, base_name: str) -> "PeftModel":
        """Put the adapter on a loaded base, ready to be trained on."""
        changes: dict[str, Any] = {"task_type": task_type}
        if isinstance(self.method, LowRankMethod):
            changes["lora_dropout"] = 0.0 if self.method.dropout == "auto" else self.method.dropout
        files = replace(self.files, config={**self.files.config, **changes})
        return attach_files(model, files, base_name=base_name, trainable=True)


def find_origin(
    recipe: Recipe, base: "Base", skeleton: "PreTrainedModel", head: Head | None, tokenizer: Any
) -> Origin | None:
    """Find the adapter that a recipe goes on from, and check that base, head and method are its own.

    Args:
        recipe: As the user gave it.
        base: To train on.
        skeleton: Its modules, without weights.
        head: That the task gives the model, if any.
        tokenizer: The base's, for the names of trained tokens.

    Returns:
        None where the recipe begins afresh.

    Raises:
        HaoriError: There is no such adapter, or something of it does not fit; it is named.
    """
    if recipe.from_ is None:
        return None
    name, folder = locate_origin(recipe.from_)
    files = inspect_adapter(folder)
    card = read_card(folder)
    if card is not None:
        check_base(card, base.reference())
    if files.words is not None:
        raise RecipeError(
            f"'from' cannot be {name!r}: it brings the new words {', '.join(w.word for w in files.words.words)}, which "
            "are not trained on; train a new adapter with words, or go on from one without."
        )
    check_keys(skeleton, files, base_name=base.name)
    if head is not None and files.head is not None and head != files.head:
        theirs, ours = ", ".join(files.head.labels), ", ".join(head.labels)
        raise MismatchError(f"The adapter {name!r} tells apart {theirs}; the data has the labels {ours}.")
    if (head is None) != (files.head is None):
        kinds = "a classifier" if files.head is not None else "no classifier"
        raise MismatchError(f"The adapter {name!r} is {kinds}, so the task {recipe.task} cannot go on from it.")
    names = {module for module, _ in skeleton.named_modules()}
    targets = tuple(sorted(module for module in files.ranks if module in names))
    return Origin(name, files, adapter_id(files), _method(recipe.method, files, name, targets, tokenizer), targets)


def check_learnt(folder: Path, origin: Origin) -> Check:
    """Compare a trained adapter with the one it began as: were they equal, nothing would have been learnt."""
    from safetensors.torch import load_file

    before, after = load_file(origin.files.weights), load_file(folder / origin.files.weights.name)
    squares = [
        (float((tensor.float() - before[name].float()).square().sum()), float(before[name].float().square().sum()))
        for name, tensor in after.items()
        if name in before and before[name].shape == tensor.shape
    ]
    moved, norm = (math.sqrt(sum(column)) for column in zip(*squares, strict=True))
    detail = f"the adapter's weights are {moved:.3g} away from those of {origin.name} (norm {norm:.3g}), where it began"
    return Check(name="learnt", passed=moved > 0, detail=detail, value=moved, limit=0.0)


def locate_origin(spec: str) -> tuple[str, Path]:
    """Return the name with version and the folder of an adapter to go on from: of the library, or a PEFT folder.

    Raises:
        RecipeError: There is none.
    """
    folder = user_path(spec)
    if "/" in spec or folder.is_dir():
        if not (folder / "adapter_config.json").is_file():
            raise RecipeError(
                f"The recipe's 'from' cannot be {spec!r}: that is no folder with an adapter_config.json; give a name "
                "of the library, such as support@2, or a PEFT folder."
            )
        return str(folder.resolve()), folder.resolve()
    try:
        stored = Library().get(spec)
    except LibraryError as error:
        raise RecipeError(f"The recipe's 'from' cannot be {spec!r}: {error}") from None
    return stored.name, stored.path


def _method(wanted: Method, files: AdapterFiles, name: str, targets: tuple[str, ...], tokenizer: Any) -> Method:
    """Return the adapter's own method, after comparing it with what the recipe says of one."""
    if files.peft_type != "LORA" or not isinstance(wanted, LoraMethod | DoraMethod | QloraMethod):
        kind = files.method if files.peft_type != "LORA" else wanted.kind
        raise RecipeError(
            f"'from' goes on from LoRA and DoRA adapters, as lora, qlora or dora; {name!r} is {files.method} and the "
            f"recipe says {wanted.kind}: {kind} cannot be continued."
        )
    if files.use_dora != isinstance(wanted, DoraMethod):
        right = "dora" if files.use_dora else "lora or qlora"
        raise RecipeError(f"The adapter {name!r} is {files.method}; set method.kind={right} to go on from it.")
    config = files.config
    own: dict[str, Any] = {
        "rank": int(config["r"]),
        "alpha": float(config["lora_alpha"]),
        "rslora": files.use_rslora,
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "bias": _BIAS.get(str(config.get("bias") or "none"), "none"),
        "modules_to_save": files.modules_to_save,
        "trainable_tokens": tuple(tokenizer.convert_ids_to_tokens(list(files.trainable_tokens))),
        "target": targets,
        "layers": (),
        "train_norms": False,
    }
    _compare(wanted, own, name, targets)
    free = {"dropout": float(config.get("lora_dropout") or 0.0)}
    chosen = {key: value for key, value in free.items() if getattr(wanted, key) == "auto"}
    return wanted.model_copy(update={**own, **chosen})


def _compare(wanted: AdaptedMethod, own: Mapping[str, Any], name: str, targets: tuple[str, ...]) -> None:
    """Refuse a key of the recipe that asks for another shape than the adapter has."""
    for key in sorted(wanted.model_fields_set - _FREE):
        value = getattr(wanted, key)
        if value == "auto" or (key in {"target", "layers"} and _covers(wanted, targets)):
            continue
        if key in own and value != own[key]:
            raise RecipeError(
                f"The recipe's 'method.{key}' is {value!r}, and the adapter {name!r} to go on from has {own[key]!r}; "
                "leave the key out, or train a new adapter."
            )


def _covers(wanted: AdaptedMethod, targets: tuple[str, ...]) -> bool:
    """Say whether targets are left to the adapter, or are exactly its own."""
    if wanted.layers:
        return False
    given = (wanted.target,) if isinstance(wanted.target, str) else wanted.target
    return given == ("all-linear",) or set(given) == set(targets)
