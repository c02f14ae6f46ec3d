"""Checkpoints that continue exactly: adapter, AdamW state, random state and position, all without pickles.

A checkpoint is a folder `step-00000042` in the run's `checkpoints`:

    adapter_model.safetensors, adapter_config.json   the adapter as PEFT saves it, with words.json for new words,
    model.safetensors                                 or every weight in full fine-tuning
    optimizer.safetensors                             AdamW's moments, `<parameter>.exp_avg` and so on
    method.safetensors                                what the method keeps besides, where it keeps anything
    random.safetensors                                torch's random states, a row per process
    scaler.json                                       in fp16, the scale of the loss and how long it has held
    position.json                                     step, epoch, best so far, counters

It appears whole or not at all. What is loaded is checked against what is expected.
"""

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file

from haori.adapters.adalora import KERNELS_KEY, kernels_of
from haori.adapters.behaviour import Behaviour
from haori.core.errors import FileFormatError, VerificationError
from haori.core.folder_swap import delete_folder
from haori.core.records import Record
from haori.core.safetensors_header import read_safetensors_header
from haori.core.storage import staged_folder
from haori.library.word_files import write_words
from haori.training.whole_model import load_parameters, save_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from torch.amp import GradScaler

    from haori.core.new_words import NewWords

__all__ = [
    "Position",
    "checkpoints_of",
    "load_adapter",
    "load_behaviour",
    "load_checkpoint",
    "load_trained",
    "prune",
    "random_states",
    "save_adapter",
    "save_checkpoint",
    "save_trained",
    "step_of",
]

_METHOD = "method.safetensors"
_SCALER = "scaler.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
_NAME = re.compile(r"step-(\d{8})")


class Position(Record):
    """Where a run stands after an optimizer step."""

    @model_validator(mode="before")
    @classmethod
    def _of_0_1(cls, data: Any) -> Any:
        """Read the names that version 0.1 wrote."""
        old = {"tokens": "cost", "epoch_tokens": "epoch_count"}
        return {old.get(key, key): value for key, value in data.items()} if isinstance(data, dict) else data

    step: int = 0
    epoch: int = Field(default=0, description="Epoch that the next step belongs to, from 0.")
    step_in_epoch: int = 0
    cost: int = Field(default=0, description="Processed so far: tokens, pixels, residues.")
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    best_epoch: int | None = None
    bad_validations: int = 0
    epoch_loss: float = Field(default=0.0, description="Summed training loss of the epoch so far.")
    epoch_count: int = Field(default=0, description="What carried loss in the epoch so far.")


def save_adapter(model: "PeftModel", folder: Path, base_name: str) -> None:
    """Write the adapter as stock PEFT files and compare what is on disk with what is in memory, bit for bit.

    Raises:
        VerificationError: The file does not hold the live adapter, or holds a value that is not finite.
    """
    from peft import get_peft_model_state_dict

    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = base_name
    with warnings.catch_warnings():
        # A module from which AdaLoRA took every rank has empty factors; what is on disk is compared below.
        warnings.filterwarnings("ignore", ".*LoRA tensor.s. have invalid shape")
        model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        live = get_peft_model_state_dict(model, save_embedding_layers=False)
    if kernels := kernels_of(model):
        file = folder / "adapter_model.safetensors"
        # One key alone: safetensors writes several in any order, and files should be equal byte for byte.
        save_file(load_file(file), file, metadata={KERNELS_KEY: json.dumps(kernels)})
    for extra in folder.glob("README.md"):
        extra.unlink()
    words: NewWords | None = getattr(model.get_base_model(), "new_words", None)  # of a model for pictures
    if words is not None:
        write_words(folder, words)
    saved = load_file(folder / "adapter_model.safetensors")
    if set(live) != set(saved):
        raise VerificationError(
            f"The saved adapter has other tensors than the live one: {sorted(set(live) ^ set(saved))[:3]}."
        )
    for name, tensor in saved.items():
        if not torch.isfinite(tensor).all():
            raise VerificationError(
                f"The adapter tensor {name!r} holds values that are not finite; lower optimizer.lr."
            )
        if not torch.equal(tensor, live[name].detach().cpu()):
            raise VerificationError(f"The saved adapter tensor {name!r} differs from the live one.")


def save_trained(model: torch.nn.Module, folder: Path, base_name: str) -> None:
    """Write what is trained, an adapter or every weight, and check it bit for bit; see `save_adapter`."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        save_adapter(model, folder, base_name)
    else:
        save_parameters(model, folder)


def load_trained(folder: Path, model: torch.nn.Module) -> None:
    """Copy what `save_trained` wrote into the live model.

    Raises:
        FileFormatError: It was made by another recipe.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        load_adapter(folder, model)
    else:
        load_parameters(folder, model)


def save_checkpoint(
    root: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    behaviour: Behaviour,
    position: Position,
    base_name: str,
    random: dict[str, torch.Tensor],
    scaler: "GradScaler | None" = None,
) -> Path:
    """Write a checkpoint for `position` under `root` and return its folder.

    Args:
        root: Folder of the run's checkpoints.
        model: With what is trained.
        optimizer: AdamW over it.
        behaviour: Of the method.
        position: Where the run stands.
        base_name: For the adapter's configuration.
        random: What `random_states` returned.
        scaler: Of the loss, in fp16.
    """
    final = root / f"step-{position.step:08d}"
    with staged_folder(final) as stage:
        save_trained(model, stage, base_name)
        save_file(_optimizer_tensors(model, optimizer), stage / "optimizer.safetensors")
        if state := behaviour.state():
            save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, stage / _METHOD)
        save_file(random, stage / "random.safetensors")
        if scaler is not None:
            (stage / _SCALER).write_text(json.dumps(scaler.state_dict(), indent=1))
        (stage / "position.json").write_text(position.model_dump_json(indent=1))
    return final


def load_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    behaviour: Behaviour,
    *,
    process: int = 0,
    scaler: "GradScaler | None" = None,
) -> Position:
    """Restore model, optimizer, method, loss scale and the random state of a process; return the position.

    Raises:
        FileFormatError: The checkpoint is incomplete or belongs to another model.
    """
    try:
        position = Position.model_validate_json((folder / "position.json").read_text())
    except (OSError, ValueError) as error:
        raise FileFormatError(f"The checkpoint {str(folder)!r} has no readable position.json.") from error
    load_trained(folder, model)
    load_behaviour(folder, behaviour)
    _restore_optimizer(_load(folder / "optimizer.safetensors"), folder, model, optimizer)
    if scaler is not None:
        scaler.load_state_dict(_scale(folder))
    _restore_random_state(_load(folder / "random.safetensors"), process)
    return position


def load_adapter(folder: Path, model: "PeftModel") -> None:
    """Copy an adapter's saved tensors into the live model, each of them or none.

    Raises:
        FileFormatError: Names or shapes differ from the live adapter's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = _load(folder / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in live.items()}:
        raise FileFormatError(f"The adapter in {str(folder)!r} does not fit this model; it was made by another recipe.")
    set_peft_model_state_dict(model, saved)


def load_behaviour(folder: Path, behaviour: Behaviour) -> None:
    """Restore what a method keeps besides its parameters.

    Raises:
        FileFormatError: The checkpoint lacks it.
    """
    if behaviour.state() or (folder / _METHOD).is_file():
        behaviour.load_state(_load(folder / _METHOD))


def checkpoints_of(run_folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    root = run_folder / "checkpoints"
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name)


def step_of(checkpoint: Path) -> int:
    """Return how many optimizer steps were done at a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def prune(run_folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; the best one stays."""
    for path in checkpoints_of(run_folder)[:-keep]:
        if path.name != f"step-{best_step or 0:08d}":
            delete_folder(path)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        read_safetensors_header(path)
    except OSError:
        raise FileFormatError(f"The checkpoint {str(path.parent)!r} has no {path.name}.") from None
    return load_file(path)


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state: Any = optimizer.state
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in _trained(model)
        for key, value in state[parameter].items()
    }


def _restore_optimizer(
    tensors: dict[str, torch.Tensor], folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    optimizer.state.clear()
    if not tensors:
        return  # no step was taken yet: in fp16 the first ones may all be skipped
    try:
        for name, parameter in _trained(model):
            if not any(f"{name}.{key}" in tensors for key in _MOMENTS):
                continue  # it had no gradient yet, as the last layer of an encoder whose last states nothing reads
            optimizer.state[parameter] = {
                key: tensors[f"{name}.{key}"].to(parameter.device if key != "step" else "cpu") for key in _MOMENTS
            }
    except KeyError as error:
        raise FileFormatError(
            f"The checkpoint {str(folder)!r} has no {error.args[0]!r} of the optimizer; it was made by another recipe."
        ) from None


def _scale(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _SCALER).read_text())
    except (OSError, ValueError):
        raise FileFormatError(
            f"The checkpoint {str(folder)!r} has no readable {_SCALER}, which a run in fp16 goes on from; remove it to "
            "resume from the one before, or start a new run."
        ) from None
    return dict(state)


def random_states(accelerator: "Accelerator") -> dict[str, torch.Tensor]:
    """Return the random states of all processes, (processes, bytes) each; every process calls this."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(accelerator.device)
    gathered = {name: accelerator.gather(state[None].to(accelerator.device)) for name, state in states.items()}
    return {name: state.cpu() for name, state in gathered.items()}


def _restore_random_state(states: dict[str, torch.Tensor], process: int) -> None:
    """Restore what a process had; one that was not there when the checkpoint was written keeps its own state."""
    if states["cpu"].dim() == 1:  # as version 0.1 wrote it: the first process's, with a state per device it saw
        torch.set_rng_state(states["cpu"])
        if torch.cuda.is_available():
            for i in range(torch.cuda.device_count()):
                if f"cuda.{i}" in states:
                    torch.cuda.set_rng_state(states[f"cuda.{i}"], i)
        return
    if process >= len(states["cpu"]):
        return
    torch.set_rng_state(states["cpu"][process].clone())
    if "device" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["device"][process].clone())
