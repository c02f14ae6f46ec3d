"""What a proof needs to know of classifiers: whose weights their heads are, and what their adapters do beside them.

A head is trained from scratch, so bare base and adapter differ by it whatever the rest of the adapter does. The effect
of an adapter is therefore measured under its own head: with its updates of the base, and without.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import safe_open

from haori.core.records import Check
from haori.library.adapter_files import AdapterFiles
from haori.library.proof.checks import failed, passed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from haori.bases import Base

__all__ = ["check_head", "wearing_head"]

_PREFIX = "base_model.model."


def check_head(base: "Base", model: "PreTrainedModel", files: AdapterFiles) -> Check:
    """Check that every weight of a classifier's head comes from the adapter's file, or from the base's.

    Args:
        base: The base.
        model: The base loaded with the adapter's head, without the adapter.
        files: The adapter.
    """
    from haori.bases import fresh_modules

    head = files.head
    assert head is not None
    needed = [
        f"{_PREFIX}{name}.{key}"
        for name in fresh_modules(base, head, model)
        for key, _ in model.get_submodule(name).named_parameters(recurse=False)
    ]
    lost = [key for key in needed if key not in files.tensors]
    if lost:
        return failed(
            "head",
            f"{len(lost)} weights of the head are neither in the adapter's file nor in the base's, first {lost[0]!r}: "
            "they would begin at random at every load; name their modules in modules_to_save",
        )
    labels = ", ".join(map(repr, head.labels[:6])) + (", ..." if len(head.labels) > 6 else "")
    return passed("head", f"all weights of the head are kept; {len(head.labels)} labels: {labels}")


@contextmanager
def wearing_head(model: "PreTrainedModel", files: AdapterFiles) -> Iterator[None]:
    """Run a block with the head of an adapter on the bare base; its own where the adapter is nothing but a head."""
    from haori.bases import head_modules

    parts = tuple(f"{name}." for name in head_modules(model))
    own = {f"{_PREFIX}{name}": p for name, p in model.named_parameters() if name.startswith(parts or ("?",))}
    worn = {key: own[key] for key in files.tensors if key in own}
    if len(worn) == len(files.tensors):
        yield
        return
    before = {key: parameter.data for key, parameter in worn.items()}
    try:
        with safe_open(files.weights, framework="pt") as file:
            for key, parameter in worn.items():
                parameter.data = file.get_tensor(key).to(parameter.device, parameter.dtype)
        yield
    finally:
        for key, parameter in worn.items():
            parameter.data = before[key]
