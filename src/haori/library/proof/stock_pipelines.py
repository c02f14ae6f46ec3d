"""What a stock pipeline of diffusers makes of an adapter's file, compared with what the adapter does.

Both run on the same copy of the base, in float64: first with the adapter's changes of each weight, then with the layers
that `load_lora_weights` puts in.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import VerificationError
from haori.library.adapter_components import needed_components
from haori.library.proof.exact import exact_logits
from haori.library.proof.logits import compare_logits, model_dtype
from haori.library.proof.noise import NOISE, live_changes, noise_probes

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.library.updates import AdapterUpdates

__all__ = ["prove_in_pipeline"]

# As a share of the adapter's effect: factors are rounded to the dtype they had when they are scaled anew, and to the
# base's by the pipeline that loads them.
_SHARE, _SHARE_SIXTEEN_BIT = 1e-4, 2e-2
_FLOOR = 1e-12
_LARGE = 4e9  # weights that are loaded in 16 bits


def prove_in_pipeline(base: "Base", updates: "AdapterUpdates", file: Path) -> None:
    """Refuse a file of which the base's stock pipeline makes something else than the adapter.

    Args:
        base: A pipeline of a family that can be run here.
        updates: The adapter.
        file: What was written of it for diffusers.

    Raises:
        VerificationError: The pipeline cannot load the file, or predicts otherwise with it.
    """
    from haori.bases import load_model
    from haori.bases.diffusion import pipeline_of
    from haori.bases.quiet import quiet_diffusers

    changed = updates.components
    probes = noise_probes(base, changed)
    needed = needed_components(base, changed) or ()
    is_small = sum(base.components[name].parameters for name in needed) < _LARGE
    model = load_model(base, components=needed, dtype="fp32" if is_small else "auto")
    of_base = exact_logits(model, probes)
    of_adapter = exact_logits(model, probes, live_changes(base, updates))
    live: dict[str, Any] = {**dict.fromkeys(base.components), **dict(model.named_children())}
    pipe: Any = pipeline_of(base, live)
    try:
        with warnings.catch_warnings(), quiet_diffusers():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise VerificationError(
            f"The adapter was not exported: the stock {base.pipeline} cannot load what was written: {reason}"
        ) from error
    of_file = exact_logits(model, probes)
    effect, moved = compare_logits(of_adapter, of_base).rms, compare_logits(of_adapter, of_file).rms
    is_exact = model_dtype(model) == "fp32" and not _is_narrow(updates)
    limit = (_SHARE if is_exact else _SHARE_SIXTEEN_BIT) * effect + _FLOOR
    if not moved <= limit:
        raise VerificationError(
            f"The adapter was not exported: with what was written the {NOISE} of the stock {base.pipeline} differ by "
            f"{moved:.2g} of their spread from those of the adapter (limit {limit:.2g}), which moves them by "
            f"{effect:.2g}."
        )


def _is_narrow(updates: "AdapterUpdates") -> bool:
    factors = [factor for update in updates.modules.values() for factor in update.factors.values()]
    return any(factor.element_size() < 4 for factor in factors)
