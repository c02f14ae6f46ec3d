"""Writes an adapter in another format, and proves the file: read again, each module must change its weight alike.

What is compared is dW in float64, or, where a magnitude belongs to it, the factors and the magnitude: the direction of
W + dW is the base's, which need not be at hand.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import HaoriError, InputError, VerificationError
from haori.core.storage import explain_os_errors
from haori.library.contents import is_single_file
from haori.library.families import FAMILY_TITLES, is_runnable
from haori.library.formats.format import SINGLE_FILE, open_source
from haori.library.formats.peft import check_new_folder
from haori.library.formats.registry import format_named, format_of
from haori.library.opened import base_of
from haori.library.proof.stock_pipelines import prove_in_pipeline
from haori.library.store import Library

if TYPE_CHECKING:
    from torch import Tensor

    from haori.bases import Base
    from haori.core.records import AdapterCard
    from haori.library.updates import AdapterUpdates, ModuleUpdate

__all__ = ["convert_adapter", "convert_stored", "require_alike"]

_STOCK = "diffusers"  # the format that stock pipelines load
_LIMIT = 1e-6
"""Largest difference of a module's dW as a share of its norm: factors are rewritten in the dtype they had."""
_SIXTEEN_BIT_LIMIT = 2e-3
"""The same where factors in 16 bits are scaled anew, which rounds each of them once."""


def convert_stored(
    name: str, out: Path, wanted: str, *, base_spec: str | None = None, library: Library | None = None
) -> Path:
    """Write an adapter of the library to the new file or folder `out` in the format `wanted`.

    In the format that it came in, one file is written as it came, to the byte; one that was combined here came from
    nowhere, and its header says what its card does. What is written for diffusers is loaded
    by the stock pipeline of its base, where that is on this machine, and must do there what the adapter does.

    Raises:
        LibraryError: There is no such adapter.
        InputError: `out` exists, there is no such format, or it cannot represent the adapter.
        VerificationError: Read again, the file says something else; nothing is left behind.
    """
    stored = (library or Library()).get(name)
    if wanted == stored.card.format and stored.card.origin != "combined" and is_single_file(stored.path):
        with _staged(out) as stage:
            shutil.copyfile(stored.path / SINGLE_FILE, stage)
        return out
    base = base_of(stored.card, base_spec) if base_spec is not None or wanted == "gguf" else None
    if base is None and wanted == _STOCK and stored.card.base.components:
        with suppress(HaoriError):  # it is proved in a stock pipeline where its base is on this machine
            base = base_of(stored.card)
    return convert_adapter(stored.path, out, wanted, card=stored.card, base=base)


def convert_adapter(
    path: Path, out: Path, wanted: str, *, card: "AdapterCard | None" = None, base: "Base | None" = None
) -> Path:
    """Write the adapter at `path`, a file or folder of any known format, to `out` in the format `wanted`.

    Raises:
        FileFormatError: The adapter cannot be read.
        InputError: `out` exists, there is no such format, or it cannot represent the adapter.
        VerificationError: Read again, what was written says something else; nothing is left behind.
    """
    target = format_named(wanted)
    config = _configuration(base)
    source = open_source(path, config)
    updates = _of_family(format_of(source).read(source), card)
    with _staged(out) as stage:
        target.write(updates, stage, card, base_config=config)
        written = open_source(stage, config)  # of a format's own variant for a family, such as kohya's for Flux
        require_alike(updates, format_of(written).read(written), str(out))
        if wanted == _STOCK and base is not None and is_runnable(base):
            prove_in_pipeline(base, updates, stage)
    return out


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a path of the same name beside `out`; what was written there takes the place of `out` on success.

    Files that were written beside it, of new words, come to lie beside `out`.
    """
    check_new_folder(out)
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            stage = Path(folder) / out.name
            yield stage
            beside = {path: out.with_name(path.name) for path in Path(folder).iterdir() if path != stage}
            if taken := [place for place in beside.values() if place.exists()]:
                raise InputError(
                    f"{str(taken[0])!r}, which goes with {out.name!r}, already exists; choose another name."
                )
            for path, place in beside.items():
                path.replace(place)
            stage.replace(out)  # an empty folder gives way


def require_alike(before: "AdapterUpdates", after: "AdapterUpdates", out: str) -> None:
    """Refuse an adapter that, written to `out` and read again, changes some weight otherwise than it did.

    Raises:
        VerificationError: It does.
    """
    missing = sorted(before.modules.keys() ^ after.modules.keys())
    if missing:
        raise VerificationError(
            f"{out!r} was not kept: it holds {len(after.modules)} modules and the adapter {len(before.modules)}; "
            f"{missing[0]!r} is in one of them only."
        )
    if lost := sorted(before.extra.keys() - after.extra.keys()):
        raise VerificationError(
            f"{out!r} was not kept: it lacks {lost[0]!r}, which the adapter holds beside its modules."
        )
    for key, tensor in before.extra.items():
        other = after.extra[key]
        if tensor.numel() != other.numel() or not bool((tensor.flatten() == other.flatten()).all()):
            raise VerificationError(f"{out!r} was not kept: it holds {key!r} otherwise than the adapter does.")
    for name, update in before.modules.items():
        error = _difference(update, after.modules[name])
        if not error <= _limit(update):
            raise VerificationError(
                f"{out!r} was not kept: read again, the module {name!r} changes its weight otherwise, by "
                f"{error:.2g} of the norm of what it should (limit {_limit(update):.0e})."
            )


def _difference(update: "ModuleUpdate", other: "ModuleUpdate") -> float:
    """Return the largest difference of dW, magnitude and bias, each as a share of its norm."""
    pairs: list[tuple[Tensor | None, Tensor | None]] = [(update.magnitude, other.magnitude), (update.bias, other.bias)]
    if update.factors or other.factors:
        pairs.append((update.delta(), other.delta()))
    worst = 0.0
    for one, two in pairs:
        if one is None and two is None:
            continue
        if one is None or two is None or one.numel() != two.numel():
            return float("inf")
        difference = (one.double().flatten() - two.double().flatten()).norm()
        worst = max(worst, float(difference / one.double().norm().clamp_min(1e-30)))
    return worst


def _limit(update: "ModuleUpdate") -> float:
    narrow = any(factor.element_size() < 4 for factor in update.factors.values())
    return _SIXTEEN_BIT_LIMIT if narrow else _LIMIT


def _of_family(updates: "AdapterUpdates", card: "AdapterCard | None") -> "AdapterUpdates":
    """Return an adapter with the family of its base where that is on record: few blocks may look like another's."""
    family = None if card is None else card.base.family
    return updates if family not in FAMILY_TITLES else replace(updates, family=family)


def _configuration(base: "Base | None") -> Mapping[str, Any] | None:
    if base is None or base.pipeline is not None:
        return None
    path = base.path / "config.json"
    if not path.is_file():
        raise InputError(f"The base {base.name!r} is not one model with a config.json.")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found
