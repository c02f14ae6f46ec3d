"""Run as a process of its own: reads tensors from a pickle and writes them as safetensors.

Imports nothing of the package. Gets two paths, the file and the new one, then limits on seconds, memory and output;
prints one line of JSON. torch's `weights_only` lets a pickle name nothing but tensors and plain containers; the limits
hold whatever it does all the same: no more memory, no longer time, no larger file, no new process.
"""

import contextlib
import json
import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

_CONTAINERS = ("state_dict", "model_state_dict", "weights", "lora")


def limited(seconds: int, memory: int, output: int) -> None:
    """Set the limits of this process; memory is in addition to what it holds now."""
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, held + memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (allowed, allowed))


def tensors_of(found: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors of a state dict by name, and the names of what else the file holds."""
    import torch

    left_out = []
    if isinstance(found, dict):
        inner = [name for name in _CONTAINERS if isinstance(found.get(name), dict)]
        if inner and not any(isinstance(value, torch.Tensor) for value in found.values()):
            left_out = [str(name)[:80] for name in found if name != inner[0]]
            found = found[inner[0]]
    if not isinstance(found, dict):
        raise TypeError(f"it holds a {type(found).__name__}, not tensors by name")
    tensors = {}
    for name, given in found.items():
        is_alpha = isinstance(name, str) and name.endswith(".alpha") and isinstance(given, int | float)
        value = torch.tensor(float(given)) if is_alpha else given
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            left_out.append(str(name)[:80])
            continue
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ValueError(f"the tensor {name[:80]!r} is sparse, quantised or complex")
        tensors[name] = value.detach().contiguous().clone()
    if not tensors:
        raise ValueError("it holds no tensors by name")
    return tensors, left_out


def main(source: str, target: str, seconds: str, memory: str, output: str) -> int:
    """Convert one file; print what became of it."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    limited(int(seconds), int(memory), int(output))
    try:
        tensors, left_out = tensors_of(torch.load(source, map_location="cpu", weights_only=True))
        save_file(tensors, target, metadata={"format": "pt"})
        answer: dict[str, Any] = {"tensors": len(tensors), "left_out": left_out}
    except MemoryError:
        answer = {"error": "it asks for more memory than a file of its size needs"}
    except Exception as error:  # noqa: BLE001 - whatever a hostile file makes the reader raise
        text = str(error)
        named = re.search(r"(?:GLOBAL|global) ([\w.]+)", text)
        if "weights_only" in text or "Weights only" in text:
            what = f"it names {named[1][:80]!r}" if named else "it asks for more than tensors"
            answer = {"error": f"{what}, which no file of tensors needs: it may be hostile"}
        elif "alloc" in text or "memory" in text.lower():
            answer = {"error": "it asks for more memory than a file of its size needs"}
        else:
            answer = {"error": text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(*sys.argv[1:]))
