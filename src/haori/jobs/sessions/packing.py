"""Requests and results as files, so that a restart finds them: JSON and arrays in one `.npz`, and no code."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import FileFormatError, HaoriError, InputError, TrainingError
from haori.core.storage import staged_file
from haori.jobs.sessions.records import Call, ForwardCall, LoadCall, SaveCall, StepCall

if TYPE_CHECKING:
    from haori.jobs.tenants.records import LossOutput

__all__ = ["read_call", "read_result", "write_call", "write_result"]


def write_call(path: Path, call: Call) -> None:
    """Write a request."""
    if isinstance(call, ForwardCall):
        arrays = {f"{row}/tokens": datum.tokens for row, datum in enumerate(call.data)}
        for row, datum in enumerate(call.data):
            arrays |= {f"{row}/inputs/{name}": value for name, value in datum.inputs.items()}
        head = {"loss": call.loss, "config": dict(call.config), "forward_only": call.forward_only}
        _write(path, {"forward": head, "rows": len(call.data)}, arrays)
    elif isinstance(call, StepCall):
        _write(path, {"step": call.params.model_dump()}, {})
    else:
        _write(path, {"save" if isinstance(call, SaveCall) else "load": asdict(call)}, {})


def read_call(path: Path) -> Call:
    """Read a request.

    Raises:
        FileFormatError: The file is damaged.
    """
    from haori.jobs.tenants.records import AdamParams, Datum

    head, arrays = _read(path)
    if "step" in head:
        return StepCall(AdamParams.model_validate(head["step"]))
    if "save" in head:
        return SaveCall(**head["save"])
    if "load" in head:
        return LoadCall(**head["load"])
    inputs: list[dict[str, Any]] = [{} for _ in range(head["rows"])]
    for key, value in arrays.items():
        row, _, name = key.partition("/inputs/")
        if name:
            inputs[int(row)][name] = value
    data = [Datum(arrays[f"{row}/tokens"], given) for row, given in enumerate(inputs)]
    return ForwardCall(data, **head["forward"])


def write_result(path: Path, result: "LossOutput | dict[str, Any] | HaoriError") -> None:
    """Write the answer to a request."""
    if isinstance(result, dict):
        _write(path, {"answer": result}, {})
    elif isinstance(result, HaoriError):
        _write(path, {"error": str(result), "by_user": isinstance(result, InputError)}, {})
    else:
        arrays = {str(row): value for row, value in enumerate(result.logprobs)}
        _write(path, {"metrics": result.metrics, "rows": len(result.logprobs)}, arrays)


def read_result(path: Path) -> "LossOutput | dict[str, Any] | HaoriError":
    """Read the answer to a request.

    Raises:
        FileFormatError: The file is damaged.
    """
    from haori.jobs.tenants.records import LossOutput

    head, arrays = _read(path)
    if "answer" in head:
        found: dict[str, Any] = head["answer"]
        return found
    if "error" in head:
        return (InputError if head["by_user"] else TrainingError)(head["error"])
    return LossOutput([arrays[str(row)] for row in range(head["rows"])], head["metrics"])


def _write(path: Path, head: dict[str, Any], arrays: dict[str, Any]) -> None:
    import numpy as np

    with staged_file(path) as stage, stage.open("wb") as file:
        np.savez(file, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import zipfile

    import numpy as np

    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return json.loads(arrays.pop("head").tobytes()), arrays
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"The saved request {path.name!r} cannot be read ({error!r}).") from None
