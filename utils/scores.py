"""From ranked detections to the figures of an evaluation: precision, recall, F1, their curves and the means."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

CONFIDENCES = np.linspace(0, 1, 1001)  # where precision and recall are read
RECALLS = np.linspace(0, 1, 101)  # where the precision-recall curve is read


class Ranked(NamedTuple):
    """The detections of one class: scores [N], whether each is a hit at IoU .5 [N], and the number of truths."""

    scores: np.ndarray
    is_hit: np.ndarray
    truths: int


@dataclass(frozen=True)
class Curves:
    """At IoU .5 for every class: rates over CONFIDENCES [C, 1001], interpolated precision over RECALLS [C, 101]."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    envelope: np.ndarray
    is_found: np.ndarray  # [C, 1001], whether there is any detection of that confidence
    truths: np.ndarray  # [C]


@dataclass(frozen=True)
class ClassScore:
    """One class: average precision at IoU .5 and over .5:.95, precision, recall, F1, and its number of truths."""

    ap50: float
    ap: float
    precision: float
    recall: float
    f1: float
    truths: int


@dataclass(frozen=True)
class Evaluation:
    """All fractions 0..1; precision, recall and F1 at IoU .5 and `confidence`, where their mean F1 is best."""

    map50: float
    map50_95: float
    precision: float
    recall: float
    f1: float
    confidence: float
    per_class: dict[str, ClassScore]
    images: int
    ms_per_image: dict[str, float]
    curves: Curves = field(repr=False, compare=False)

    def means(self) -> dict[str, float]:
        """Give the means over the classes."""
        return {key: getattr(self, key) for key in ("map50", "map50_95", "precision", "recall", "f1")}

    def figures(self) -> dict[str, Any]:
        """Give everything but the curves as plain data."""
        scores = {name: asdict(score) for name, score in self.per_class.items()}
        plain = {key: value for key, value in vars(self).items() if key != "curves"}
        return plain | {"per_class": scores}

    def line(self) -> str:
        """Give the means as one line."""
        return ", ".join(f"{key} {value:.3f}" for key, value in self.means().items())

    def table(self) -> str:
        """Lay the figures out as a table, the mean of all classes first."""
        rows = [f"{'class':<20}{'truths':>8}{'P':>8}{'R':>8}{'F1':>8}{'AP@.5':>8}{'AP@.5:.95':>11}"]
        truths = sum(score.truths for score in self.per_class.values())
        mean = ClassScore(self.map50, self.map50_95, self.precision, self.recall, self.f1, truths)
        for name, score in [("all", mean), *self.per_class.items()]:
            rates = "".join(f"{rate:8.3f}" for rate in (score.precision, score.recall, score.f1, score.ap50))
            rows.append(f"{name[:19]:<20}{score.truths:8}{rates}{score.ap:11.3f}")
        times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in self.ms_per_image.items())
        rows.append(f"{self.images} images; a picture takes {times}; P, R and F1 at confidence {self.confidence:.3f}")
        return "\n".join(rows)


def summarise(
    ranked: list[Ranked],
    average_precision: np.ndarray,
    names: tuple[str, ...],
    *,
    images: int,
    ms_per_image: dict[str, float],
    confidence: float | None = None,
) -> Evaluation:
    """Make the evaluation of what every class found and its average precision [10 IoUs from .5, C].

    Means go over the classes that have truths; P, R and F1 stand where the mean F1 is best. With a `confidence` they
    stand there, and the rates of all classes are those of all boxes together, as Darknet gives them.
    """
    curves = make_curves(ranked)
    ap50, ap = average_precision[0], average_precision.mean(0)
    P, R, F1 = curves.precision, curves.recall, curves.f1  # [C, 1001]
    counted = curves.truths > 0
    if confidence is None:
        best = int(F1[counted].mean(0).argmax()) if counted.any() else 0
        rates = [float(values[counted, best].mean()) if counted.any() else 0.0 for values in (P, R, F1)]
    else:
        best = int(np.searchsorted(CONFIDENCES, confidence - 1e-9))
        pooled = make_curves([_pool(ranked)])
        rates = [float(values[0, best]) for values in (pooled.precision, pooled.recall, pooled.f1)]
        counted = np.ones_like(counted)
    per_class = {
        name: ClassScore(*(float(value[i]) for value in (ap50, ap, P[:, best], R[:, best], F1[:, best])), kind.truths)
        for i, (name, kind) in enumerate(zip(names, ranked, strict=True))
    }
    means = [float(values[counted].mean()) if counted.any() else 0.0 for values in (ap50, ap)]
    return Evaluation(*means, *rates, float(CONFIDENCES[best]), per_class, images, ms_per_image, curves)


def make_curves(ranked: list[Ranked]) -> Curves:
    """Read precision, recall and F1 of every class over CONFIDENCES, and the precision-recall curve."""
    P, R = np.zeros((2, len(ranked), len(CONFIDENCES)))
    envelope, is_found = np.zeros((len(ranked), len(RECALLS))), np.zeros(P.shape, bool)
    for i, (scores, is_hit, truths) in enumerate(ranked):
        if not truths or not len(scores):
            continue
        order = np.argsort(-scores, kind="stable")
        hits = np.concatenate(([0], np.cumsum(is_hit[order])))
        count = np.searchsorted(-scores[order], -CONFIDENCES, side="right")  # detections at or above each confidence
        P[i], R[i] = hits[count] / np.maximum(count, 1), hits[count] / truths
        is_found[i] = count > 0
        envelope[i] = interpolate(hits[1:], truths, RECALLS)
    F1 = 2 * P * R / np.maximum(P + R, 1e-16)
    return Curves(P, R, F1, envelope, is_found, np.array([kind.truths for kind in ranked], int))


def interpolate(hits: np.ndarray, truths: int, recalls: np.ndarray) -> np.ndarray:
    """Give the best precision at each recall or beyond, 0 beyond the last; `hits` [N] are cumulated, best first."""
    precision = hits / np.arange(1, len(hits) + 1)
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
    return best[np.searchsorted(hits / truths, recalls, side="left")]


def _pool(ranked: list[Ranked]) -> Ranked:
    scores, is_hit = (np.concatenate([kind[part] for kind in ranked]) for part in (0, 1))
    return Ranked(scores, is_hit, sum(kind.truths for kind in ranked))
