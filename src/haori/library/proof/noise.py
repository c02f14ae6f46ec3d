"""The probes of a base of pictures: noisy latents at fixed timesteps with a few captions.

Where text encoders are adapted they run with the rest, from the captions' tokens; where none is, the captions are
embedded beforehand, so that encoders and denoiser never share the memory.
"""

import gc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from haori.core.records import Check
from haori.library.adapter_components import changed_components, needed_components
from haori.library.formats.peft_components import installed_name
from haori.library.proof.checks import check_effect
from haori.library.proof.exact import exact_logits
from haori.library.proof.logits import Probe, default_probes

if TYPE_CHECKING:
    from torch import Tensor

    from haori.bases import Base
    from haori.bases.diffusion import PipelineProcessor
    from haori.core.new_words import NewWords
    from haori.library.adapter_files import AdapterFiles
    from haori.library.updates import AdapterUpdates, ModuleUpdate

__all__ = ["NOISE", "check_noise", "components_run", "live_changes", "noise_probes", "probes_of"]

NOISE = "noise predictions"
"""What is measured of a base of pictures, in words."""

_CAPTIONS = ("a photo of a cat", "a red house by the sea, watercolour", "")
_TIMESTEPS = (900.0, 500.0, 100.0)
_TRAINED_TOKENS = 32  # of those that are put into a caption, at most
_TRAINED_ROWS = ".token_adapter"  # end of the module that holds them
_TOKENS = "tokens_"  # before the names of a forward's arguments that are tokens
_SEED = 20240817
_SIDE = 256  # pixels: enough for every layer to act, on a base of any size


def probes_of(base: "Base", files: "AdapterFiles") -> list[Probe]:
    """Return the probes of an adapter in a PEFT folder where none are given: prompts, or noisy latents."""
    if base.pipeline is not None:
        probes = noise_probes(base, changed_components(base.components, files), files.words)
        return [_with_tokens(probe, files) for probe in probes]
    from haori.bases import load_tokenizer

    return list(default_probes(load_tokenizer(base)))


def noise_probes(base: "Base", changed: Sequence[str], words: "NewWords | None" = None) -> list[Probe]:
    """Return arguments of `DiffusionModel.forward`, one row each, all of the same sizes.

    Args:
        base: A pipeline.
        changed: The components that are adapted.
        words: New words, which then stand in front of the captions; text encoders run with the rest.

    Raises:
        BaseError: It belongs to no known family, or cannot be loaded.
    """
    import torch

    from haori.bases.diffusion import PictureSize, PipelineProcessor

    processor = PipelineProcessor(base)
    family = processor.family
    multiple = family.size_multiple
    side = -(-min(family.native_size, _SIDE) // multiple) * multiple
    latent = side // family.latent_factor
    numbers = torch.Generator().manual_seed(_SEED)
    noisy = torch.randn(len(_CAPTIONS), family.latent_channels, latent, latent, generator=numbers)
    tokens = family.tokens(processor.tokenizers, _CAPTIONS)
    if words is not None:
        tokens = {name: _begun_with(words, name, given) for name, given in tokens.items()}
    is_live = words is not None or bool(set(family.text_encoders) & set(changed))
    text = {f"{_TOKENS}{name}": ids for name, ids in tokens.items()} if is_live else _embedded(processor, tokens)
    conditions = text | family.sizes([PictureSize((side, side), (0, 0), (side, side))] * len(_CAPTIONS))
    batch = {"noisy": noisy, "timesteps": torch.tensor(_TIMESTEPS), **conditions}
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(len(_CAPTIONS))]


def components_run(probes: Sequence[Probe]) -> tuple[str, ...]:
    """Return the text encoders that probes run, since they hold tokens of captions for them."""
    names = {name for probe in probes if isinstance(probe, Mapping) for name in probe if name.startswith(_TOKENS)}
    return tuple(sorted({name.removeprefix(_TOKENS).removesuffix("_mask") for name in names}))


def check_noise(base: "Base", updates: "AdapterUpdates") -> list[Check]:
    """Check that an adapter in the neutral form moves the base's predictions, and each component's part of it alone.

    Args:
        base: A pipeline in which every module of the adapter has its place.
        updates: The adapter.

    Raises:
        BaseError: The base belongs to no known family, or cannot be loaded.
    """
    from haori.bases import load_model

    changed = updates.components
    probes = noise_probes(base, changed)
    model = load_model(base, components=needed_components(base, changed))
    live = live_changes(base, updates)
    of_base = exact_logits(model, probes)
    checks = [check_effect(exact_logits(model, probes, live), of_base, measured=NOISE)]
    if len(changed) < 2:
        return checks
    bare = exact_logits(model, probes[:1])  # on its own: other batches are added in another order
    for component in changed:
        part = {name: update for name, update in live.items() if name.partition(".")[0] == component}
        subject = f"adapter on {component!r} alone"
        found = check_effect(exact_logits(model, probes[:1], part), bare, subject=subject, measured=NOISE)
        checks.append(found.with_fields(name=f"effect of {component}"))
    return checks


def live_changes(base: "Base", updates: "AdapterUpdates") -> "dict[str, ModuleUpdate]":
    """Return the updates by what a loaded base calls its modules."""
    found = {}
    for name, update in updates.modules.items():
        component, _, path = name.partition(".")
        found[f"{component}.{installed_name(base.components[component].architecture, path)}"] = update
    return found


def _begun_with(words: "NewWords", name: str, given: "Tensor") -> "Tensor":
    """Return ids, or a mask, [B, T] with new words behind the first token: as many in each row as half of it holds."""
    import torch

    encoder, length = name.removesuffix("_mask"), given.shape[1]
    ids, most = words.ids(encoder), length // 2
    parts = [ids[start : start + most] for start in range(0, len(ids), most)]
    rows = []
    for row, own in enumerate(given):
        put = torch.tensor(parts[row % len(parts)])
        put = put if name == encoder else torch.ones_like(put)
        rows.append(torch.cat([own[:1], put, own[1:]])[:length])
    return torch.stack(rows)


def _with_tokens(probe: Probe, files: "AdapterFiles") -> Probe:
    """Return a probe whose captions begin with the tokens that the adapter trained, for the encoders that have them."""
    import torch

    tokens = torch.tensor([files.trainable_tokens[:_TRAINED_TOKENS]])
    if not tokens.numel() or not isinstance(probe, Mapping):
        return probe
    found = dict(probe)
    for encoder in {name.partition(".")[0] for name in files.modules if name.endswith(_TRAINED_ROWS)}:
        for name in (f"{_TOKENS}{encoder}", f"{_TOKENS}{encoder}_mask"):
            if name in found:
                given = found[name]
                put = tokens if name.endswith(encoder) else torch.ones_like(tokens)
                found[name] = torch.cat([given[:, :1], put, given[:, 1:]], dim=1)[:, : given.shape[1]]
    return found


def _embedded(processor: "PipelineProcessor", tokens: "dict[str, Tensor]") -> "dict[str, Tensor]":
    import torch

    encoders = processor.load_text_encoders()
    with torch.no_grad():
        device = next(next(iter(encoders.values())).parameters()).device
        found = processor.family.embed(encoders, {name: ids.to(device) for name, ids in tokens.items()})
    del encoders
    gc.collect()
    return {name: value.cpu() for name, value in found.items()}
