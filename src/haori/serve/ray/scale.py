"""How many replicas there are, and how many processors each is given. Never imports Ray."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from haori.core.errors import InputError

__all__ = ["Scale", "cpus_per_replica", "parse_scale"]

_SCALE = re.compile(r"([1-9][0-9]{0,3})(?::([1-9][0-9]{0,3}))?")


class Scale(NamedTuple):
    """Fewest and most replicas; where they differ, Ray Serve chooses by the load."""

    fewest: int
    most: int


def parse_scale(text: str) -> Scale:
    """Read `2`, or `1:4` for one to four.

    Raises:
        InputError: It is neither.
    """
    found = _SCALE.fullmatch(text.strip())
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise InputError(f"{text!r} is no number of replicas; give one such as 2, or the fewest and the most as 1:4.")
    return Scale(int(found[1]), int(found[2] or found[1]))


def cpus_per_replica(nodes: Sequence[int], scale: Scale) -> int:
    """Return the most processors that each replica can have when as many run as may.

    Args:
        nodes: Processors of each machine of the cluster.
        scale: How many replicas there may be.

    Raises:
        InputError: There are not enough for one each.
    """
    fitting = [
        cpus for cpus in range(1, max(nodes, default=0) + 1) if sum(node // cpus for node in nodes) >= scale.most
    ]
    if not fitting:
        raise InputError(
            f"The cluster has {sum(nodes)} processors, too few for {scale.most} replicas; ask for fewer (--replicas)."
        )
    return fitting[-1]
