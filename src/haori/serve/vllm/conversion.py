"""Adapters as vLLM can serve them: plain LoRA, with every scale in B, in a folder of our own.

vLLM reads a folder again whenever it has evicted the adapter, and its engine ends if the folder is gone or
was changed. So every adapter is written once under its content id, and neither removing it from the library nor
retraining it touches that copy. In it rsLoRA, rank and alpha patterns, AdaLoRA and ARD-LoRA are plain LoRA: ranks
below the largest are filled up with zeros, which changes nothing.

vLLM gives a request one adapter. A blend is the same thing as one adapter whose A are those of its parts, one below
another, and whose B are theirs side by side, times the strengths:

    sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...]
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from haori.core.errors import InputError
from haori.core.folder_swap import delete_folder
from haori.core.hashing import hash_data, short
from haori.core.lock import file_lock
from haori.core.storage import explain_os_errors, make_folder, staged_folder
from haori.serve.request import AdapterMix

if TYPE_CHECKING:
    from torch import Tensor

    from haori.library import AdapterFiles
    from haori.serve.adapters.reading import AdapterWeights, BaseTensors

__all__ = ["VllmCopies", "allowed_rank", "vllm_name"]

_RANKS = (8, 16, 32, 64, 128, 256)  # of --max-lora-rank, in every version

_FORMAT = 1  # of the copies; another number makes all of them anew
_KEPT_S = 30 * 86400.0
_NAME_DIGITS = 32  # 12 could be hit on purpose, and one adapter be taken for another


def vllm_name(mix: AdapterMix) -> str:
    """Return what vLLM calls an adapter, or a blend of adapters, by its content."""
    parts = [[adapter, strength] for adapter, strength in mix]
    return f"haori-{hash_data([_FORMAT, parts]).removeprefix('sha256:')[:_NAME_DIGITS]}"


def allowed_rank(rank: int) -> int:
    """Return the smallest value of vLLM's --max-lora-rank that takes adapters of a rank; the largest if none does."""
    return next((allowed for allowed in _RANKS if allowed >= rank), _RANKS[-1])


class VllmCopies:
    """The folders that vLLM reads.

    Callers may ask for any number of blends, so each is deleted once no server has it; no other process reads it.

    Args:
        root: Where they are.
        files_of: Finds an adapter's files by its content id.
        tensors: The base that the adapters act on.
        largest_rank: What vLLM takes; None if that is not known, so that vLLM must say.
    """

    def __init__(
        self,
        root: Path,
        files_of: "Callable[[str], AdapterFiles]",
        tensors: "BaseTensors",
        largest_rank: int | None,
    ) -> None:
        self.root = root
        self.blends = root / f"blends-{os.getpid()}"
        self.largest_rank = largest_rank
        self._files_of = files_of
        self._tensors = tensors
        self._sweep()

    def folder(self, mix: AdapterMix) -> Path:
        """Return the folder with a mix as one plain LoRA, written if it is not there.

        Raises:
            InputError: vLLM cannot serve one of the adapters, or the rank is too large.
            LibraryError: An adapter is not here any more.
            StorageError: It cannot be written.
        """
        folder = self._folder_for(mix)
        if not self.touch(mix):
            self._write(mix, folder)
        self._check_rank(mix, _rank_of(folder))
        return folder

    def check(self, files: "AdapterFiles", adapter: str) -> None:
        """Refuse an adapter that vLLM cannot serve; nothing is written.

        Raises:
            HaoriError: It is one.
        """
        factors = _joined([(self._weights(files, adapter), 1.0)])
        self._check_rank(((adapter, 1.0),), max(a.shape[0] for a, _ in factors.values()))

    def touch(self, mix: AdapterMix) -> bool:
        """Mark the folder of a mix as in use, so that it is not swept; False if there is none."""
        try:
            os.utime(self._folder_for(mix))
        except OSError:
            return False
        return True

    def discard(self, name: str) -> None:
        """Delete the folder of a blend that no server needs any more; that of an adapter stays."""
        shutil.rmtree(self.blends / name, ignore_errors=True)

    def close(self) -> None:
        """Delete what nobody else uses."""
        shutil.rmtree(self.blends, ignore_errors=True)

    def _folder_for(self, mix: AdapterMix) -> Path:
        is_blend = len(mix) > 1 or mix[0][1] != 1.0
        return (self.blends if is_blend else self.root) / vllm_name(mix)

    def _write(self, mix: AdapterMix, folder: Path) -> None:
        from safetensors.torch import save_file

        make_folder(self.root)
        parts = [(self._read(adapter), strength) for adapter, strength in mix]
        factors = _joined(parts)
        rank = max(a.shape[0] for a, _ in factors.values())
        self._check_rank(mix, rank)
        tensors = {}
        for module, (a, b) in factors.items():
            tensors[f"base_model.model.{module}.lora_A.weight"] = _filled(a, rank)  # R D_in
            tensors[f"base_model.model.{module}.lora_B.weight"] = _filled(b, rank).T.contiguous()  # D_out R
        config = {
            "peft_type": "LORA", "task_type": self._files_of(mix[0][0]).config.get("task_type"), "bias": "none",
            "r": rank, "lora_alpha": rank,
            "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        }  # fmt: skip
        with file_lock(self.root / ".lock", holds="copies for vLLM"):
            if folder.exists():
                return  # another thread or server was quicker; the content is the same
            with staged_folder(folder) as stage:
                save_file(tensors, stage / "adapter_model.safetensors", metadata={"format": "pt"})
                (stage / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    def _read(self, adapter: str) -> "AdapterWeights":
        return self._weights(self._files_of(adapter), adapter)

    def _weights(self, files: "AdapterFiles", adapter: str) -> "AdapterWeights":
        import torch

        from haori.serve.adapters.reading import read_adapter_weights

        label = repr(short(adapter))
        if files.use_dora:  # said before the whole base is read for it
            raise InputError(_refusal(label, "DoRA magnitudes"))
        weights = read_adapter_weights(files, self._tensors, adapter=adapter, dtype=torch.float32)
        for name, update in weights.updates.items():
            if update.output_scale is not None:
                raise InputError(_refusal(label, f"a changed magnitude of {name!r}"))
            if update.bias is not None:
                raise InputError(_refusal(label, f"a trained bias of {name!r}"))
        for name in weights.vectors:
            raise InputError(_refusal(label, f"the trained weight {name!r}"))
        for name in weights.token_rows:
            raise InputError(_refusal(label, f"trained tokens in {name!r}"))
        return weights

    def _check_rank(self, mix: AdapterMix, rank: int) -> None:
        if self.largest_rank is None or rank <= self.largest_rank:
            return
        label = " + ".join(repr(short(adapter)) for adapter, _ in mix)
        what = f"The adapter {label} has rank {rank}" if len(mix) == 1 else f"The blend {label} takes rank {rank}"
        raise InputError(
            f"{what}; vLLM was started for ranks up to {self.largest_rank}. Start it with "
            f"--vllm-arg=--max-lora-rank={allowed_rank(rank)}, or merge with `haori merge`."
        )

    def _sweep(self) -> None:
        """Delete copies that no server has used for long."""
        if not self.root.is_dir():
            return
        with explain_os_errors(self.root):
            for path in self.root.iterdir():
                with suppress(FileNotFoundError):
                    if path.is_dir() and time.time() - path.stat().st_mtime > _KEPT_S:
                        delete_folder(path)


def _joined(parts: "Sequence[tuple[AdapterWeights, float]]") -> "Mapping[str, tuple[Tensor, Tensor]]":
    """Return A [R, D_in] and B transposed [R, D_out] of each module, R being the sum of the parts' ranks."""
    import torch

    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for weights, strength in parts:
        for module, update in weights.updates.items():
            if update.a is not None and update.b is not None:
                found.setdefault(module, []).append((update.a, update.b * strength))
    return {
        module: (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])) for module, pairs in found.items()
    }


def _filled(factor: "Tensor", rank: int) -> "Tensor":
    import torch

    return torch.cat([factor, factor.new_zeros(rank - factor.shape[0], factor.shape[1])]).contiguous()


def _rank_of(folder: Path) -> int:
    return int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])


def _refusal(label: str, what: str) -> str:
    return (
        f"The adapter {label} holds {what}, which vLLM does not apply; merge it with `haori merge` and serve the "
        "merged model, or serve it with --engine native."
    )
