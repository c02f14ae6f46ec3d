"""Writes a stored adapter as a stock PEFT folder, and proves it: stock PEFT alone must make of it what is stored.

Its model card and the text of credit are written beside it. An adapter of a pipeline becomes a PEFT folder of its
component, or a folder with one for each.

The two are loaded one after the other, each on a fresh copy of the base, and compared by their logits.
"""

import gc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import VerificationError
from haori.core.storage import staged_folder
from haori.library.adapter_components import needed_components
from haori.library.attaching import attach_files, check_base
from haori.library.classifiers import wearing_head
from haori.library.format_export import convert_adapter
from haori.library.formats.peft import check_new_folder, export_peft
from haori.library.model_cards.text import write_model_card
from haori.library.opened import base_of
from haori.library.signing import carry_signature
from haori.library.store import Library, StoredAdapter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haori.bases import Base
    from haori.library.proof.logits import Probe

__all__ = ["export_stored"]

# As a share of what the adapter does to the logits. In float64 only the rounding of factors that were written anew is
# left, 1e-6; a quantised base computes in formats of its own, the same way both times.
_SHARE, _SHARE_QUANTISED = 1e-4, 1e-2
_NOISE = 1e-12


def export_stored(
    name: str, out: Path, *, base: "Base | None" = None, base_spec: str | None = None, library: Library | None = None
) -> Path:
    """Write an adapter of the library to the new folder `out`, as stock PEFT loads it, with its model card.

    Args:
        name: `support`, `support@2` or the first digits of an id.
        out: The new folder.
        base: The base to prove it on; by default the one on the card.
        base_spec: That base by name or path.
        library: The library; by default the one of this machine.

    Raises:
        LibraryError: There is no such adapter.
        InputError: `out` exists and is not empty.
        BaseError: Its base is not on this machine and cannot be fetched.
        MismatchError: The base is another one.
        VerificationError: What was written does not compute what is stored; nothing is left behind.
    """
    stored = (library or Library()).get(name)
    check_new_folder(out)
    base = base or base_of(stored.card, base_spec)
    check_base(stored.card, base.reference())
    on = base
    if base.pipeline is not None:
        return _export_components(base, stored, out)

    def finish(written: Path) -> None:
        _prove(on, stored, written)
        write_model_card(stored, written)
        carry_signature(stored, written)

    return export_peft(stored.path, stored.card, out, prove=finish)


def _export_components(base: "Base", stored: StoredAdapter, out: Path) -> Path:
    with staged_folder(out) as stage:
        convert_adapter(stored.path, stage, "peft", card=stored.card)
        _prove_components(base, stored, stage)
        write_model_card(stored, stage)
    return out


def _prove_components(base: "Base", stored: StoredAdapter, written: Path) -> None:
    from haori.bases import load_model
    from haori.library.formats.peft_components import component_folders
    from haori.library.formats.registry import read_updates
    from haori.library.proof.exact import exact_logits
    from haori.library.proof.noise import NOISE, live_changes, noise_probes

    updates = read_updates(stored.path)
    changed = updates.components
    probes = noise_probes(base, changed)
    model = load_model(base, components=needed_components(base, changed))
    of_base = exact_logits(model, probes)
    of_stored = exact_logits(model, probes, live_changes(base, updates))
    for component, folder in (component_folders(written) or {changed[0]: written}).items():
        _in_stock_peft(model.get_submodule(component), folder)  # which changes the component in place
    _compare(stored, of_base, of_stored, exact_logits(model, probes), _SHARE, NOISE)


def _prove(base: "Base", stored: StoredAdapter, written: Path) -> None:
    from haori.bases import load_model, load_tokenizer
    from haori.library.adapter_files import inspect_adapter
    from haori.library.proof.logits import adapter_probes, default_probes

    files = inspect_adapter(stored.path)
    probes = adapter_probes(files, default_probes(load_tokenizer(base)))
    model = load_model(base, head=files.head)
    with wearing_head(model, files):
        of_base = _logits(base, model, probes)
    adapted = attach_files(model, files, base_name=base.name)
    of_stored = _logits(base, adapted, probes)
    del model, adapted
    gc.collect()  # before the base is loaded once more
    of_written = _logits(base, _in_stock_peft(load_model(base, head=files.head), written), probes)
    _compare(stored, of_base, of_stored, of_written, _SHARE if base.quantization is None else _SHARE_QUANTISED)


def _compare(
    stored: StoredAdapter,
    of_base: "Sequence[Tensor]",
    of_stored: "Sequence[Tensor]",
    of_written: "Sequence[Tensor]",
    share: float,
    measured: str = "logits",
) -> None:
    from haori.library.proof.logits import compare_logits

    effect, error = compare_logits(of_stored, of_base).rms, compare_logits(of_stored, of_written).rms
    limit = share * effect + _NOISE
    if not error <= limit:
        raise VerificationError(
            f"The adapter {stored.name!r} was not exported: in stock PEFT what was written differs from what is stored "
            f"by {error:.2g} of the spread of the {measured} (limit {limit:.2g}; the adapter itself moves them by "
            f"{effect:.2g})."
        )


def _logits(base: "Base", model: "nn.Module", probes: "Sequence[Probe]") -> "list[Tensor]":
    from haori.library.proof.exact import exact_logits
    from haori.library.proof.logits import live_probe_logits

    return (exact_logits if base.quantization is None else live_probe_logits)(model, probes)


def _in_stock_peft(model: Any, folder: Path) -> "nn.Module":
    from peft import PeftModel

    from haori.bases.quiet import quiet_transformers

    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            adapted: nn.Module = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise VerificationError(
            f"The adapter was not exported: stock PEFT cannot load what was written: {reason}"
        ) from error
    return adapted.eval()
