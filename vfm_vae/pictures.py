"""Gives pictures to loggers, whichever these are."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.comet import CometLogger

from vfm_vae.writing import write_picture

FOLDER = "pictures"


def log_picture(logger: Logger, tag: str, pixels: np.ndarray, position: int) -> None:
    """Logs a picture where numbers are logged, too.

    TensorBoard, Weights & Biases, MLflow and Comet show it, as does any logger with a method
    `log_image(key=…, images=[…], step=…)`. Beside the file of a `CSVLogger`, it is `pictures/<tag>_<images seen>.png`.
    Other loggers know no pictures, and get none.

    Args:
        logger: The logger; only that of rank zero.
        tag: Name of the picture.
        pixels: uint8 `[H, W, 3]`.
        position: Images seen, where TensorBoard and others show it.
    """
    board: Any = logger  # loggers declare neither what they wrap, nor images
    if isinstance(logger, TensorBoardLogger):
        board.experiment.add_image(tag, pixels, position, dataformats="HWC")
    elif isinstance(logger, CSVLogger):
        write_picture(Path(logger.log_dir, FOLDER, f"{tag.replace('/', '_')}_{position}.png"), pixels)
    elif isinstance(logger, MLFlowLogger):
        board.experiment.log_image(board.run_id, pixels, key=tag, step=position)
    elif isinstance(logger, CometLogger):
        board.experiment.log_image(image_data=pixels, name=tag, step=position)
    elif hasattr(logger, "log_image"):
        board.log_image(key=tag, images=[pixels], step=position)
