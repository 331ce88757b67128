"""The DataModule that serves images to both models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from vfm_vae.data.folder import ImageFolderDataset, say_renumbered
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.data.prompts import SamplePrompts, read_prompts
from vfm_vae.data.resuming import ResumableLoader
from vfm_vae.data.samples import SampleNumbers, SampleSet
from vfm_vae.data.sampling import EvaluationSampler, GivenOrder, TrainingSampler
from vfm_vae.data.small import SmallImages
from vfm_vae.data.sources import SOURCES, Options, check_captions, check_photos
from vfm_vae.data.steps import Steps, divided, whole_steps
from vfm_vae.data.transforms import CentreCrop, RandomCrop, ResizeAndCrop, Transform
from vfm_vae.data.workers import outlive_signals
from vfm_vae.lightning_private import undeclared
from vfm_vae.options import at_least, one_of, positive, within

Split = Literal["train", "val"]


class ImageNetDataModule(LightningDataModule):
    """Images with labels from folders `<root>/{train,val}/<class>/*` or tar shards, or their cached latents.

    Yields `Batch` (uint8 images, labels, and positions in the data set), or `LatentBatch` from cached latents. The
    order of training images depends only on the seed and the epoch, not on workers, batch size or ranks; a resumed run
    continues with the next image of its epoch, even if batch size or ranks have changed. Validation and test see each
    `val` image once, in order; prediction sees the splits that `predict` names. With `num_samples` or `prompts`, test
    and prediction see the numbers of samples to draw instead.

    Args:
        root: Folder of the data set, or of the cache with `source: latents`. With `source: photos`, the photos are
            written to it.
        image_size: Height and width of the images in pixels.
        batch_size: Training images in one step, over all GPUs. Without `micro_batch_size` it counts one batch, of which
            `accumulate_grad_batches` make a step, as in earlier versions.
        micro_batch_size: Largest number of training images that one GPU processes at a time; if its part of a step is
            larger, gradients are accumulated. `trainer.val_check_interval` then counts steps. The default is its whole
            part.
        val_batch_size: Images in one batch of validation, test or prediction, over all GPUs. The default is as many as
            training processes at a time.
        num_workers: Number of loading processes on each rank.
        source: What `root` holds. `folder`: folders of images by class, or any folder of images. `shards`: WebDataset's
            tar files with `train` or `val` in their names. `photos`: the embedded data set, which is written if it is
            missing. `latents`: a cache of latents, as `python -m vfm_vae predict` makes it.
        photos: Options of the embedded data set, see `vfm_vae.embedded.photos.write_photos`, such as `size` and
            `train_per_class`.
        captions: Where the images' captions are, which batches then carry. Folders and photos: the field of
            `<root>/{train,val}/metadata.jsonl` that holds them, such as `text`; in each of its lines, `file_name` is
            the path of an image, and images in no line are left out. Shards: `txt` for members `<key>.txt`, or
            `json.FIELD` for that field of members `<key>.json`; `.cls` may then be missing. A field may hold several
            captions, of which training draws one in each epoch. Cached latents bring those that they were made with.
        min_size: Leaves out training images whose shorter side is less than so many pixels.
        small_list: File that lists the images under `min_size`, one `class/file.JPEG` or `shard.tar/member.jpg` per
            line. It is made if it is missing or out of date, which reads every image's size. The default is
            `train_under_<min_size>px.txt` in `cache_dir`.
        mixed_shards: How many tar shards are shuffled together at a time.
        cache_dir: Folder for the list of small images and the index of tar shards; the default is `root`.
        crop: How training images are cropped: `random` for tokenizers; `centre` for diffusion models, as in evaluation
            but mirrored half of the time, unless there are captions, which would say "left" of what is right.
        evaluation_crop: How images are cropped in evaluation: `adm`, like ADM's reference images, or `resize`, as for
            published reconstruction numbers (bilinear, then the centre).
        min_crop: Smallest side of the random crop in training, as a fraction of the image's shorter side.
        resampling: Filter for resizing training crops.
        exif_transpose: Whether to turn images as their EXIF orientation says. Public code for ImageNet does not, and
            neither do the configs for it.
        max_bad_fraction: Damaged images are left out; the run stops if they are more than this fraction.
        predict: Splits that prediction goes through, one after the other, cropped as in evaluation.
        num_samples: Test and prediction draw so many samples from a diffusion model instead of reading a data set.
        prompts: Test and prediction draw samples for these prompts from a diffusion model instead of reading a data
            set. They are given as a list, or as a file `.txt` with a prompt in each line, a file `.jsonl` with a field
            `prompt`, `text` or `caption` in each line, or a folder of files `.txt` with one prompt each.
        images_per_prompt: Number of samples that are drawn for each of the `prompts`.
        seed: Seed of the order, the augmentation and the captions of training images.
        val_fraction: Share of the images that is held out for validation where a folder of images has no folders
            `train` and `val` of its own. The images' names decide which ones. Classes are then the folders in `root`,
            or there is one class if an image lies in none of them.

    Attributes:
        predict_indices: What this rank is to predict, in order, by split (or `samples`); set by a writer that knows
            what is there already. Without an entry, everything is divided over the ranks.

    Raises:
        ValueError: if an option lies outside its range, the data set is missing or laid out differently, a batch size
            is not divisible, or too many images are damaged.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 256,
        batch_size: int = 512,
        micro_batch_size: int | None = None,
        val_batch_size: int | None = None,
        num_workers: int = 8,
        source: Literal["folder", "shards", "photos", "latents"] = "folder",
        photos: dict[str, int] | None = None,
        captions: str | None = None,
        min_size: int = 0,
        small_list: str | None = None,
        mixed_shards: int = 64,
        cache_dir: str | None = None,
        crop: Literal["random", "centre"] = "random",
        evaluation_crop: Literal["adm", "resize"] = "adm",
        min_crop: float = 0.5,
        resampling: Literal["lanczos", "bicubic"] = "lanczos",
        exif_transpose: bool = True,
        max_bad_fraction: float = 0.01,
        predict: Sequence[Split] = ("val",),
        num_samples: int | None = None,
        prompts: str | Sequence[str] | None = None,
        images_per_prompt: int = 1,
        seed: int = 0,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        one_of("source", source, *SOURCES)
        one_of("crop", crop, "random", "centre")
        one_of("evaluation_crop", evaluation_crop, "adm", "resize")
        at_least(1, image_size=image_size, batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(1, micro_batch_size=micro_batch_size, mixed_shards=mixed_shards)
        at_least(1, num_samples=num_samples, images_per_prompt=images_per_prompt)
        at_least(0, num_workers=num_workers, min_size=min_size, seed=seed)
        within(0, 1, max_bad_fraction=max_bad_fraction, val_fraction=val_fraction)
        positive(val_fraction=val_fraction)
        check_photos(photos or {})
        check_captions(source, captions)
        self.root, self.source, self.image_size, self.seed = Path(root), source, image_size, seed
        self.batch_size, self.micro_batch_size, self.val_batch_size = batch_size, micro_batch_size, val_batch_size
        self.num_workers, self.min_size, self.mixed_shards = num_workers, min_size, mixed_shards
        self.predict, self.num_samples = tuple(predict), num_samples
        if prompts is not None and num_samples is not None:
            raise ValueError("num_samples: prompts say how many samples there are; leave one of the two options out")
        self._prompts = None if prompts is None else SamplePrompts(read_prompts(prompts), images_per_prompt)
        self.train_transform: Transform = RandomCrop(image_size, min_crop, resampling)
        if crop == "centre":
            self.train_transform = CentreCrop(image_size, flip=captions is None)
        self.evaluation_crop = evaluation_crop
        self.evaluation_transform: Transform = (CentreCrop if evaluation_crop == "adm" else ResizeAndCrop)(image_size)
        cache = Path(cache_dir) if cache_dir else self.root
        options = Options(
            root=self.root,
            cache_dir=cache,
            train_transform=self.train_transform,
            evaluation_transform=self.evaluation_transform,
            small=SmallImages(min_size, cache, small_list, captions),
            photos=photos or {},
            captions=captions,
            exif_transpose=exif_transpose,
            max_bad_fraction=max_bad_fraction,
            val_fraction=val_fraction,
            seed=seed,
        )
        self._source = SOURCES[source](options)
        self._steps = Steps(batch_size, micro_batch_size)
        self.train_set: SampleSet | None = None
        self.val_set: SampleSet | None = None
        self.predict_sets: dict[str, SampleSet] = {}
        self.predict_indices: dict[str, Sequence[int]] = {}

    def prepare_data(self) -> None:
        """Writes the embedded photos, the index of shards and the list of small images where they are missing.

        One process of each machine does it.
        """
        self._source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Finds the images or latents; reads none.

        Args:
            stage: `fit` takes the training images too, `predict` what is to be predicted alone.

        Raises:
            ValueError: if data is missing, or steps don't divide over GPUs and batches.
        """
        if stage == "predict":
            names = self.predict if self.samples is None else ("samples",)
            self.predict_sets, self.predict_indices = {name: self._predicted(name) for name in names}, {}
            return
        if stage == "test" and self.samples is not None:
            return
        if stage == "fit" and self.trainer is not None:
            self._steps.begin(self.trainer)
        if stage in ("fit", None) and self.train_set is None:
            self.train_set = self._source.training()
        if self.val_set is None:
            self.val_set = self._source.evaluated("val")
            if isinstance(self.train_set, ImageFolderDataset) and isinstance(self.val_set, ImageFolderDataset):
                say_renumbered(self.train_set.classes, self.val_set.classes)
        if stage in ("validate", "test") and self.val_set is None:
            raise ValueError(f"root: there are no validation latents in {str(self.root)!r}, which has no folder 'val'")

    def teardown(self, stage: str) -> None:
        """Restores the trainer's options that were changed for training."""
        self._steps.end()

    def on_exception(self, exception: BaseException) -> None:
        """Restores them."""
        self._steps.end()

    @property
    def samples(self) -> SampleNumbers | None:
        """What test and prediction draw instead of reading a data set; None where they read one."""
        return self._prompts if self.num_samples is None else SampleNumbers(self.num_samples)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, known after `setup`; a label is a position in this list."""
        return next(s.classes for s in (self.train_set, self.val_set) if isinstance(s, ImageDataset))

    @property
    def num_classes(self) -> int | None:
        """One more than the largest label; None before the data was looked for, or where there is none."""
        sets = [s for s in (self.train_set, self.val_set) if s is not None]
        return max(int(s.labels.max()) for s in sets) + 1 if sets else None

    @property
    def latent_statistics(self) -> LatentStatistics | None:
        """By which latents are normalised: the training split's; None where the data has none."""
        return self._source.latent_statistics()

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented; on every rank the same number of full batches, which make whole steps.

        Raises:
            ValueError: if a validation would fall between the batches that make one step.
        """
        dataset, ranks = self._trained(), self._ranks()
        size, loading = self._steps.of_rank(ranks["num_replicas"]), self._loading(dataset)
        # Lightning then takes the first batches, in order, again and again.
        if self.trainer and undeclared(self.trainer).overfit_batches:
            return DataLoader(dataset, batch_size=size, **loading)
        sampler = TrainingSampler(
            dataset,
            size,
            seed=self.seed,
            shards=dataset.shards,
            mixed_shards=self.mixed_shards,
            batches_per_step=whole_steps(self.trainer) if self.trainer else 1,
            **ranks,
        )
        return ResumableLoader(dataset, batch_size=size, sampler=sampler, trainer=self.trainer, **loading)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Every validation image once, in order; padding that makes ranks equal has index -1. Nothing without any."""
        return [] if self.val_set is None else self._evaluation_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """The validation images, or the samples to draw."""
        return self.val_dataloader() if self.samples is None else self._evaluation_loader(self.samples)

    def evaluation_dataloader(self, split: Split) -> DataLoader[Any]:
        """A split once, in order and without randomness, divided over the ranks as in validation."""
        return self._evaluation_loader(self._predicted(split))

    def spread_dataloader(self, num_images: int) -> DataLoader[Any]:
        """This rank's part of so many training images, spread evenly over the data set (it may be sorted by class)."""
        dataset, ranks = self._trained(), self._ranks()
        count = min(num_images, len(dataset))
        positions = [number * len(dataset) // count for number in range(count)]
        return self._evaluation_loader(dataset, positions[ranks["rank"] :: ranks["num_replicas"]])

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each of the `predict_sets`."""
        return [
            self._evaluation_loader(dataset, self.predict_indices.get(name))
            for name, dataset in self.predict_sets.items()
        ]

    def _trained(self) -> SampleSet:
        """The training set, once it was looked for."""
        if self.train_set is None:
            self.train_set = self._source.training()
        return self.train_set

    def _predicted(self, name: str) -> SampleSet:
        if self.samples is not None and name == "samples":
            return self.samples
        dataset = self._source.evaluated(name)
        if dataset is None:
            raise ValueError(f"root: the latents in {str(self.root)!r} have no split {name!r}")
        return dataset

    def _evaluation_loader(self, dataset: SampleSet, indices: Sequence[int] | None = None) -> DataLoader[Any]:
        ranks = self._ranks()
        size = self._evaluated_at_once(ranks["num_replicas"])
        sampler = EvaluationSampler(dataset, size, **ranks) if indices is None else GivenOrder(dataset, indices)
        return DataLoader(dataset, batch_size=size, sampler=sampler, **self._loading(dataset))

    def _evaluated_at_once(self, num_ranks: int) -> int:
        """One rank's part of a batch in evaluation."""
        if self.val_batch_size is None and self.micro_batch_size is not None:
            return max(1, min(self.micro_batch_size, self.batch_size // num_ranks))
        return divided("val_batch_size", self.val_batch_size or self.batch_size, num_ranks)

    def _ranks(self) -> dict[str, int]:
        """How many there are, and which is this."""
        trainer = self.trainer
        return {
            "num_replicas": trainer.world_size if trainer else 1,
            "rank": trainer.global_rank if trainer else 0,
        }

    def _loading(self, dataset: SampleSet) -> dict[str, Any]:
        num_workers = self.num_workers if dataset.reads else 0
        return {
            "num_workers": num_workers,
            "collate_fn": dataset.collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": num_workers > 0,
            "worker_init_fn": outlive_signals,
            # Otherwise each new iterator would draw from the global generator, and noise would depend on it.
            "generator": torch.Generator(),
        }
