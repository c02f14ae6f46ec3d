"""Which components of a base an adapter changes, which it takes to run it, and running it on one of them alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from haori.core.records import MODEL_COMPONENT

if TYPE_CHECKING:
    from peft import PeftModel

    from haori.bases import Base
    from haori.library.adapter_files import AdapterFiles

__all__ = ["changed_components", "needed_components", "only_component", "only_modules"]


def changed_components(components: Iterable[str], files: "AdapterFiles") -> tuple[str, ...]:
    """Return the components that an adapter in a PEFT folder changes.

    Args:
        components: Those of its base.
        files: The adapter; over a base of several its modules are named by their component first.
    """
    held = set(components)
    if held == {MODEL_COMPONENT}:
        return (MODEL_COMPONENT,)
    return tuple(sorted(held & {name.partition(".")[0] for name in files.modules}))


def needed_components(base: "Base", changed: Iterable[str]) -> tuple[str, ...] | None:
    """Return what must be loaded of a base to run an adapter on it; None for all there is of a base of one model.

    Of a pipeline that is what predicts, and the text encoders, if one of them is changed.
    """
    if base.pipeline is None:
        return None
    from haori.bases.diffusion import family_of

    family = family_of(base)
    encoders = family.text_encoders if set(family.text_encoders) & set(changed) else ()
    return (family.denoiser, *encoders)


def only_component(adapted: "PeftModel", component: str | None) -> AbstractContextManager[None]:
    """Run a block with the adapter on one component of a pipeline, or on none, and the bare base elsewhere."""
    return only_modules(adapted, lambda name: name.partition(".")[0] == component)


@contextmanager
def only_modules(adapted: "PeftModel", stays: Callable[[str], bool]) -> Iterator[None]:
    """Run a block with the adapter on some modules, by their full names in the base, and the bare base elsewhere."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    bare = [
        module
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not stays(name)
    ]
    before = [module._disable_adapters for module in bare]
    try:
        for module in bare:
            module._disable_adapters = True
        yield
    finally:
        for module, disabled in zip(bare, before, strict=True):
            module._disable_adapters = disabled
