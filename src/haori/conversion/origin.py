"""The adapter that a run goes on from, which other tools name by its folder.

Each of them takes rank, targets and the rest of the shape from that adapter, whatever else its file says of them; so
does a recipe with `from`, and says nothing of them.
"""

from haori.conversion.draft import Draft
from haori.conversion.rules import fact
from haori.conversion.values import text, words

__all__ = ["ONE_ADAPTER", "SEVERAL_ADAPTERS", "combine_origin"]

ONE_ADAPTER = fact("from", "from", read=text)
SEVERAL_ADAPTERS = fact("from", "from", read=words)

_STAYS = frozenset({"kind", "bits", "double_quantization", "lr_ratio"})
"""Keys of a method that say how it is trained, not what shape the adapter has."""


def combine_origin(draft: Draft) -> None:
    """Settle the facts `from` (a folder, or several) and `new_adapter`, and take back the shape of a fresh adapter.

    Assumes that the method is settled.
    """
    if not draft.has("from"):
        draft.unneeded("new_adapter", "every run makes a new adapter")
        return
    said = draft.value("from")
    folders = [said] if isinstance(said, str) else said
    kind = draft.ours["method.kind"]
    if len(folders) > 1:
        draft.leave("from", f"a run goes on from one adapter, not {', '.join(folders)}", "from, with one of them")
    elif draft.value("new_adapter"):
        draft.leave("from", "it is merged there, and a new adapter is trained", "haori merge makes a base of it")
    elif kind not in ("lora", "dora", "qlora"):
        draft.leave("from", f"the method {kind!r} goes on from no adapter", "method.kind is lora, dora or qlora")
    else:
        draft.carry("from", {"from": folders[0]})
        draft.take_back(_is_shape, lambda key: f"the adapter that the run goes on from has its own {key}")
    if draft.value("new_adapter"):
        draft.leave("new_adapter", "a new adapter is one over the base", "haori merge makes a base of the old one")
    draft.unneeded("new_adapter", "off, and off here")


def _is_shape(key: str) -> bool:
    section, _, name = key.partition(".")
    return section == "method" and name not in _STAYS
