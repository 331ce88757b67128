import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.folder import ImageFolderDataset
from vfm_vae.types import Batch


def datamodule(root, **kwargs):
    return ImageNetDataModule(str(root), **({"image_size": 8, "batch_size": 4, "num_workers": 0} | kwargs))


class Killed(Exception):
    pass


class Model(LightningModule):
    """Learns a little and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        images = batch.images.float() / 255
        self.seen.append((self.current_epoch, batch.index.tolist(), images.double().sum().item()))
        return (images.mean((2, 3)) - self.weight).square().sum()

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", batch.index.tolist()))

    def predict_step(self, batch, batch_idx):
        return batch.index

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise Killed


def fit(folder, data, *, callbacks=(), ckpt_path=None, **kwargs):
    model = Model()
    trainer = Trainer(
        default_root_dir=folder, max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        **({"enable_checkpointing": bool(callbacks)} | kwargs),
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model


# A checkpoint in the middle of the first and of the second epoch, and at its end: by step, by epoch, by validation.
SAVES = {
    "mid first epoch": {"every_n_train_steps": 2},
    "mid second epoch": {"every_n_train_steps": 5},
    "last step of an epoch": {"every_n_train_steps": 3},
    "end of an epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "after validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
}


@pytest.mark.parametrize(
    ("save", "num_workers"),
    [(save, 0) for save in SAVES]
    + [("mid second epoch", 2)]
    + [pytest.param(save, 2, marks=pytest.mark.slow) for save in SAVES if save != "mid second epoch"],
)
def test_a_killed_run_resumes_with_the_very_next_batch(tree, tmp_path, save, num_workers):
    def data():
        return datamodule(tree, num_workers=num_workers, seed=3)  # 12 images: 3 batches an epoch

    whole = fit(tmp_path, data())
    checkpoint = ModelCheckpoint(tmp_path / "run", save_top_k=-1, filename="{step}", **SAVES[save])
    step = {"mid first epoch": 2, "mid second epoch": 5}.get(save, 3)
    with pytest.raises(Killed):
        fit(tmp_path, data(), callbacks=[checkpoint, Kill(step + 1)])

    resumed = fit(tmp_path, data(), ckpt_path=tmp_path / "run" / f"step={step}.ckpt")

    def training(model):
        return [seen for seen in model.seen if seen[0] != "val"]

    assert len(training(whole)) == 9
    assert training(resumed) == training(whole)[step:]
    assert torch.equal(resumed.weight, whole.weight)


def test_epochs_differ_and_workers_do_not_matter(tree, tmp_path):
    alone = fit(tmp_path, datamodule(tree), limit_val_batches=0)
    workers = fit(tmp_path, datamodule(tree, num_workers=2), limit_val_batches=0)
    assert alone.seen == workers.seen
    by_epoch = [[seen[1] for seen in alone.seen if seen[0] == epoch] for epoch in range(3)]
    assert all(sorted(index for batch in batches for index in batch) == list(range(12)) for batches in by_epoch)
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]
    checksums = [seen[2] for seen in alone.seen]
    assert len(set(checksums)) == 9  # no batch and no augmentation comes twice
    assert alone.seen != fit(tmp_path, datamodule(tree, seed=1), limit_val_batches=0).seen


def test_loading_leaves_the_global_generator_alone(tree):
    data = datamodule(tree)
    data.setup("fit")
    state = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_are_uint8_images_int64_labels_and_index(tree):
    data = datamodule(tree)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Batch)
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (4, 3, 8, 8))
    assert (batch.labels.dtype, batch.index.dtype) == (torch.int64, torch.int64)
    assert torch.equal(batch.labels, (batch.index >= 6).long())
    assert data.classes == ["apple", "pear"]
    last = list(data.val_dataloader())[-1]
    assert last.index.tolist() == [4, 5]
    assert last.real.all()


def test_predict_sees_every_validation_image_once(tree, tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    batches = trainer.predict(Model(), datamodule=datamodule(tree))
    assert torch.cat(batches).tolist() == list(range(6))


def test_overfitting_repeats_its_batches(tree, tmp_path):
    seen = [entry[1] for entry in fit(tmp_path, datamodule(tree), overfit_batches=2).seen if entry[0] != "val"]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


class Ranks:
    """Stands for the trainer of one of several ranks."""

    def __init__(self, rank, world_size):
        self.global_rank, self.world_size = rank, world_size
        self.fit_loop = self.lightning_module = None
        self.accumulate_grad_batches, self.val_check_interval, self.overfit_batches = 1, 1.0, 0


def shares(root, ranks, loader, **kwargs):
    """The batches of each rank."""
    result = []
    for rank in range(ranks):
        data = datamodule(root, **kwargs)
        data.trainer = Ranks(rank, ranks)
        data.setup("fit")
        result.append(list(getattr(data, loader)()))
    return result


def joined(parts):
    """One batch of the parts that ranks have, without padding."""
    batch = Batch(*(torch.cat(column) for column in zip(*(part[:3] for part in parts), strict=True)))
    return Batch(*(column[batch.real] for column in batch[:3]))


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader"])
def test_two_ranks_see_what_one_sees(make_tree, loader):
    tree = make_tree(train=7, val=5)
    kwargs = {"batch_size": 4, "val_batch_size": 6}  # training drops 2 images; validation's last batch has 4
    (alone,) = shares(tree, 1, loader, **kwargs)
    two = shares(tree, 2, loader, **kwargs)
    assert len(two[0]) == len(two[1]) == len(alone)
    for whole, *parts in zip(alone, *two, strict=True):
        for one, both in zip(whole[:3], joined(parts)[:3], strict=True):
            assert torch.equal(one, both)


def test_ranks_get_padding_only_where_needed(make_tree):
    first, second = shares(make_tree(val=3, train=4, classes=("apple",)), 2, "val_dataloader", batch_size=2)
    assert [batch.index.tolist() for batch in first] == [[0], [2]]
    assert [batch.index.tolist() for batch in second] == [[1], [-1]]


def test_a_batch_that_does_not_divide_over_ranks_is_refused(tree):
    with pytest.raises(ValueError, match="val_batch_size: 3 images in total don't divide over 2 ranks"):
        shares(tree, 2, "val_dataloader", val_batch_size=3)
    with pytest.raises(ValueError, match="batch_size: a step takes 64 images, more than the 12 of training"):
        shares(tree, 1, "train_dataloader", batch_size=64)


def test_accumulated_steps_end_with_the_epoch_and_before_a_validation(tree, tmp_path):
    kwargs = {"max_steps": 2, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
    model = fit(tmp_path, datamodule(tree, batch_size=4), val_check_interval=2, **kwargs)  # 12 images
    assert [seen[0] for seen in model.seen] == [0, 0, "val", "val", 1, 1, "val", "val"]
    with pytest.raises(ValueError, match=r"trainer\.val_check_interval: 3 batches end in the middle of a step"):
        fit(tmp_path, datamodule(tree, batch_size=4), val_check_interval=3, **kwargs)


def test_small_images_are_listed_once_and_left_out(tree):
    Image.new("RGB", (300, 12)).save(tree / "train" / "apple" / "003.JPEG")
    data = datamodule(tree, min_size=16)
    data.prepare_data()
    data.setup("fit")
    title, *names = (tree / "train_under_16px.txt").read_text().splitlines()
    assert title.startswith("# under 16 px, of 12 images: ") and names == ["apple/003.JPEG"]
    assert len(data.train_set) == 11
    assert len(data.val_set) == 6

    (tree / "train_under_16px.txt").write_text("pear/000.JPEG\npear/001.JPEG\n")
    data = datamodule(tree, min_size=16)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_set) == 10


def test_a_list_of_small_images_is_made_again_for_others(tree, monkeypatch):
    for number, expected in enumerate([12, 12, 11], start=1):
        data = datamodule(tree, min_size=16)
        if number == 3:
            (tree / "train/apple/003.JPEG").unlink()
            Image.new("RGB", (300, 12)).save(tree / "train/apple/wide.JPEG")
        data.prepare_data()
        data.setup("fit")
        assert len(data.train_set) == expected
        if number == 1:
            monkeypatch.setattr(ImageFolderDataset, "small", lambda *_: pytest.fail("looked through again"))
        if number == 2:
            monkeypatch.undo()


def test_a_list_of_small_images_elsewhere(tree, tmp_path):
    (tmp_path / "file").touch()
    data = datamodule(tree, min_size=17, small_list=str(tmp_path / "file" / "small.txt"))
    with pytest.raises(ValueError, match=r"small_list: .*small.txt"):
        data.prepare_data()
    (tmp_path / "small.txt").write_text("apple/000.JPEG\n")
    data = datamodule(tree, min_size=17, small_list=str(tmp_path / "small.txt"))
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_set) == 11


def test_the_embedded_photos_are_written_then_read(tmp_path):
    photos = {"size": 16, "train_per_class": 5, "val_per_class": 5}
    data = datamodule(tmp_path / "photos", source="photos", photos=photos)
    data.prepare_data()
    data.setup("fit")
    assert len(data.classes) == 13
    assert len(data.train_set) == len(data.val_set) == 65


def test_bad_input_is_named(tree, tmp_path):
    with pytest.raises(ValueError, match=r"root: there is no folder '.*nowhere'"):
        datamodule(tmp_path / "nowhere").setup("fit")
    with pytest.raises(ValueError, match="source: one of 'folder', 'shards', 'photos', 'latents', given 'tar'"):
        datamodule(tree, source="tar")
    (tree / "val" / "quince").mkdir()
    with pytest.raises(ValueError, match="other class folders in 'val' than in 'train'"):
        datamodule(tree).setup("fit")
