"""How much of a queue the requests of one API key may fill.

A key may have three times as many requests in a queue as there are free places (dynamic thresholds, Choudhury and
Hahne, 1998): alone, three quarters of them; beside another that also takes all it can, three sevenths. So there is
always a place for a newcomer. Where there are no keys, requests may fill the whole queue.
"""

from haori.core.errors import OverloadedError

__all__ = ["check_share"]

_SHARE = 3


def check_share(owner: str, own: int, waiting: int, capacity: int, *, retry_after_s: float, why: str) -> None:
    """Refuse a request for which a queue has no free place.

    Args:
        owner: Whose it is.
        own: How many of its owner's wait.
        waiting: How many wait.
        capacity: Most that may.
        retry_after_s: When to come again.
        why: What the error says of the limit.

    Raises:
        OverloadedError: The queue is full, or the owner has its share.
    """
    if waiting >= capacity:
        raise OverloadedError(
            f"{waiting} requests are waiting, which is as many as may ({why}); try again later.",
            retry_after_s=retry_after_s,
        )
    if owner and own >= _SHARE * (capacity - waiting):
        raise OverloadedError(
            f"{own} requests of this API key are waiting, which is as many as one key's may while the others leave so "
            f"little room ({why}); try again later.",
            retry_after_s=retry_after_s,
        )
