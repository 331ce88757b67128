"""What the page computes, without a browser and without gradio."""

import base64
import io
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from ldm import convert
from ldm.app import actions, finding, inputs, pictures
from ldm.app.between import images_between, spherical
from ldm.app.drawing import Order, Step, Stopped, as_ordered, draw, draw_between
from ldm.app.finding import Source, find
from ldm.app.models import Models, class_choices
from ldm.app.reconstructing import reconstruct
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Dopri5, Euler, EulerMaruyama, Heun
from ldm.text import Captions
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.files import read_image
from vfm_vae.metrics.reconstruction import ReconstructionMetrics
from vfm_vae.text import HashedWords

SIDE = 64


@pytest.fixture
def tokenizer(tiny_model):
    return tiny_model().eval()


def diffusion_on(tokenizer, network, **parts) -> LatentDiffusion:
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = LatentDiffusion(network, Euler(6, shift=0.3), Guidance(2.0, start=0.2), **parts).eval()
    model.normalization.take(LatentStatistics(torch.randn(1, 4, 1, 1), 1 + torch.rand(1, 4, 1, 1)))
    model.latent_source = tokenizer.latent_identity()
    return model.use_tokenizer(tokenizer)


@pytest.fixture
def diffusion(tokenizer) -> LatentDiffusion:
    return diffusion_on(
        tokenizer, LightningDiT(in_channels=4, input_size=8, depth=1, width=32, num_heads=2, num_classes=3)
    )


@pytest.fixture
def folder(tokenizer, diffusion, tmp_path) -> Path:
    """Holds both, and the diffusion model says what its classes are called."""
    tokenizer.save_pretrained(tmp_path / "pretrained/tokenizer")
    diffusion.name_classes(["ape", "bee", "cow"])
    diffusion.save_pretrained(tmp_path / "pretrained/ldm")
    return tmp_path


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(inputs_of(3)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def inputs_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8)


def last(steps):
    *_, found = steps
    return found


def test_finds_models_by_the_folders_that_hold_them(folder, monkeypatch):
    both = find([str(folder / "pretrained")])
    assert [source.name for source in both] == ["ldm", "tokenizer"]
    assert find([str(folder)]) == both  # a demo's folder, whose models are ready for use
    run_of = folder / "weak/checkpoints"
    run_of.mkdir(parents=True)
    (run_of / "last.ckpt").touch()
    assert find([str(folder / "weak"), str(run_of / "last.ckpt")]) == [Source("weak", str(run_of / "last.ckpt"))]
    monkeypatch.chdir(folder)
    assert find(["owner/model"]) == [Source("owner/model", "owner/model")]
    with pytest.raises(ValueError, match=r"no models are given.*make demo"):
        find([])
    (folder / "other/tokenizer").mkdir(parents=True)
    (folder / "other/tokenizer/config.json").touch()
    names = [source.name for source in find(["pretrained", "other"])]
    assert names == ["ldm", "pretrained/tokenizer", "other/tokenizer"]
    (folder / finding.DEFAULT).parent.mkdir(parents=True)
    (folder / "pretrained").rename(finding.DEFAULT)
    assert len(find([])) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "FOLDER: there is no folder 'nowhere'"),
        (["."], r"FOLDER: '\.' holds no model"),
        (["--port", "0"], "--port: a number from 1 to 65535, given 0"),
        (["--port", "many"], "--port: invalid int value: 'many'"),
        (["--prot", "1"], "unrecognized arguments: --prot"),
        ([], "no models are given.*make demo"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line(words, message, tmp_path):
    ended = run(tmp_path, "vfm_vae", "app", *words)
    assert ended.code == 2 and not ended.out
    assert re.match(rf"error: (argument )?{message}|error: .*{message}", ended.err) and ended.err.count("\n") == 1


def test_reads_models_and_brings_them_together(folder):
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text("{}")
    models = Models([*find([str(folder)]), Source("broken", str(folder / "broken"))])
    assert list(models.tokenizers) == ["tokenizer"] and list(models.diffusion) == ["ldm"]
    assert models.diffusion["ldm"].tokenizer.network is models.tokenizers["tokenizer"]
    assert len(models.problems) == 1 and models.problems[0].startswith("broken: ")
    assert models.sides() == ([64, 128, 256, 384, 512], 64)
    assert class_choices(models.diffusion["ldm"]) == [("0 ape", 0), ("1 bee", 1), ("2 cow", 2)]
    with pytest.raises(ValueError, match="broken: "):
        Models([Source("broken", str(folder / "broken"))])


def test_a_diffusion_model_without_its_tokenizer_is_left_out(folder, tiny_model):
    other = tiny_model()
    next(other.adapter.fuse.parameters()).data += 1
    other.save_pretrained(folder / "other")
    models = Models(find([str(folder / "pretrained/ldm"), str(folder / "other")]))
    assert not models.diffusion
    assert models.problems == ["ldm: none of the tokenizers makes its latents; give the one that does, too"]


def test_classes_are_numbers_where_nobody_has_named_them(tokenizer, diffusion):
    assert class_choices(diffusion) == [("0", 0), ("1", 1), ("2", 2)]
    with pytest.raises(ValueError, match="class_names: 2 names, but the model has 3 classes"):
        diffusion.name_classes(["ape", "bee"])
    network = LightningDiT(in_channels=4, input_size=8, depth=1, width=32, num_heads=2, num_classes=1000)
    assert class_choices(LatentDiffusion(network))[207] == ("207 golden retriever", 207)


def test_numbers_are_those_of_evaluation(tokenizer, photo):
    image = read_image(photo, SIDE)
    assert torch.equal(inputs.opened(inputs.Upload("photo.png", photo.read_bytes()), SIDE), image)
    found = reconstruct(tokenizer, image)
    metrics = ReconstructionMetrics()
    with torch.no_grad():
        z = tokenizer.encode(image).mode()
        expected = tokenizer.decode(z)
    metrics.update(expected.image, image)
    assert torch.equal(found.image, expected.image[0]) and torch.equal(found.latent, z[0])
    assert (found.psnr, found.ssim) == tuple(float(value) for value in metrics.compute().values())
    assert [part.shape[-1] for part in found.multiscale] == [32, 16, 8, 4]


def test_error_maps_count_levels():
    image = torch.full((3, 4, 4), -1.0)
    other = image.clone()
    other[:, 0, 0] = -1 + 2 * torch.tensor([30, 60, 90]) / 255
    errors = pictures.error_map(other, image)
    assert errors[0, 0] == 60 and errors.sum() == 60
    assert pictures.brightest([errors]) == 56 and pictures.brightest([torch.zeros(4, 4)]) == 8
    colours = pictures.coloured(errors, 60)
    assert colours[0, 0].sum() > 500 and colours[1, 1].sum() < 10


def test_a_latent_is_shown_by_its_principal_components():
    place = torch.linspace(-1, 1, 8)
    latent = torch.zeros(5, 8, 8)
    latent[3], latent[1] = 2 * place, place[:, None]  # the first component lies in columns, the second in rows
    latent += 1e-4 * torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))
    red, green, _ = pictures.principal(latent).transpose(2, 0, 1).astype(int)
    assert (np.diff(red, axis=1) >= 0).all() and red[0, 0] == 0 and red[0, 7] == 255
    assert (np.diff(green, axis=0) >= 0).all()
    assert pictures.principal(torch.ones(2, 4, 4)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    "sampler",
    [None, "Heun", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Euler", "EulerMaruyama", "Dopri5"))],
)
def test_samples_are_those_of_the_model_bit_for_bit(diffusion, sampler):
    kinds = {
        None: Euler(6, shift=0.3),
        "Euler": Euler(4, shift=0.3),
        "Heun": Heun(4, shift=0.3),
        "EulerMaruyama": EulerMaruyama(4, shift=0.3),
        "Dopri5": Dopri5(),
    }
    order = Order([0, 2, 2], None, 5, 3.0, 0.2, 1.0, sampler, None if sampler is None else 4)
    *steps, samples = draw(diffusion, order)
    diffusion.sampler = kinds[sampler]
    expected = diffusion.sample([0, 2, 2], seed=5, guidance_scale=3.0)
    assert torch.equal(samples.images, expected.images) and torch.equal(samples.latents, expected.latents)
    assert all(isinstance(step, Step) for step in steps)
    assert steps[0].frame.shape == (3, SIDE, SIDE) and 2 <= sum(step.frame is not None for step in steps) <= 7
    parts = [step.part for step in steps]
    assert sampler == "Dopri5" or (parts == sorted(parts) and parts[-1] == 1)


def test_the_interval_of_guidance_can_be_chosen(diffusion):
    order = Order([1], scale=3.0, start=0.5, end=0.6)
    assert (
        as_ordered(diffusion, order).guidance.settings() | {"scale": 3.0, "start": 0.5, "end": 0.6}
        == as_ordered(diffusion, order).guidance.settings()
    )
    assert (diffusion.guidance.scale, diffusion.sampler.steps) == (2.0, 6)  # which the model keeps
    with pytest.raises(ValueError, match="interval"):
        as_ordered(diffusion, order._replace(end=0.1))


def test_drawing_can_be_stopped(diffusion):
    stop, lock = threading.Event(), threading.Lock()
    steps = draw(diffusion, Order([0], steps=50), stop, lock)
    assert next(steps).done == 1
    stop.set()
    with pytest.raises(Stopped):
        list(steps)
    assert lock.acquire(timeout=10)  # and the model is free


def test_who_reads_no_further_stops_it(diffusion):
    stop, lock = threading.Event(), threading.Lock()
    steps = draw(diffusion, Order([0], steps=100), stop, lock)
    next(steps)
    steps.close()
    assert lock.acquire(timeout=10)


@pytest.mark.parametrize(
    "order, message",
    [
        (Order([]), "give a class or a prompt"),
        (Order([0] * 65), "65 samples at a time are too many"),
        (Order([7]), "the classes are 0 to 2"),
        (Order([0], seed=-1), "seed: must be at least 0"),
        (Order([0], steps=1), "steps: must be at least 2"),
        (Order([0], sampler="DDIM"), "sampler: one of Euler, Heun"),
    ],
)
def test_an_order_that_won_t_do_is_refused(diffusion, order, message):
    with pytest.raises(ValueError, match=message):
        list(draw(diffusion, order))


def test_between_two_classes_the_ends_are_their_samples(diffusion):
    samples = last(draw_between(diffusion, Order([0, 2], seed=4, scale=2.0, start=0.2), 3))
    ends = [diffusion.sample([label], seed=4).images[0] for label in (0, 2)]
    assert torch.allclose(samples.images[0], ends[0], atol=1e-5)
    assert torch.allclose(samples.images[2], ends[1], atol=1e-5)
    assert not torch.allclose(samples.images[1], ends[0], atol=1e-3)


def test_prompts_are_asked_for_likewise(tokenizer):
    network = TextLightningDiT(
        text_channels=8, in_channels=4, input_size=8, patch_size=2, depth=1, width=32, num_heads=2
    )
    model = diffusion_on(tokenizer, network, conditioning=Captions(HashedWords(8)))
    order = Order(prompts=["a cat", "a dog"], seed=1, scale=2.0, start=0.2)
    assert torch.equal(last(draw(model, order)).images, model.sample(prompts=["a cat", "a dog"], seed=1).images)
    assert len(last(draw_between(model, order, 3)).images) == 3
    assert actions.settings_of(model)["is_text"]


def test_between_two_images_the_ends_are_their_reconstructions(tokenizer):
    first, second = inputs.example("cat", SIDE), inputs.example("coffee", SIDE)
    for path in ("linear", "spherical"):
        images = images_between(tokenizer, first, second, 3, path)
        for place, image in ((0, first), (2, second)):
            assert torch.allclose(images[place], reconstruct(tokenizer, image).image.clamp(-1, 1), atol=1e-5)


def test_spherical_interpolation_keeps_to_the_sphere():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    assert torch.allclose(spherical(a, b, torch.tensor(0.5)), 4 * torch.ones(2) / 2**0.5)
    assert torch.allclose(spherical(a, a, torch.tensor(0.3)), a)


def test_the_page_s_html_holds_its_pictures(folder):
    models = Models(find([str(folder)]))
    content = actions.reconstructed(models, ["tokenizer"], None, "cat", SIDE)
    sources = re.findall(r'<img src="data:image/png;base64,([^"]+)"', content)
    assert len(sources) == 4 + 4 and "http" not in content
    assert Image.open(io.BytesIO(base64.b64decode(sources[0]))).size == (SIDE, SIDE)
    asked = actions.Asked("ldm", [1, 2], 2, 0, 2.0, 0.2, 1.0, "Euler", 4)
    *progress, shown = actions.generated(models, asked, threading.Event())
    assert "progressbar" in progress[0] and shown.count("<img") == 4 + 4 and "2 cow" in shown
    *_, between = actions.between_conditions(models, asked._replace(values=[0, 1]), 3, threading.Event())
    assert "0 ape" in between and "1 bee" in between and "0.50" in between
    ends = [(None, "cat"), (inputs.Upload("<b>.png", png(90, 70)), "")]
    assert "&lt;b&gt;.png" in actions.between_images(models, "tokenizer", ends, SIDE, 3, "linear")
    with pytest.raises(ValueError, match="choose a tokenizer"):
        actions.reconstructed(models, [], None, "cat", SIDE)
    assert "does not fit this tokenizer" in actions.reconstructed(models, ["tokenizer"], None, "cat", 68)


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_lines_and_points_are_images(size):
    assert inputs.opened(inputs.Upload("line.png", png(*size)), 256).shape == (1, 3, 256, 256)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"<html>no image</html>", "no image in a format that is known"),
        (png(300, 300)[:60], "can't be used: "),
    ],
)
def test_what_is_no_image_gets_one_line_and_is_off_the_disk(content, message, tmp_path):
    file = tmp_path / "upload/photo.jpg"
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^photo.jpg can't be used: .*{message}|^photo.jpg {message}"):
        inputs.take(file)
    assert not file.parent.exists()


def test_examples_are_the_middle_of_photographs():
    assert set(inputs.EXAMPLES) >= {"cat", "coffee"}
    assert inputs.example("cat", 256).shape == (1, 3, 256, 256)


def test_conversion_notes_what_classes_are_called(diffusion, tmp_path):
    for name in ("bee", "ape", "cow"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "names.txt").write_text("ape\nbee\ncow\n")
    for place in ("train", "names.txt"):
        diffusion.name_classes(convert._names(tmp_path / place))
        diffusion.save_pretrained(tmp_path / "model")
        assert LatentDiffusion.from_pretrained(tmp_path / "model").class_names == ["ape", "bee", "cow"]
    with pytest.raises(ValueError, match="class_names: there is no folder and no text file"):
        convert._names(tmp_path / "nowhere")
