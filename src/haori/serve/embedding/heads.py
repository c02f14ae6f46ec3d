"""Which adapters of an encoder classify, into which labels, and why others are not asked to."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from haori.core.errors import InputError
from haori.core.hashing import short
from haori.core.records import Head
from haori.serve.request import AdapterMix

if TYPE_CHECKING:
    from haori.library import AdapterFiles

__all__ = ["AdapterHeads"]

_MOST_KEPT = 10_000


class AdapterHeads:
    """The heads of one base's adapters, and the base's own; may be asked from any thread.

    Args:
        files_of: Finds an adapter's files by its content id, of which the labels are a part.
        own: The base's own head.
        name: What errors call the base.
        unserved: Why no classifier of this base is served; None where they are.

    Attributes:
        own: The base's own head; None where it has none.
    """

    def __init__(
        self,
        files_of: "Callable[[str], AdapterFiles]",
        own: Head | None,
        *,
        name: str,
        unserved: str | None = None,
    ) -> None:
        self._files_of = files_of
        self.own = own
        self._name = name
        self._unserved = unserved
        self._known: dict[str, Head | None] = {}

    def of_mix(self, mix: AdapterMix) -> Head:
        """Return the head that classifies under a mix.

        Raises:
            InputError: There is none, or not one alone.
        """
        if self._unserved is not None:
            raise InputError(self._unserved)
        if not mix:
            return self._of_base()
        heads = [(adapter, self.of_adapter(adapter)) for adapter, _ in mix]
        without = next((adapter for adapter, head in heads if head is None), None)
        if without is not None:
            raise InputError(
                f"The adapter {short(without)!r} has no head, so it does not classify; ask for one that was trained "
                "to, or send texts to /v1/embeddings."
            )
        if len(mix) > 1:
            raise InputError(
                "Heads of classifiers cannot be mixed, so a blend of them classifies nothing; ask each by itself."
            )
        if mix[0][1] != 1.0:
            raise InputError(
                f"The head of a classifier has no strength, so it cannot be asked at {mix[0][1]:g}; ask for its name "
                "alone."
            )
        head = heads[0][1]
        assert head is not None
        return self.check_served(mix[0][0], head)

    def check_embeds(self, mix: AdapterMix) -> None:
        """Refuse adapters that classify, where vectors are wanted.

        Raises:
            InputError: There is one.
        """
        for adapter, _ in mix:
            if self.of_adapter(adapter) is not None:
                raise InputError(
                    f"The adapter {short(adapter)!r} is a classifier, whose hidden states were trained for its labels "
                    "and not to be compared; send its texts to /classify, or embed with the base."
                )

    def of_adapter(self, adapter: str) -> Head | None:
        """Return the head of an adapter; None where it has none.

        Raises:
            HaoriError: It is not here, or its files are unusable.
        """
        try:
            return self._known[adapter]
        except KeyError:
            head = self._files_of(adapter).head
        while len(self._known) >= _MOST_KEPT:
            self._known.pop(next(iter(self._known)), None)
        self._known[adapter] = head
        return head

    def check_served(self, adapter: str, head: Head) -> Head:
        """Return a head, if rows of a batch can have it.

        Raises:
            InputError: It labels tokens, or no classifier of this base is served.
        """
        if self._unserved is not None:
            raise InputError(self._unserved)
        if head.kind == "token_classification":
            raise InputError(
                f"The adapter {short(adapter)!r} labels every token, which is not served; `haori classify` does it."
            )
        return head

    def _of_base(self) -> Head:
        if self.own is None:
            raise InputError(
                f"The base {self._name!r} has no head of its own that gives probabilities of labels; ask for an "
                "adapter that classifies, by its name in 'model'."
            )
        return self.own
