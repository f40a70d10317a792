"""Every picture that shows an evaluation, in one folder."""

from pathlib import Path
from typing import Any

from .charts import draw_ap, draw_confusion, draw_rates
from .confusion import IOU, confuse
from .ignored import drop_covered
from .labels import Labelled
from .plots import draw_predictions
from .scores import Evaluation


def draw_evaluation(
    folder: Path, evaluation: Evaluation, results: list[dict[str, Any]], labelled: Labelled, names: tuple[str, ...]
) -> None:
    """Draw rates.png, ap.png, confusion.png and predictions.jpg, at the evaluation's confidence, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    confidence = evaluation.confidence
    draw_rates(evaluation, folder / "rates.png")
    draw_ap(evaluation, folder / "ap.png")
    matrix = confuse(*drop_covered(results, labelled), len(names), confidence=confidence)
    title = f"boxes at confidence ≥ {confidence:.3f}, paired at IoU ≥ {IOU}"
    draw_confusion(matrix, names, folder / "confusion.png", title=title)
    draw_predictions(results, labelled, names, folder / "predictions.jpg", confidence=confidence)
