"""Is a generated picture new, or one of those that were trained on?

The distance of each generated picture to the nearest training picture is held against those of training pictures to
their own nearest other one: one in twenty of these is below the limit, and so would be about one in twenty of new
pictures of the same kind. Pictures below it are shown, since a network's features can be wrong about them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from haori.metrics.pictures import centred_cosines
from haori.metrics.statistics import Array

__all__ = ["EXPECTED_SHARE", "Closeness", "closeness"]

EXPECTED_SHARE = 0.05
"""Share of training pictures whose nearest other one is within the limit."""

_SAME = 1e-6  # distance of two copies of one picture
_FEWEST = 3


@dataclass(frozen=True)
class Closeness:
    """How near generated pictures are to those that were trained on.

    Attributes:
        distances: [n] of each generated picture to the nearest training picture: 1 - cosine of features, from which
            the mean of the training pictures was taken.
        nearest: [n] place of that training picture.
        limit: Distance up to which a picture is taken for a copy.
    """

    distances: Array
    nearest: npt.NDArray[np.int64]
    limit: float

    @property
    def flagged(self) -> npt.NDArray[np.bool_]:
        """Return [n], whether each is taken for a copy."""
        return np.asarray(self.distances <= self.limit)


def closeness(generated: npt.ArrayLike, training: npt.ArrayLike) -> Closeness | None:
    """Find the nearest training picture of each generated one, and the limit from the training pictures themselves.

    Args:
        generated: [n, d] features.
        training: [m, d] features.

    Returns:
        None where fewer than three training pictures are different: there is no limit then.
    """
    own = 1 - centred_cosines(training, training)
    # Copies among the training pictures would make the limit 0, below which nothing is: each counts once.
    first = ~np.tril(own < _SAME, -1).any(1)
    given = np.asarray(training)
    if first.sum() < _FEWEST or np.allclose(given, given[0], rtol=1e-4):
        return None
    among = own[np.ix_(first, first)]
    np.fill_diagonal(among, np.inf)
    limit = float(np.quantile(among.min(1), EXPECTED_SHARE, method="lower"))
    apart = 1 - centred_cosines(generated, training)
    return Closeness(apart.min(1), apart.argmin(1), limit)
