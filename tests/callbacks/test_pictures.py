"""Pictures that loggers get, each in its own way."""

from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.comet import CometLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.images import ReconstructionImages
from vfm_vae.pictures import log_picture
from vfm_vae.timeline import Timeline

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


class Recorder(Logger):
    """A logger of somebody else's, which keeps what it is told."""

    name, version = "recorder", 0

    def __init__(self):
        self.numbers, self.pictures, self.options = [], [], {}

    def log_metrics(self, metrics, step=None):
        self.numbers += [(step, name) for name in metrics]

    def log_hyperparams(self, params, *_):
        self.options |= params

    def log_image(self, key, images, step=None):
        self.pictures += [(step, key, image.shape) for image in images]


class Remote:
    """What a logger sends to its server."""

    run_id, experiment = "run", None

    def __init__(self):
        self.sent = []
        self.experiment = SimpleNamespace(log_image=lambda *given, **named: self.sent.append((given, named)))


class MLFlow(Remote, MLFlowLogger):
    pass


class Comet(Remote, CometLogger):
    pass


def test_all_loggers_get_the_same_numbers_and_pictures(trainer, new_module, data, tmp_path):
    """Training is the same, too, with one logger, three or none."""
    recorder, table = Recorder(), CSVLogger(tmp_path, "", "", flush_logs_every_n_steps=1)
    board = TensorBoardLogger(tmp_path, "", "")
    options = {"log_every_n_steps": 1, "val_check_interval": 3}
    run = trainer(Timeline(), ReconstructionImages(2), logger=[board, table, recorder], **options)
    run.fit(new_module(), data)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0}).Reload()
    numbers = {(event.step, tag) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    assert numbers == set(recorder.numbers) and {(24, "val/loss"), (4, "train/loss")} <= numbers
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    assert {(int(row["step"]), name) for row in rows for name in row if row[name] and name != "step"} == numbers
    pictures = {(event.step, tag) for tag in events.Tags()["images"] for event in events.Images(tag)}
    assert pictures == {(step, key) for step, key, _ in recorder.pictures} and (12, "val/reconstructions") in pictures
    files = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert files == {f"{tag.replace('/', '_')}_{step}.png" for step, tag in pictures}
    with Image.open(tmp_path / "pictures/val_reconstructions_12.png") as picture:
        assert (picture.height, picture.width, 3) == recorder.pictures[0][2]


def test_weights_and_biases_gets_an_image(monkeypatch):
    told = []
    wandb = SimpleNamespace(Image=lambda pixels, **_: ("image", pixels.tolist()))
    monkeypatch.setitem(__import__("sys").modules, "wandb", wandb)
    logger = object.__new__(WandbLogger)
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: told.append((metrics, step)))
    log_picture(logger, "val/reconstructions", PIXELS, 120)
    assert told == [({"val/reconstructions": [("image", PIXELS.tolist())]}, 120)]


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        (MLFlow, ("run", PIXELS), {"key": "val/a", "step": 7}),
        (Comet, (), {"image_data": PIXELS, "name": "val/a", "step": 7}),
    ],
)
def test_others_are_told_as_they_want_it(kind, given, named):
    logger = kind()
    log_picture(logger, "val/a", PIXELS, 7)
    assert logger.sent == [(given, named)]


def test_a_logger_that_knows_no_pictures_gets_none():
    log_picture(DummyLogger(), "val/a", PIXELS, 7)
