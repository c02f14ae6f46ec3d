"""Before anything is timed: each row of a mixed batch says what it says alone, and its adapter changes what it says."""

from setting import Setting, batch
from workload import requests

_ADAPTERS = [None, 0, 1, 0, None, 2, 1, 3]
_CHECKED = 4
_NEW_TOKENS = 24


def check(setting: Setting) -> None:
    """Compare greedy tokens in fp32, where batches of different size round alike often enough to be equal.

    Raises:
        RuntimeError: A row differs, or an adapter changes nothing.
    """
    setting.need_adapters(4)
    with setting.contenders({"haori": ("haori", setting.spec(weights="fp32"))}) as race:

        def answers(wanted: list[tuple[list[int], int | None]]) -> list[list[int]]:
            order = {**batch(wanted, _NEW_TOKENS), "answers": True}
            done = race.turn("haori", order)
            assert done is not None
            found: list[list[int]] = done["answers"]
            return found

        mixed = requests(setting.pool, 0, _ADAPTERS)
        together = answers(mixed)
        alone = [answers([request])[0] for request in mixed[:_CHECKED]]
        if together[:_CHECKED] != alone:
            rows = [row for row in range(_CHECKED) if together[row] != alone[row]]
            raise RuntimeError(f"rows {rows} of a mixed batch differ from the same requests alone")
        same = answers([(mixed[0][0], adapter) for adapter in (None, 0, 1, 2, 3)])
        if any(same[0] == other for other in same[1:]):
            raise RuntimeError("an adapter does not change the answer")
    print(
        f"{_CHECKED} rows of a mixed batch equal the same requests alone; every adapter changes the answer", flush=True
    )
