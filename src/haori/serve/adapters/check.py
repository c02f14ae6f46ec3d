"""Reads an adapter as a request would and lets it go again, so that it is refused before it has a name, not after."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from haori.core.errors import FileFormatError, HaoriError, InputError
from haori.serve.engine.unforeseen import unforeseen
from haori.serve.kernels.openmp import compute_alone

if TYPE_CHECKING:
    from haori.library import AdapterFiles
    from haori.serve.adapters.weights import AdapterWeights
    from haori.serve.engine.runner import AdapterBank

__all__ = ["CheckAdapter", "adapter_check"]

CheckAdapter = Callable[["AdapterFiles", str], None]
"""Refuses an adapter, given its files and its content id, that no request could be answered with."""


def adapter_check(
    read: "Callable[[AdapterFiles, str], AdapterWeights]", bank: "AdapterBank", budget_bytes: int
) -> CheckAdapter:
    """Return the check of one engine.

    Args:
        read: Reads an adapter, given its files and its content id, as the engine does.
        bank: The engine's adapters; nothing is put into it.
        budget_bytes: Memory that all adapters may take.
    """

    def make_ready(files: "AdapterFiles", adapter: str) -> None:
        ready = bank.prepare(read(files, adapter))
        if ready.size_bytes > budget_bytes:
            raise InputError(
                f"The adapter takes {ready.size_bytes / 1e6:,.0f} MB; all adapters in memory may take "
                f"{budget_bytes / 1e6:,.0f} MB (--adapter-memory)."
            )

    def check(files: "AdapterFiles", adapter: str) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="haori-adapter-check", initializer=compute_alone) as alone:
            try:
                alone.submit(make_ready, files, adapter).result()
            except HaoriError:
                raise
            except Exception as error:  # a stranger's file may raise anything
                raise FileFormatError(unforeseen(error)) from error

    return check
