"""Which adapters of an encoder classify, and what their labels are: `head.json` beside the weights says so."""

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from haori.core.errors import FileFormatError, InputError
from haori.core.hashing import short
from haori.core.records import Head
from haori.serve.request import AdapterMix

__all__ = ["HEAD_NAME", "AdapterHeads", "read_head"]

HEAD_NAME = "head.json"
_LIMIT_BYTES = 4 << 20
_MOST_KEPT = 1000


def read_head(folder: Path) -> Head | None:
    """Return what the head of the adapter in a folder is for; None where it has none.

    Raises:
        FileFormatError: The file is damaged.
    """
    path = folder / HEAD_NAME
    try:
        with path.open("rb") as file:
            return Head.model_validate_json(file.read(_LIMIT_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValidationError, OSError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise FileFormatError(
            f"{str(path)!r} cannot be read ({first}); it holds, for instance, "
            '{"kind": "sequence_classification", "labels": ["no", "yes"], "multi_label": false}.'
        ) from None


class AdapterHeads:
    """The heads of one base's adapters, and the base's own; may be asked from any thread.

    Args:
        folder_of: Finds an adapter's folder by its content id.
        own: The base's own head.
        name: What errors call the base.
        unserved: Why no classifier of this base is served; None where they are.
    """

    def __init__(
        self, folder_of: Callable[[str], Path], own: Head | None, *, name: str, unserved: str | None = None
    ) -> None:
        self._folder_of = folder_of
        self._own = own
        self._name = name
        self._unserved = unserved
        self._known: dict[Path, tuple[tuple[int, int, int], Head]] = {}

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
                f"The adapter {short(without)!r} does not classify: there is no {HEAD_NAME} with labels beside its "
                "weights. Ask for a classifier, or send texts to /v1/embeddings."
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
            FileFormatError: Its file is damaged.
        """
        folder = self._folder_of(adapter)
        try:
            stat = (folder / HEAD_NAME).stat()
        except OSError:
            return None
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._known.get(folder)
        if known is not None and known[0] == stamp:
            return known[1]
        head = read_head(folder)
        if head is not None:
            while len(self._known) >= _MOST_KEPT:
                self._known.pop(next(iter(self._known)), None)
            self._known[folder] = stamp, head
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
        if self._own is None:
            raise InputError(
                f"The base {self._name!r} has no head of its own that gives probabilities of labels; ask for an "
                "adapter that classifies, by its name in 'model'."
            )
        return self._own
