"""The page: controls, and which of them starts what. Everything is computed elsewhere, see `ldm.app.actions`."""

import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ldm.app.behind import Behind
from ldm.app.controls import Between, Controls, Generate, Image, Reconstruct, header, problem

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
                    first = Reconstruct()
                with gr.Tab("Generate"):
                    second = Generate()
                with gr.Tab("Between"):
                    third = Between()
            self._connect_reconstruct(first)
            self._connect_generate(second)
            self._connect_between(third)
            ready = [status, *first.of_models, *second.of_models, *third.of_models]
            controls = (first, second, third)

            def load() -> Iterator[dict[Any, Any]]:  # gradio looks whether it is a generator
                yield from self._load(status, controls)

            loaded = page.load(load, None, ready, **AT_ONCE)
            loaded.success(self._reconstruct, first.inputs, first.result, **COMPUTE)
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
        counts = f"{len(models.tokenizers)} tokenizer(s), {len(models.diffusion)} diffusion model(s){where}"
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
            upload = self.behind.actions().uploaded(path)
        except ValueError as error:
            return None, gr.skip(), gr.skip(), problem(error)
        return None, None, upload, ""

    def _connect_image(self, image: Image, then: Any, inputs: Any, result: Any) -> None:
        """An uploaded image, or a chosen example in its place, starts the tab's computation."""
        kept, said = image.kept, image.said
        taken = image.upload.upload(self._take, image.upload, [image.upload, image.example, kept, said], **AT_ONCE)
        taken.then(self._if_taken(then), [said, *inputs], result, **COMPUTE)
        chosen = image.example.input(lambda: (None, ""), None, [kept, said], **AT_ONCE)
        chosen.then(then, inputs, result, **COMPUTE)

    @staticmethod
    def _if_taken(then: Any) -> Any:
        return lambda said, *values: gr.skip() if said else then(*values)

    def _connect_reconstruct(self, tab: Reconstruct) -> None:
        self._connect_image(tab.image, self._reconstruct, tab.inputs, tab.result)
        for control in (tab.tokenizers, tab.side):
            control.input(self._reconstruct, tab.inputs, tab.result, **COMPUTE)

    def _reconstruct(self, names: list[str], kept: Any, example: str, side: int) -> str:
        try:
            models = self.behind.models()
            return str(self.behind.actions().reconstructed(models, names, kept, example, int(side)))
        except ValueError as error:
            return problem(error)

    def _connect_generate(self, tab: Generate) -> None:
        tab.model.input(lambda name: tab.settings(self.behind, name), tab.model, tab.of_model, **AT_ONCE)
        drawn = [tab.draw.click, tab.prompts.submit]
        for event in drawn:
            event(self._generate, tab.inputs, tab.result, **COMPUTE)
        tab.stop.click(self._stop, None, None, queue=False, **PRIVATE)

    def _generate(self, request: gr.Request, *values: Any) -> Iterator[str]:
        stop = self._stopper(request)
        try:
            models, actions = self.behind.models(), self.behind.actions()
            yield from actions.generated(models, Generate.asked(actions, models, *values), stop)
        except ValueError as error:
            yield problem(error)
        finally:
            stop.set()

    def _connect_between(self, tab: Between) -> None:
        for end in tab.ends:
            self._connect_image(end, self._between_images, tab.of_images, tab.result)
        for control in (tab.tokenizer, tab.side, tab.path):
            control.input(self._between_images, tab.of_images, tab.result, **COMPUTE)
        tab.kind.input(tab.shown, tab.kind, tab.groups, **AT_ONCE)
        tab.model.input(lambda name: tab.settings(self.behind, name), tab.model, tab.of_model, **AT_ONCE)
        tab.show.click(self._between, tab.inputs, tab.result, **COMPUTE)
        tab.stop.click(self._stop, None, None, queue=False, **PRIVATE)

    def _between_images(self, *values: Any) -> str:
        try:
            models, actions = self.behind.models(), self.behind.actions()
            return str(actions.between_images(models, *Between.of_two_images(*values)))
        except ValueError as error:
            return problem(error)

    def _between(self, request: gr.Request, kind: str, *values: Any) -> Iterator[str]:
        images = values[: Between.NUM_OF_IMAGES]
        if kind == Between.IMAGES:
            yield self._between_images(*images)
            return
        stop = self._stopper(request)
        try:
            models, actions = self.behind.models(), self.behind.actions()
            asked, count = Between.asked(actions, models, *values)
            yield from actions.between_conditions(models, asked, count, stop)
        except ValueError as error:
            yield problem(error)
        finally:
            stop.set()
