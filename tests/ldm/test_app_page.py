"""The page as a person sees it: the real command in its own process, clicked through in headless Chromium.

`APP_MODELS=folder APP_PICTURES=folder` shows other models and keeps pictures of the tabs: so docs/app was made.
"""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import chromium, needs_chromium
from PIL import Image

from ldm.app.drawing import Order, draw
from ldm.app.pictures import address, pixels
from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

pytestmark = needs_chromium
PICTURES = os.environ.get("APP_PICTURES")
# What must hold, in seconds on two idle cores. On a machine that is busy with other things, as the load average tells,
# the seconds of a processor that the server takes meanwhile must.
FIRST_PAGE, RECONSTRUCTION, PROGRESS = 5.0, 2.0, 1.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of random weights, a second one, and a diffusion model on the first, whose classes have names."""
    if os.environ.get("APP_MODELS"):
        return Path(os.environ["APP_MODELS"])
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    adapter = Adapter([128, 128], [8, 8], latent_channels=4, unshuffle=1, decoded_channels=16, alignment_channels=128)
    sizes = {"attention_depths": [1], "num_res_blocks": 0, "w_channels": 16}
    decoder = Decoder(16, channels=[16, 16, 16, 16, 8], route_channels=[16, 16, 16], **sizes)
    tokenizer = VFMVAE(adapter, decoder, FrozenVFM("vit_photos_patch8_64", layers=[0, -1])).eval()
    tokenizer.save_pretrained(root / "a")
    tokenizer.save_pretrained(root / "b")
    network = LightningDiT(in_channels=4, input_size=8, depth=2, width=32, num_heads=2, num_classes=13)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = LatentDiffusion(network, Euler(26))
    model.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
    model.latent_source = tokenizer.latent_identity()
    model.name_classes([f"class <{number}>" for number in range(13)])
    model.save_pretrained(root / "ldm")
    return root


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uploads that can't be used, and odd ones that can."""
    root = tmp_path_factory.mktemp("uploads")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
    (root / "empty.jpg").write_bytes(b"")
    (root / "bomb.png").write_bytes(bomb(30000))
    cut = BytesIO()
    photo.save(cut, format="JPEG")
    (root / "cut.jpg").write_bytes(cut.getvalue()[:900])
    (root / "page.jpg").write_text("<html><script>alert(1)</script></html>")
    (root / "text.png").write_text("no image")
    Image.fromarray(np.full((9, 9), 70000, np.int32)).save(root / "32 bits.tiff")
    photo.convert("CMYK").save(root / "cmyk.jpg")
    photo.resize((1, 1)).save(root / "pixel.png")
    photo.save(root / "moving.gif", save_all=True, append_images=[photo.rotate(90)])
    Image.fromarray(np.full((70, 70), 40000, np.uint16)).save(root / "16 bits.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(root / "turned.jpg", exif=turned)
    return root


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes with so many black pixels a side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


class Served:
    """The command in its own process.

    Attributes:
        address: Of the page.
        begun: When it was started, as `time.monotonic` says it.
        folder: For its temporary files.
    """

    def __init__(self, models: Path, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.folder = f"http://127.0.0.1:{port}", folder
        self.begun = time.monotonic()
        command = [sys.executable, "-m", "vfm_vae", "app", str(models), "--port", str(port)]
        environment = os.environ | {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def wait(self) -> None:
        """Waits until the server answers."""
        while True:
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, self.process.communicate()[1]
                time.sleep(0.02)

    def processor(self) -> float:
        """Seconds of a processor that the server has taken so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def note(self, what: str, since: tuple[float, float], limit: float) -> None:
        """Says how long something took, and checks that.

        Args:
            what: What it is.
            since: When it began, and what `processor` said then.
            limit: Seconds that it may take.
        """
        took, computed = time.monotonic() - since[0], self.processor() - since[1]
        load = os.getloadavg()[0]
        print(f"{what} after {took:.2f} s, {computed:.2f} s of a processor; load {load:.1f}")
        assert (took if load <= (os.cpu_count() or 1) else min(took, computed)) < limit, what

    def files(self) -> list[Path]:
        """Uploads that lie on the disk, and have anything in them."""
        return [file for file in self.folder.rglob("*") if file.is_file() and file.stat().st_size]


@pytest.fixture(scope="module")
def opened(models, tmp_path_factory) -> Iterator[tuple]:
    """The page in Chromium, what it did that it should not have, and its server."""
    with chromium() as (page, seen):
        served = Served(models, tmp_path_factory.mktemp("temporary"))
        try:
            page.set_default_timeout(180_000)
            served.wait()
            page.goto(served.address)
            page.get_by_role("tab", name="Generate").wait_for()
            served.note("the first page", (served.begun, 0), FIRST_PAGE)
            yield page, seen, served
        finally:
            served.process.send_signal(signal.SIGINT)
            said = served.process.communicate(timeout=120)[1]
    assert served.process.returncode == 0 and said == ""
    assert not list(served.folder.iterdir())  # uploads are gone with it


def keep(page, name: str) -> None:
    """Keeps a picture, and one each of a phone and in the dark, where that is asked for."""
    if PICTURES is None:
        return
    Path(PICTURES).mkdir(parents=True, exist_ok=True)
    for kind, width, scheme in (("", 1280, "light"), ("_dark", 1280, "dark"), ("_phone", 390, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.mouse.move(0, 0)
        time.sleep(0.5)
        page.screenshot(path=Path(PICTURES, f"{name}{kind}.png"), full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


def tab(page, name: str):
    page.get_by_role("tab", name=name).click()
    return page.locator("[role=tabpanel]:visible")


def test_the_page_comes_soon_and_fills_itself(opened):
    page, _, _ = opened
    page.locator("#reconstruction figure").first.wait_for()
    assert "tokenizer" in page.locator("#state").inner_text()


def test_a_reconstruction_is_there_soon(opened):
    page, _, served = opened
    from playwright.sync_api import expect

    part = tab(page, "Reconstruct")
    result = page.locator("#reconstruction")
    part.get_by_label("Image", exact=True).click()
    begun = time.monotonic(), served.processor()
    page.get_by_role("option", name="astronaut").click()
    result.get_by_text("astronaut, 64 x 64").first.wait_for()
    served.note("a reconstruction", begun, RECONSTRUCTION)
    assert re.search(r"PSNR \d+\.\d\d dB · SSIM -?0\.\d{3} · latent \d+ x 8 x 8", result.inner_text())
    keep(page, "reconstruct")
    boxes, rows = part.get_by_role("checkbox"), result.locator(".vv-four")
    if (count := rows.count()) > 1:
        boxes.last.uncheck()
        expect(rows).to_have_count(count - 1, timeout=180_000)


def upload(page, part, file: Path) -> str:
    """Uploads a file; returns the line that the page says of it, or nothing."""
    said, result = part.locator(".vv-error"), page.locator("#reconstruction")
    part.locator("input[type=file]").set_input_files(file)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if lines := [line for line in said.all_inner_texts() if file.name in line]:
            return lines[0]
        if f"{file.name}, 64 x 64" in result.inner_text():
            assert not said.count()
            return ""
        time.sleep(0.02)
    raise AssertionError(f"nothing is said of {file.name}")


def test_bad_uploads_get_a_line_each_and_it_goes_on(opened, bad_files):
    page, _, served = opened
    part = tab(page, "Reconstruct")
    expected = {
        "empty.jpg": "the file is empty",
        "bomb.png": "exceeds limit",
        "cut.jpg": "truncated",
        "page.jpg": "no image in a format that is known",
        "text.png": "no image in a format that is known",
        "32 bits.tiff": "pixels of 32 bits",
        "cmyk.jpg": "",
        "pixel.png": "",
        "moving.gif": "",
        "16 bits.png": "",
        "turned.jpg": "",
    }
    for name, message in expected.items():
        line = upload(page, part, bad_files / name)
        assert message in line and "\n" not in line, (name, line)
        assert bool(line) == bool(message), (name, line)
    assert not served.files()  # none of them stays on the disk


def test_samples_show_their_progress_and_are_the_model_s(opened, models):
    page, _, served = opened
    part, result = tab(page, "Generate"), page.locator("#samples")
    begun = time.monotonic(), served.processor()
    part.get_by_role("button", name="Draw").click()
    page.locator("#samples [role=progressbar]").wait_for()
    served.note("progress", begun, PROGRESS)
    result.get_by_text("Samples").wait_for()
    assert result.locator("figure").count() == 4 + 8
    shown = result.locator("img").first.get_attribute("src")
    tokenizer = min(folder for folder in models.iterdir() if folder.name != "ldm")
    model = LatentDiffusion.from_pretrained(models / "ldm", tokenizer=tokenizer)

    *_, samples = draw(model, Order([0] * 4, seed=0, scale=2.0))
    assert shown == address(pixels(samples.images[0]))
    keep(page, "generate")


def test_sampling_can_be_stopped(opened):
    page, _, _ = opened
    part, result = tab(page, "Generate"), page.locator("#samples")
    part.get_by_text("Sampler, interval of guidance").click()
    part.get_by_label("number input for Steps").fill("250")
    part.get_by_label("number input for Samples of each").fill("16")
    part.get_by_role("button", name="Draw").click()
    result.get_by_text("evaluation").wait_for()
    part.get_by_role("button", name="Stop").click()
    result.get_by_text("stopped").wait_for()


def test_between_two_of_each(opened, bad_files):
    page, _, _ = opened
    part, result = tab(page, "Between"), page.locator("#between")
    part.get_by_role("button", name="Show").click()
    result.get_by_text("linear in the latent").wait_for()
    assert result.locator("figure").count() == 9
    keep(page, "between")
    part.locator("input[type=file]").nth(1).set_input_files(bad_files / "cmyk.jpg")
    result.get_by_text("cmyk.jpg").wait_for()
    part.get_by_label("classes or prompts").check()
    part.get_by_role("button", name="Show").click()
    result.get_by_text("the same noise").wait_for()
    assert result.locator("figure").count() == 9 + 8


def test_two_people_draw_at_once(opened):
    page, _, served = opened
    other = page.context.browser.new_page()
    other.goto(served.address)
    other.locator("#reconstruction figure").first.wait_for()
    both = [page, other]
    for each in both:
        part = tab(each, "Generate")
        part.get_by_label("number input for Samples of each").fill("2")
        part.get_by_role("button", name="Draw").click()
    for each in both:
        each.locator("#samples").get_by_text("Samples").wait_for()
        assert each.locator("#samples figure").count() == 2 + 8
    other.close()


def test_no_errors_and_nothing_from_abroad(opened):
    _, seen, _ = opened
    assert not seen.abroad
    assert not seen.errors
