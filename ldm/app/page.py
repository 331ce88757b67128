"""The page: controls, and which of them starts what. Everything is computed elsewhere, see `ldm.app.actions`."""

import threading
from collections.abc import Iterator, Sized
from typing import Any

import gradio as gr

from ldm.app.behind import Behind
from ldm.app.controls import Between, Controls, Generate, Image, Reconstruct, Said, header, problem

MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}  # one at a time, the others queue
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
COMPUTE = PRIVATE | MODEL
AT_ONCE = PRIVATE | {"concurrency_limit": None}
NOT_YET = 0.3  # seconds between looks at whether models are read


class Page:
    """Makes the page, and answers it.

    Args:
        behind: Reads the models.
    """

    def __init__(self, behind: Behind):
        self.behind = behind
        self._stops: dict[str, threading.Event] = {}

    def build(self) -> Any:
        """The page, a `gradio.Blocks`."""
        with gr.Blocks(title="VFM-VAE", analytics_enabled=False, delete_cache=(60, 600)) as page:
            status = gr.HTML(header("starting"))
            with gr.Tabs():
                with gr.Tab("Reconstruct"):
                    self.reconstruct = Reconstruct()
                with gr.Tab("Generate"):
                    self.generate = Generate()
                with gr.Tab("Between"):
                    self.between = Between()
            self._connect_reconstruct()
            self._connect_generate()
            self._connect_between()
            controls = (self.reconstruct, self.generate, self.between)
            ready = [status, *(control for part in controls for control in part.of_models)]

            def load() -> Iterator[dict[Any, Any]]:  # gradio looks whether it is a generator
                yield from self._load(status, controls)

            loaded = page.load(load, None, ready, **AT_ONCE)
            loaded.success(self._reconstruct, self.reconstruct.inputs, self.reconstruct.result, **COMPUTE)
            page.unload(self._leave)
        return page

    def _load(self, status: Any, controls: tuple[Controls, ...]) -> Iterator[dict[Any, Any]]:
        """Says what is being read, then fills the controls in."""
        self.behind.shown.set()
        while not self.behind.wait(NOT_YET):
            yield {status: header(f"loading: {self.behind.state}")}
        try:
            models, actions = self.behind.models(), self.behind.actions()
        except ValueError as error:
            yield {status: header("") + problem(error)}
            return
        told = "".join(problem(ValueError(f"left out: {line}")) for line in models.problems)
        where = "" if models.device.type == "cpu" else f" on {models.device}"
        found = counted(models.tokenizers, "tokenizer"), counted(models.diffusion, "diffusion model")
        counts = f"{', '.join(found)}{where}"
        filled = {status: header(counts) + told}
        for part in controls:
            filled |= part.filled(models, actions)
        yield filled

    def _leave(self, request: gr.Request) -> None:
        """Whoever closes the page wants no samples any more."""
        self._stop(request)
        self._stops.pop(str(request.session_hash), None)

    def _stop(self, request: gr.Request) -> None:
        if (stop := self._stops.get(str(request.session_hash))) is not None:
            stop.set()

    def _stopper(self, request: gr.Request) -> threading.Event:
        """What ends the sampling that a page starts now; what it had started before ends."""
        self._stop(request)
        stop = self._stops[str(request.session_hash)] = threading.Event()
        return stop

    def _take(self, path: str) -> tuple[Any, Any, Any, str]:
        """An uploaded file: the empty control again, no example, its content, and what is wrong with it."""
        try:
            upload = self.behind.actions().take(path)
        except ValueError as error:
            return None, gr.skip(), gr.skip(), problem(error)
        return None, None, upload, ""

    def _connect_image(self, image: Image, then: Any, inputs: set[Any], result: Any) -> None:
        """An uploaded image, or a chosen example in its place, starts the tab's computation."""
        kept, said = image.kept, image.said
        taken = image.upload.upload(self._take, image.upload, [image.upload, image.example, kept, said], **AT_ONCE)
        taken.then(lambda told: gr.skip() if told[said] else then(told), {said, *inputs}, result, **COMPUTE)
        chosen = image.example.input(lambda: (None, ""), None, [kept, said], **AT_ONCE)
        chosen.then(then, inputs, result, **COMPUTE)

    def _connect_reconstruct(self) -> None:
        tab = self.reconstruct
        self._connect_image(tab.image, self._reconstruct, tab.inputs, tab.result)
        for control in (tab.tokenizers, tab.side):
            control.input(self._reconstruct, tab.inputs, tab.result, **COMPUTE)

    def _reconstruct(self, said: Said) -> str:
        try:
            models = self.behind.models()
            return str(self.behind.actions().reconstructed(models, *self.reconstruct.asked(said)))
        except ValueError as error:
            return problem(error)

    def _connect_generate(self) -> None:
        tab = self.generate
        tab.model.input(lambda name: tab.settings(self.behind, name), tab.model, tab.of_model, **AT_ONCE)
        for event in (tab.draw.click, tab.prompts.submit):
            event(self._generate, tab.inputs, tab.result, **COMPUTE)
        tab.stop.click(self._stop, None, None, queue=False, **PRIVATE)

    def _generate(self, request: gr.Request, said: Said) -> Iterator[str]:
        stop = self._stopper(request)
        try:
            models, actions = self.behind.models(), self.behind.actions()
            yield from actions.generated(models, self.generate.asked(models, actions, said), stop)
        except ValueError as error:
            yield problem(error)
        finally:
            stop.set()

    def _connect_between(self) -> None:
        tab = self.between
        for end in tab.ends:
            self._connect_image(end, self._between_images, tab.of_images, tab.result)
        for control in (tab.tokenizer, tab.side, tab.path):
            control.input(self._between_images, tab.of_images, tab.result, **COMPUTE)
        tab.kind.input(tab.shown, tab.kind, tab.groups, **AT_ONCE)
        tab.model.input(lambda name: tab.settings(self.behind, name), tab.model, tab.of_model, **AT_ONCE)
        tab.show.click(self._between, tab.inputs, tab.result, **COMPUTE)
        tab.stop.click(self._stop, None, None, queue=False, **PRIVATE)

    def _between_images(self, said: Said) -> str:
        try:
            models, actions = self.behind.models(), self.behind.actions()
            return str(actions.between_images(models, *self.between.of_two_images(said)))
        except ValueError as error:
            return problem(error)

    def _between(self, request: gr.Request, said: Said) -> Iterator[str]:
        if said[self.between.kind] == Between.IMAGES:
            yield self._between_images(said)
            return
        stop = self._stopper(request)
        try:
            models, actions = self.behind.models(), self.behind.actions()
            asked, count = self.between.of_two_conditions(models, actions, said)
            yield from actions.between_conditions(models, asked, count, stop)
        except ValueError as error:
            yield problem(error)
        finally:
            stop.set()


def counted(things: Sized, name: str) -> str:
    """How many there are, such as `2 tokenizers`."""
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"
