"""Caches of latents with captions: the same embeddings as on the fly, however the cache came about."""

import json
import logging
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from safetensors.torch import load_file
from tiny_readers import Readers
from torch.nn.functional import avg_pool2d

from callbacks.texts import expected_size
from callbacks.writers import LatentWriter
from ldm.text import Captions
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentDataset
from vfm_vae.data.sampling import Draw
from vfm_vae.text import HashedWords
from vfm_vae.transformers_text import TransformersText
from vfm_vae.types import Encoded

CAPTIONS = {
    "a/0.png": ["a cat", "a small cat on the mat with a hat", "Kätzchen 🐈"],
    "a/1.png": [],
    "a/2.png": ["a rocket"],
    "b/3.png": ["a cup of coffee", "coffee"],
    "b/4.png": ["the moon"],
    "b/5.png": ["a disc", "night"],
    "b/6.png": ["a motorcycle"],
}
ALL = [captions or [""] for captions in CAPTIONS.values()]
TEXTS = {"text", "text_ends", "captions", "captions_ends", "image_ends"}


class Words(HashedWords):
    """Has a name, as encoders have whose weights lie somewhere, and notes what it embeds."""

    def __init__(self, name: str = "words", width: int = 8, max_tokens: int = 6):
        super().__init__(width, max_tokens)
        self.name, self.embedded = name, []

    def tokens(self, captions, device):
        self.embedded += captions
        return super().tokens(captions, device)


class Means(LightningModule):
    """Encodes images by the means of their parts."""

    predict, seed = "moments", 0

    def latent_identity(self):
        return {"fingerprint": "means", "channels": 3, "compression": 8}

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        means = avg_pool2d(batch.images / 255, 8)
        return Encoded({"moments": torch.cat([means, torch.ones_like(means)], 1)}, batch.labels, batch.index)


def write_images(root: Path, captions=CAPTIONS) -> Path:
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in captions:
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(root / split / name)
        lines = [json.dumps({"file_name": name, "text": texts}) + "\n" for name, texts in captions.items()]
        (root / split / "metadata.jsonl").write_text("".join(lines))
    return root


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "images")


def images_of(root, captions="text", **kwargs):
    options = {"image_size": 16, "batch_size": 2, "val_batch_size": 2, "num_workers": 0, "crop": "centre"}
    return ImageNetDataModule(root, captions=captions, **options | {"max_bad_fraction": 0.2} | kwargs)


@pytest.fixture
def predict(trainer, tmp_path, root):
    """Writes a cache of the images' validation split."""

    def run(folder="z", text=None, captions="text", module=None, shard_size=3, **kwargs):
        writer = LatentWriter(str(tmp_path / folder), shard_size=shard_size, text=text)
        trainer(writer).predict(module or Means(), images_of(root, captions, **kwargs))
        return tmp_path / folder / "val"

    return run


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same(ours, theirs):
    assert ours.captions == theirs.captions
    for name in ("embeddings", "mask", "empty"):
        one, two = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == two.dtype == (torch.bool if name == "mask" else torch.bfloat16) and torch.equal(one, two)


def test_a_cache_holds_what_an_encoder_makes_of_captions_on_the_fly(predict, root):
    encoder = Words()
    folder = predict(text=encoder, predict=["train", "val"])
    data = images_of(root)
    data.setup("fit")
    for train, images in ((True, data.train_set), (False, data.val_set)):
        cached = LatentDataset(folder.with_name("train" if train else "val"), train=train)
        assert [cached.captions_of(index) for index in range(7)] == ALL
        for epoch in (0, 1, 2):
            draws = [Draw(index, epoch) for index in range(7)]
            uncached = images.collate([images[draw] for draw in draws])
            batch = cached.collate([cached[draw] for draw in draws])
            assert_same(batch.text, encoder.encode(uncached.text.captions))
            ours, theirs = (Captions(encoder).of_batch(x) for x in (batch, uncached))
            assert torch.equal(ours.embeddings, theirs.embeddings) and torch.equal(ours.mask, theirs.mask)
            assert torch.equal(ours.null().embeddings, theirs.null().embeddings)
    notes = json.loads((folder / "latents.json").read_text())
    assert notes["text"] == cached.text_source == encoder.source() and notes["text"]["fingerprint"]
    assert len(notes["captions"]) == 64


def test_the_size_is_said_before_weights_are_read(predict, caplog, monkeypatch):
    encoder = Words()
    monkeypatch.setattr(encoder, "fingerprint", lambda: pytest.fail("read", pytrace=False))
    with caplog.at_level(logging.INFO), pytest.raises(pytest.fail.Exception, match="read"):
        predict(text=encoder)
    assert not encoder.embedded and "text: 11 captions of about 3 tokens: 0.0 MB in bfloat16" in caplog.text


def test_the_size_is_that_of_captions_spread_over_the_data():
    asked = []

    class Many:
        def __len__(self):
            return 1_281_167

        def captions_of(self, index):
            asked.append(index)
            return ["short", "long"]

    encoder = SimpleNamespace(width=2048, max_tokens=100, count=lambda texts: [100 * len(text) - 358 for text in texts])
    size = expected_size(encoder, [Many()])  # 100 tokens of 142 are left, and of 42 all
    assert size == "text: 2,562,334 captions of about 71 tokens: 745.2 GB in bfloat16; 50.0% are cut to 100 tokens"
    assert len(asked) == 1000 and asked[:2] == [0, 1282] and asked[-1] > 1_280_000


def test_a_damaged_image_has_no_captions(predict, root):
    (root / "val/a/1.png").write_bytes(b"no image")
    encoder = Words()
    folder = predict(text=encoder)
    cached = LatentDataset(folder, train=False)
    assert [cached.captions_of(index) for index in range(6)] == [ALL[0], *ALL[2:]]
    assert sorted(encoder.embedded) == sorted(["", *(caption for texts in (ALL[0], *ALL[2:]) for caption in texts)])
    shard = load_file(folder / "latents_shard00000.safetensors")
    assert len(shard["moments"]) == len(shard["image_ends"]) == 2


def test_a_cache_goes_on_as_it_was_begun(predict, root):
    folder = predict(text=Words())
    before = contents(folder)
    for name in ("latents_shard00001.safetensors", "latents_stats.pt", "text_empty.pt"):
        (folder / name).unlink()
    other = Words(name="elsewhere")
    predict(text=other, val_batch_size=3)
    assert contents(folder) == before
    assert sorted(other.embedded) == sorted([caption for captions in ALL[3:6] for caption in captions] + [""])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (Words(width=16), "holds embeddings of another text encoder than words at hand: its width is 8, here 16"),
        (HashedWords(8, 6), "holds embeddings of another text encoder than hashed_words at hand: its class_path is"),
        (None, "holds what was made otherwise: captions was '[0-9a-f]{64}', now None; text was {'class_path'"),
    ],
)
def test_a_cache_goes_on_with_no_other_encoder(predict, text, said):
    folder = predict(text=Words())
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"^directory: '.*z/val' {said}[^\n]*another[^\n]*$"):
        predict(text=text)
    assert contents(folder) == before


def test_a_cache_goes_on_with_no_other_captions(predict, root):
    predict(text=Words())
    file = root / "val/metadata.jsonl"
    file.write_text(file.read_text().replace("rocket", "racket"))
    with pytest.raises(ValueError, match=r"holds what was made otherwise: captions was '\w{64}', now '\w{64}'\. "):
        predict(text=Words())


def test_a_cache_of_tar_shards_goes_on_with_no_other_captions(predict, root):
    with tarfile.open(root / "images-val-0.tar", "w") as tar:
        for number in range(4):
            said = {"long": f"number {number} \ud83d", "short": [f"{number}", "it"]}  # and half of a character
            for ending, content in (("png", (root / "val/a/0.png").read_bytes()), ("json", json.dumps(said).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    folder = predict(text=Words(), captions="json.long", source="shards")
    cached = LatentDataset(folder, train=False)
    assert [cached.captions_of(index) for index in range(4)] == [[f"number {number} ?"] for number in range(4)]
    with pytest.raises(ValueError, match=r"holds what was made otherwise: captions was '\w{64}', now '\w{64}'\. "):
        predict(text=Words(), captions="json.short", source="shards")
    assert LatentDataset(predict("y", Words(), "json.short", source="shards"), False).captions_of(3) == ["3", "it"]


def test_a_tokenizer_encodes_images_that_have_captions(predict, tiny_module):
    module = tiny_module(predict="moments")
    folders = [predict(name, text, module=module, image_size=64) for name, text in (("a", Words()), ("b", None))]
    ours, plain = (load_file(folder / "latents_shard00002.safetensors") for folder in folders)
    assert ours.keys() - plain.keys() == TEXTS and torch.equal(ours["moments"], plain["moments"])


def test_images_without_captions_are_told(predict):
    with pytest.raises(ValueError, match=r"^data\.captions: the cache is to hold embeddings [^\n]*$"):
        predict(text=Words(), captions=None)


def test_embeddings_that_are_not_finite_are_refused(predict):
    encoder = Words()
    encoder.tokens = lambda captions, device: [torch.full((2, 8), torch.nan) for _ in captions]
    with pytest.raises(ValueError, match=r"^text: embeddings by words hold nan or inf; "):
        predict(text=encoder)


def test_a_cache_without_text_stays_as_it_was(predict):
    with_text, without, plain = predict("a", Words()), predict("b"), predict("c", captions=None)
    assert contents(without) == contents(plain)
    notes = [json.loads((folder / "latents.json").read_text()) for folder in (with_text, without)]
    assert {name: value for name, value in notes[0].items() if name not in ("text", "captions")} == notes[1]
    for file in without.glob("*.safetensors"):
        theirs, ours = load_file(file), load_file(with_text / file.name)
        assert ours.keys() - theirs.keys() == TEXTS
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (with_text / "latents_stats.pt").read_bytes() == (without / "latents_stats.pt").read_bytes()


@pytest.mark.slow
def test_a_language_model_embeds_captions_wherever_it_lies(predict, tmp_path):
    readers = Readers(tmp_path / "models")
    encoder = TransformersText(readers("qwen2_5_vl"), max_tokens=40, precision="float32")
    folder = predict(text=encoder)
    batch, images = LatentDataset(folder, train=False), [texts[0] for texts in ALL]
    text, alone = batch.collate([batch[index] for index in range(7)]).text, encoder.encode(images)
    assert text.captions == alone.captions and torch.equal(text.mask, alone.mask) and text.mask.sum() > 70
    assert torch.equal(text.empty, alone.empty) and text.embeddings.shape == (7, 40, encoder.width)
    torch.testing.assert_close(text.embeddings, alone.embeddings, rtol=2**-7, atol=1e-4)  # of another company
    before = contents(folder)
    for name in ("latents_shard00001.safetensors", "latents_stats.pt"):
        (folder / name).unlink()
    predict(text=TransformersText(str(readers.copy("qwen2_5_vl", "copy")), max_tokens=40, precision="float32"))
    assert contents(folder) == before
    with pytest.raises(ValueError, match=r"another text encoder than .*: its fingerprint is '\w{64}', here '\w{64}'; "):
        predict(text=TransformersText(readers("qwen2_5_vl", "b", seed=1), max_tokens=40, precision="float32"))


RANKS = """
import sys
from lightning.pytorch import Trainer
from test_text_writer import LatentWriter, Means, Words, images_of

devices, folder = int(sys.argv[1]), sys.argv[2]
writer = LatentWriter(f"{folder}/z{devices}", shard_size=2, text=Words())
run = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
              enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[writer])
run.predict(Means(), datamodule=images_of(f"{folder}/images"))
"""


@pytest.mark.slow
def test_two_processes_write_what_one_writes(root, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path}
    for devices in ("1", "2"):
        command = [sys.executable, str(script), devices, str(tmp_path)]
        streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        process = subprocess.run(command, env=environment, timeout=180, check=False, **streams)
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stderr.count("text: 11 captions of about 3 tokens: ") == 1
    assert contents(tmp_path / "z1/val") == contents(tmp_path / "z2/val")
