"""Which pictures an epoch draws more often than others: those of rare classes, as the recipe's `image_weights` say."""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def image_odds(labels: Sequence[np.ndarray], power: float) -> np.ndarray | None:
    """Give the cumulated probabilities [N] that `draw` takes, None where `power` is 0: every picture is as likely.

    A class weighs (1 / pictures that hold it)^power, a picture as much as its heaviest class; one without a box weighs
    as much as one of the commonest class. `labels` are a picture's each: [n, 5] (class, xywh_n).
    """
    if not power:
        return None
    held = [np.unique(rows[:, 0].astype(int)) for rows in labels]
    pictures = np.bincount(np.concatenate(held))  # of each class
    rarest = np.array([pictures[classes].min() if len(classes) else pictures.max(initial=1) for classes in held])
    cumulated = np.cumsum((rarest.min() / rarest) ** power)
    return cumulated / cumulated[-1]


def draw(odds: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw `count` places by their cumulated probabilities, with replacement."""
    return np.searchsorted(odds, generator.random(count), side="right")


def occurrences(order: np.ndarray) -> list[int]:
    """Tell of every place how often its index came before."""
    seen: Counter[int] = Counter()
    found = []
    for index in order.tolist():
        found.append(seen[index])
        seen[index] += 1
    return found
