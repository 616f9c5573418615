"""The card of a model: what a checkpoint says of it besides the weights, read without running code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from focal_d2.errors import UserError, describe_error, one_line, reason
from focal_d2.storage.pickles import ForbiddenImportError
from focal_d2.storage.weights import read_torch

# Its name in checkpoints.
CARD = "card"


class ModelCard(NamedTuple):
    """What a program needs besides the weights to use a model.

    Attributes:
        class_names: K names in the order of the labels; None: not known.
        config: YAML of `MODEL`, `INPUT` and `TEST`. Among its keys are the pixel format and the sizes of
            training and test images. It has no path of the machine that trained.
    """

    class_names: tuple[str, ...] | None
    config: str

    def as_dict(self) -> dict[str, Any]:
        """Return the card as checkpoints keep it."""
        return {
            "class_names": None if self.class_names is None else list(self.class_names),
            "config": self.config,
        }

    @classmethod
    def from_dict(cls, content: Any) -> ModelCard | None:
        """Return the card that a checkpoint holds as a dictionary; None for None. Other items are ignored.

        Raises:
            ValueError: if it is something else.
        """
        if content is None:
            return None
        if not isinstance(content, dict) or not isinstance(content.get("config"), str):
            raise ValueError(f"the card is {one_line(content, 100)}")
        names = content.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(x, str) for x in names)):
            raise ValueError(f"the card's class_names is {one_line(names, 100)}")
        return cls(None if names is None else tuple(names), content["config"])


def saved_card(content: Any, checkpoint: str) -> ModelCard | None:
    """Return the card in a checkpoint's content; None if there is none, as in older checkpoints.

    Raises:
        UserError: if it is damaged; it names `checkpoint`.
    """
    try:
        return ModelCard.from_dict(content.get(CARD) if isinstance(content, dict) else None)
    except ValueError as error:
        raise UserError(f"{checkpoint} is damaged: {error}") from error


def read_card(path: str, *, trusted: bool = False) -> ModelCard | None:
    """Read the card of a checkpoint's file; None if it has none.

    Args:
        path: of the file.
        trusted: let the file import and run what it names.

    Raises:
        UserError: if the file can't be read.
    """
    return saved_card(read_checkpoint(path, trusted=trusted), path)


def read_checkpoint(path: str, *, trusted: bool = False) -> Any:
    """Read the content of a checkpoint's file without a model that it fits.

    Raises:
        UserError: if the file can't be read.
    """
    try:
        return read_torch(path, trusted=trusted)
    except ForbiddenImportError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    except Exception as error:  # a damaged file fails in whatever way its bytes bring about
        raise UserError(f"cannot read {path}: {describe_error(error, lines=1)}") from error


def class_difference(
    of_checkpoint: Sequence[str] | None, of_dataset: Sequence[str] | None, dataset: str
) -> tuple[str, bool]:
    """Compare the class names of a checkpoint with those of a dataset.

    Args:
        of_checkpoint: in the order of the labels; None: not known.
        of_dataset: the same.
        dataset: its name.

    Returns:
        What differs in one line, "" if nothing does or one of them is not known; and whether the names are
        the same in another order, which no evaluation can mean.
    """
    if of_checkpoint is None or of_dataset is None or list(of_checkpoint) == list(of_dataset):
        return "", False
    if len(of_checkpoint) != len(of_dataset):
        return (f"the checkpoint has {len(of_checkpoint)} classes, {dataset} has {len(of_dataset)}"), False
    pairs = list(zip(of_checkpoint, of_dataset, strict=True))
    first = next(k for k, (ours, theirs) in enumerate(pairs) if ours != theirs)
    permuted = sorted(of_checkpoint) == sorted(of_dataset)
    how = "are in another order than" if permuted else "differ from"
    return (
        f"the class names of the checkpoint {how} those of {dataset}: class {first} is "
        f'"{of_checkpoint[first]}" in the checkpoint and "{of_dataset[first]}" in the dataset'
    ), permuted
