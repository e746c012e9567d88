"""What `pyfused train` trains: a model, its data, its loss and how it is judged; a page for each kind of data."""

import inspect
from pathlib import Path

from .digits import MnistDigits, SmallDigits
from .photos import DeepPhotos, Photos
from .ranking import InBatch, SampledNegatives
from .ratings import RatingClasses, Ratings
from .task import Task
from .text import Text

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (SmallDigits, MnistDigits, Photos, DeepPhotos, RatingClasses, Ratings, SampledNegatives, InBatch, Text)
}

__all__ = ["TASKS", "Task", "make_task"]


def make_task(name: str, folder: Path | None = None, **settings) -> Task:
    """The task of this name; settings that are None are left to it.

    Raises ValueError for a setting that it has not, and what its data raises.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if unknown := given.keys() - inspect.signature(TASKS[name]).parameters.keys():
        raise ValueError(f"{name} has no option {', '.join(sorted(unknown))}")
    return TASKS[name](folder, **given)
