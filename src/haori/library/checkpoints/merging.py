"""Merges an adapter into a checkpoint on disk, tensor by tensor: for bases of any size, and for those of images.

Memory stays near a few tensors, whatever the size of the base: nothing is loaded as a model. Files, shards, the order
and the dtypes of tensors are the base's.
"""

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from haori.bases.pipeline import PIPELINE_INDEX
from haori.core.errors import VerificationError
from haori.core.progress_bar import progress_bar
from haori.core.records import AdapterCard, Verification
from haori.core.storage import staged_folder
from haori.library.checkpoints.checking import check_file, checks_of
from haori.library.checkpoints.plan import MergePlan, new_index, plan_merge, untie
from haori.library.checkpoints.tensors import BaseTensors
from haori.library.checkpoints.writing import Advance, results_of, threads, write_file
from haori.library.formats.peft import check_new_folder
from haori.library.merge import MERGE_RECORD, Merged, refuse_quantized
from haori.library.proof.checks import verification_of

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library.updates import AdapterUpdates

__all__ = ["merge_checkpoint", "write_checkpoint"]

# Other weights than those that the base is read from, and what programs cache beside them.
_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
}  # fmt: skip


def merge_checkpoint(
    base: "Base",
    updates: "AdapterUpdates",
    out: Path,
    *,
    adapter: str,
    card: AdapterCard | None = None,
    chat_template: str | None = None,
) -> Merged:
    """Write the base with the adapter merged into it, with everything that belongs to the base beside the weights.

    Args:
        base: The base that the adapter was made for; the caller has checked that.
        updates: The adapter.
        out: Folder to write; it must not exist or be empty.
        adapter: What to call the adapter in messages.
        card: Its card, for the record of the merge.
        chat_template: The adapter's own, which takes the place of the base's.

    Raises:
        InputError: `out` is in use.
        BaseError: The base is quantised.
        MismatchError: The adapter has no place in the base, or cannot be merged tensor by tensor.
        VerificationError: What was written is not the sum of base and adapter; nothing is left behind.
    """
    check_new_folder(out)
    refuse_quantized(base)
    tensors = BaseTensors(base)
    plan = plan_merge(tensors, updates, adapter=adapter)
    size = sum(file.source.path.stat().st_size for file in plan.files)
    with staged_folder(out) as stage:
        targets = _copy_rest(base.path, stage, tensors, plan)
        with progress_bar("merging", size, "bytes") as advance:
            write_checkpoint(plan, targets, advance)
        with progress_bar("checking", size, "bytes") as advance:
            proof = _prove(plan, targets, advance)
        if not proof.passed:
            raise VerificationError(f"The merged model was not kept: {proof.failures[0].detail}.")
        if chat_template is not None:
            (stage / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        (stage / MERGE_RECORD).write_text(_record(base, card, adapter, proof), encoding="utf-8")
    return Merged(out, proof)


def write_checkpoint(plan: MergePlan, targets: Mapping[Path, Path], advance: Advance = lambda _: None) -> None:
    """Write the merged weight files of a base, each to the target that is given for the base's file."""
    with threads() as pool, ThreadPoolExecutor(1) as disk:
        flushed = []
        for file in plan.files:
            target = targets[file.source.path]
            write_file(file, target, pool, advance)
            flushed.append(disk.submit(_flush, target))  # while the next one is computed
        results_of(flushed)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _prove(plan: MergePlan, targets: Mapping[Path, Path], advance: Advance) -> Verification:
    found = []
    with threads() as pool:
        for file in plan.files:
            found += check_file(file, targets[file.source.path], pool, advance)
    dtypes = {file.source.header.tensors[name].dtype for file in plan.files for name in file.changes}
    return verification_of(checks_of(found), ", ".join(sorted(dtypes)).lower())


def _copy_rest(base: Path, stage: Path, tensors: BaseTensors, plan: MergePlan) -> dict[Path, Path]:
    """Copy what is not weights and return where each weight file goes."""
    plans = {file.source.path: file for file in plan.files}
    indexes = {path.with_name(_index_of(path)) for path in plans}
    for path in _beside(base, tensors):
        if path.suffix in _WEIGHTS or (path.name.endswith(".index.json") and path not in indexes):
            continue
        target = stage / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in indexes:
            target.write_text(new_index(path, plans), encoding="utf-8")
        else:
            shutil.copyfile(path, target)
    for component in plan.untied:
        config = stage / tensors.folders[component].path.relative_to(base) / "config.json"
        config.write_text(json.dumps(untie(json.loads(config.read_text(encoding="utf-8"))), indent=2) + "\n", "utf-8")
    targets = {path: stage / path.relative_to(base) for path in plans}
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    return targets


def _beside(base: Path, tensors: BaseTensors) -> list[Path]:
    """Return the files of a base: those directly in its folder, and in the folders of a pipeline's parts."""
    folders = [base]
    if (base / PIPELINE_INDEX).is_file() and not (base / "config.json").is_file():
        parts = json.loads((base / PIPELINE_INDEX).read_text(encoding="utf-8"))
        folders += [base / name for name, value in parts.items() if isinstance(value, list) and (base / name).is_dir()]
    hidden = (path for folder in folders for path in sorted(folder.iterdir()) if path.is_file())
    return [path for path in hidden if not path.name.startswith(".") and path.name != MERGE_RECORD]


def _index_of(shard: Path) -> str:
    """Return the name of the index that a shard would be in: model-00001-of-00002 in model.safetensors.index.json."""
    stem, _, rest = shard.name.removesuffix(".safetensors").partition("-")
    variant = ""
    if "." in stem:
        stem, _, variant = stem.partition(".")
    elif "." in rest:
        variant = rest.rpartition(".")[2]
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def _record(base: "Base", card: AdapterCard | None, adapter: str, proof: Verification) -> str:
    document = {
        "base": base.reference().model_dump(mode="json"),
        "adapter": card.id if card is not None else adapter,
        "names": list(card.names) if card is not None else [],
        "verification": proof.model_dump(mode="json"),
    }
    return json.dumps(document, indent=2) + "\n"
