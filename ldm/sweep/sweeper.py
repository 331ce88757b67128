"""Measures the settings of a grid one after the other, and finds the best."""

import json
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from ldm.module import DiffusionModule
from ldm.sweep.averages import Averages
from ldm.sweep.goal import goal_of
from ldm.sweep.grid import Setting, Sweep
from ldm.sweep.records import Record, Records, Task
from ldm.sweep.results import Results
from vfm_vae.contracts import Measures, WeightAverage
from vfm_vae.finite import NotFinite
from vfm_vae.images import quantised
from vfm_vae.lightning_private import undeclared
from vfm_vae.metrics.summary import json_numbers
from vfm_vae.saving import alike
from vfm_vae.trial import cut_short_by
from vfm_vae.types import Samples


class Sweeper:
    """Measures a grid of settings with the callbacks of a trainer.

    Args:
        trainer: The trainer, whose test measures a setting.
        module: The model.
        data: The data, which numbers the samples.
        options: The grid.
        checkpoint: The checkpoint that is looked at.
        weights_only: Whether Lightning reads checkpoints without unpickling objects.

    Raises:
        ValueError: if something is asked for that can't be had, before anything is measured.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: DiffusionModule,
        data: LightningDataModule,
        options: Sweep,
        checkpoint: str,
        weights_only: bool | None = None,
    ) -> None:
        self.trainer, self.module, self.data, self.options = trainer, module, data, options
        self.weights_only = weights_only
        self.module.trainer = trainer  # whose precision is a setting
        callbacks = undeclared(trainer).callbacks
        self.measuring = [callback for callback in callbacks if isinstance(callback, Measures)]
        for callback in self.measuring:
            callback.adopt(module)
        self.goal = goal_of(options, self.measuring)
        self.guidance, self.seed = module.pipeline.guidance, module.seed
        self.settings = options.settings(self.guidance)
        has_average = any(isinstance(callback, WeightAverage) for callback in callbacks)
        self.averages = Averages(Path(checkpoint), has_average)
        self.averages.check([length for length in options.lengths if length is not None])
        self._shared = self._shared_settings()
        is_trial = cut_short_by(vars(trainer), "sweep") is not None
        self.folder = None if is_trial else Path(options.folder or self.averages.run / "sweep")
        if is_trial and any(length is not None for length in options.lengths):
            raise ValueError("sweep.lengths: a trial run writes no checkpoints with other averages; leave them out")
        self.records = Records(self.folder)
        if trainer.is_global_zero:
            self.records.check_place()
        self._loaded: list[float | None] = []  # the average that the model has
        self._watch = Watch(module)
        callbacks.append(self._watch)

    def run(self) -> Results:
        """Measures what is not measured yet, and says what is the best.

        Raises:
            ValueError: if no setting could be measured.
        """
        tasks = [Task(setting, self.seed) for setting in dict.fromkeys(each.measured for each in self.settings)]
        left = [task for task in tasks if self._found(task) is None]
        self._tell_what_is_known(tasks, left)
        for place, task in enumerate(left, 1):
            self._measure(task)
            self._tell(task, f"{place} of {len(left)}", len(left) - place)
        results = self._results()
        if self.options.confirm:
            results = results._replace(confirmed=self._confirmed(results.best, {task.setting for task in tasks}))
        checkpoint = self._checkpoint(results.best.length)
        alike(self.trainer.strategy, lambda: self._write(results, checkpoint))
        return results

    def _confirmed(self, best: Setting, grid: set[Setting]) -> dict[Setting, Record]:
        """The best setting with another seed, and no guidance, as seeds may differ by more than settings do."""
        tasks = [Task(setting, self.seed + 1) for setting in dict.fromkeys((best.measured, best.unguided))]
        tasks = [task for task in tasks if task.setting in grid]
        if left := [task for task in tasks if self._found(task) is None]:
            self._say(f"once more, with seed {self.seed + 1}: {' · '.join(str(task.setting) for task in left)}")
        for task in left:
            self._measure(task)
        return {task.setting: record for task in tasks if (record := self._found(task)) is not None}

    def _measure(self, task: Task) -> None:
        """Measures a setting and writes that down, on all ranks alike."""
        began, length = time.monotonic(), task.setting.length
        checkpoint = None if self._loaded == [length] else self._checkpoint(length)
        self.module.pipeline.guidance, self.module.seed = task.setting.of(self.guidance), task.seed
        self._watch.broken = None
        self.trainer.test(
            self.module, ckpt_path=checkpoint, verbose=False, datamodule=self.data, weights_only=self.weights_only
        )
        self._loaded = [length]
        metrics, broken = json_numbers(self.trainer.callback_metrics), self._watch.broken
        if self.goal.logged not in metrics:
            raise ValueError(f"sweep.metric: {self.goal.name} was not logged; logged were {', '.join(metrics)}")
        seconds = round(time.monotonic() - began, 1)
        record = Record({} if broken else metrics, self._dependencies(task), seconds, broken)
        self.records.add(task, record)
        alike(self.trainer.strategy, self._write_records)

    def _write_records(self) -> None:
        if self.trainer.is_global_zero:
            self.records.write()

    def _write(self, results: Results, checkpoint: Path) -> None:
        if not self.trainer.is_global_zero:
            return
        Console().print(results.table())
        self._say(results.answer())
        if self.folder is None:
            return
        self.records.summary = results.summary()
        self.records.write()
        results.write(self.folder, checkpoint, self.averages.stored.images_seen)
        for file in set(self.folder.glob("length_*.ckpt")) - {checkpoint}:
            file.unlink()
        self._say(f"table, picture and overlay: {self.folder}/{{sweep.md,sweep.png,best.yaml}}")

    def _checkpoint(self, length: float | None) -> Path:
        """The checkpoint with an average, which rank zero writes where there is none."""
        if length is None:
            return self.averages.checkpoint
        assert self.folder is not None  # or such lengths were refused
        file = self.folder / f"length_{length:g}.ckpt"

        def write() -> None:
            if self.trainer.is_global_zero:
                self.averages.write(length, file)

        alike(self.trainer.strategy, write)
        return file

    # What is known

    def _shared_settings(self) -> dict[str, Any]:
        """What all numbers depend on, as `metrics.json` has it."""
        samples = getattr(self.data, "samples", None)
        if samples is None:
            raise ValueError(
                "data.num_samples: give the number of samples to draw for each setting, such as 10000, or data.prompts"
            )
        count = len(samples)
        settings = {"num_samples": count, **samples.settings(), "model": self.module.drawing_settings()}
        for callback in self.measuring:
            name = type(callback).__name__
            while name in settings:
                name += "'"
            settings[name] = callback.settings() | {"num_images": min(callback.num_images or count, count)}
        return settings

    def _dependencies(self, task: Task) -> dict[str, Any]:
        """What the numbers of a task depend on, as plain data."""
        own = {"guidance": task.setting.of(self.guidance).settings(), "seed": task.seed}
        weights = self.averages.identity(task.setting.length)
        depends = self._shared | {"model": self._shared["model"] | own, "weights": weights}
        return dict(json.loads(json.dumps(depends)))

    def _found(self, task: Task) -> Record | None:
        return self.records.find(task, self._dependencies(task))

    def _results(self) -> Results:
        found = [(setting, self._found(Task(setting.measured, self.seed))) for setting in self.settings]
        rows = [(setting, record) for setting, record in found if record is not None]
        return Results(rows, self.goal, self.seed, self._shared, self.averages.checkpoint, self.guidance)

    # Telling

    def _say(self, text: str) -> None:
        if self.trainer.is_global_zero:
            Console().print(text, soft_wrap=True, highlight=False, markup=False)

    def _tell_what_is_known(self, tasks: Sequence[Task], left: Sequence[Task]) -> None:
        changed = [self.records.changed(task, self._dependencies(task)) for task in left]
        if names := dict.fromkeys(name for each in changed for name in each):
            count = sum(map(bool, changed))
            self._say(f"settings that are measured anew: {count}, because of what changed: {', '.join(names)}")
        known = f"; {len(tasks) - len(left)} of them are measured already" if len(left) < len(tasks) else ""
        self._say(f"sweep: {len(tasks)} settings by {self.goal.logged}, {self.goal.direction}{known}")

    def _tell(self, task: Task, place: str, left: int) -> None:
        record = self._found(task)
        assert record is not None
        value = record.metrics.get(self.goal.logged)
        known = [each for _, each in self._results().rows]
        remaining = left * median(each.seconds for each in known)
        end = f"; ends in {_duration(remaining)}" if left else ""
        what = f"{self.goal.name} {value:.4g}" if value is not None else record.broken or "no finite number"
        self._say(f"{place}: {task.setting}: {what} ({_duration(record.seconds)}{end})")


class Watch(Callback):
    """Lets a setting end whose samples are not finite, on all ranks alike, and lets SIGTERM end the process.

    From the first such sample on, nothing more is drawn: the callbacks get to see blank images, and what they say of
    them is dropped. An error would leave the other ranks waiting.

    Args:
        module: The module that draws.

    Attributes:
        broken: Why the present setting can't be measured; None while it can.
    """

    def __init__(self, module: DiffusionModule) -> None:
        self.broken: str | None = None
        draw, watched = module.draw, vars(module)

        def draw_while_finite(index: Tensor, *args: Any, **kwargs: Any) -> Samples:
            if self.broken is None:
                try:
                    return draw(index, *args, **kwargs)
                except NotFinite as error:
                    self.broken = str(error).partition(";")[0]  # without advice
            return blank(module, index)

        watched["draw"] = draw_while_finite

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, SIGTERM ends the process as Ctrl-C does; Lightning would wait for the end of a batch."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def on_test_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Asks all ranks whether they go on."""
        if not trainer.strategy.reduce_boolean_decision(self.broken is None, all=True) and self.broken is None:
            self.broken = "samples of another rank hold nan or inf"

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Asks once more, after the last batch."""
        self.on_test_batch_start(trainer)


@torch.no_grad()
def blank(module: DiffusionModule, index: Tensor) -> Samples:
    """Samples that are nothing, by their numbers `[B]`."""
    latents = torch.zeros(len(index), *module.model.latent_shape, device=module.device)
    images = None if module.tokenizer is None else quantised(module.tokenizer.decode(latents), module.rounding)
    return Samples(images, latents, module.sample_condition(index), index)


def _duration(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
