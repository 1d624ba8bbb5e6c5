"""Images of a run's validation split as files, to try its model with."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from hf_cifar.deploy.inputs import images_of
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import RunFolder


def write_examples(
    run: RunFolder, folder: Path, count: int, dataset_name: str | None = None
) -> list[Path]:
    """Write up to `count` images to new PNG files, of all classes in turn, and return the files.

    Raises: UserError for data that are missing or have changed.
    """
    validation = used_splits(run, open_data(run, dataset_name)).validation
    folder.mkdir()
    files = []
    for number, (image, _) in enumerate(images_of(validation, count), 1):
        files.append(folder / f"{number:02}.png")
        Image.fromarray(image).save(files[-1])
    return files
