"""The controls of each tab, and how they are filled in once models are read."""

import html
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gradio as gr

SAMPLERS = [("Euler", "Euler"), ("Heun", "Heun"), ("Euler-Maruyama", "EulerMaruyama"), ("Dopri5 (adaptive)", "Dopri5")]
PROMPTS = "a cat, left\na flower, top"
SHOWN_AT_FIRST = 4  # tokenizers
HOW = ("sampler", "steps", "scale", "start", "end")  # controls of how samples are drawn, which models have options for

Said = Mapping[Any, Any]  # what controls say, by control


def header(state: str) -> str:
    """What stands above the tabs, as HTML."""
    return f'<div class="vv-head"><h1>VFM-VAE</h1><p id="state">{html.escape(state)}</p></div>'


def problem(error: ValueError) -> str:
    """What is wrong, in a line of HTML."""
    return f'<p class="vv-error" role="alert">{html.escape(" ".join(str(error).split()))}</p>'


class Controls(ABC):
    """The controls of a tab.

    Attributes:
        inputs: Those that what the tab shows depends on; what they say is a `Said`.
        of_models: Those that depend on which models there are.
    """

    inputs: set[Any]
    of_models: list[Any]

    @abstractmethod
    def filled(self, models: Any, actions: Any) -> dict[Any, Any]:
        """The controls that depend on models, with what they are to be, by `ldm.app.models.Models`."""


class Image:
    """Where an image comes from: a file that is uploaded, or an example, of those that come with the dependencies.

    Args:
        label: What the image is called.
        example: The example to begin with.
    """

    def __init__(self, label: str, example: str):
        self.first = example
        self.example = gr.Dropdown([example], value=example, label=label)
        self.upload = gr.File(label=label, show_label=False, file_types=["image"], height=100, elem_classes="vv-drop")
        self.said = gr.HTML(elem_classes="vv-said")
        self.kept = gr.State(None)

    def filled(self, actions: Any) -> dict[Any, Any]:
        """The examples that there are."""
        return {self.example: gr.Dropdown(list(actions.EXAMPLES), value=self.first)}


class Reconstruct(Controls):
    """The tab Reconstruct."""

    def __init__(self) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=250):
                self.image = Image("Image", "coffee")
                self.tokenizers = gr.CheckboxGroup([], label="Tokenizers")
                self.side = gr.Dropdown([64], value=64, label="Side in pixels (centre crop)")
            with gr.Column(scale=4, min_width=320):
                self.result = gr.HTML(elem_id="reconstruction")
        self.of_models = [self.tokenizers, self.side, self.image.example]
        self.inputs = {self.tokenizers, self.image.kept, self.image.example, self.side}

    def asked(self, said: Said) -> tuple[Any, ...]:
        """What the controls say, as `ldm.app.actions.reconstructed` takes it behind the models."""
        return said[self.tokenizers], said[self.image.kept], said[self.image.example], int(said[self.side])

    def filled(self, models: Any, actions: Any) -> dict[Any, Any]:
        """The tokenizers, and the sides that one of them takes."""
        names = list(models.tokenizers)
        sides, side = models.sides()
        return {
            self.tokenizers: gr.CheckboxGroup(names, value=names[:SHOWN_AT_FIRST], visible=len(names) > 1),
            self.side: gr.Dropdown(sides, value=side),
        } | self.image.filled(actions)


class Sampling(Controls):
    """What diffusion models are asked for, in two tabs."""

    model: Any
    of_model: list[Any]

    def make_options(self) -> None:
        """Makes the controls of how samples are drawn."""
        self.scale = slider(0, 10, 2, 0.1, "Guidance scale (1: none)")
        self.seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
        with gr.Accordion("Sampler, interval of guidance", open=False):
            self.sampler = gr.Dropdown(SAMPLERS, value="Euler", label="Sampler")
            self.steps = slider(2, 250, 50, 1, "Steps")
            self.start = slider(0, 1, 0, 0.005, "Guidance from t (0: noise)")
            self.end = slider(0, 1, 1, 0.005, "Guidance to t (1: data)")
        self.how = {name: getattr(self, name) for name in HOW}
        self.inputs = {self.model, self.seed, *self.how.values()}

    def how_of(self, settings: dict[str, Any]) -> dict[Any, Any]:
        """The controls of how samples are drawn, as a model's own options are."""
        return {control: settings[name] for name, control in self.how.items()}

    @abstractmethod
    def what(self, settings: dict[str, Any]) -> dict[Any, Any]:
        """The controls of what samples are of, for a model."""

    def settings(self, behind: Any, name: str) -> dict[Any, Any]:
        """All controls that depend on the chosen model."""
        settings = behind.actions().settings_of(behind.models().diffusion[name])
        return self.what(settings) | self.how_of(settings)

    def order(
        self, models: Any, actions: Any, said: Said, classes: Sequence[Any], prompts: Sequence[str], each: int = 1
    ) -> Any:
        """What the controls say, an `ldm.app.actions.Asked`.

        Raises:
            ValueError: if there is no model, or a control is empty.
        """
        name, seed = said[self.model], said[self.seed]
        if not name:
            raise ValueError("there is no diffusion model to draw with: give a folder of one, too")
        how = {option: said[control] for option, control in self.how.items()}
        if None in (seed, *how.values()):
            raise ValueError("seed, guidance, steps: fill all of them in")
        is_text = models.diffusion[name].conditioning.text_encoder is not None
        values = list(prompts) if is_text else [int(number) for number in classes]
        how |= {"scale": float(how["scale"]), "steps": int(how["steps"])}
        return actions.Asked(model=name, values=values, each=each, seed=int(seed), **how)

    def of_first(self, models: Any, actions: Any) -> dict[Any, Any]:
        """The choice of models, and all that depends on the first."""
        names = list(models.diffusion)
        if not names:
            return {self.model: gr.Dropdown([], value=None)}
        settings = actions.settings_of(models.diffusion[names[0]])
        chosen = gr.Dropdown(names, value=names[0], visible=len(names) > 1)
        return {self.model: chosen} | self.what(settings) | self.how_of(settings)


class Generate(Sampling):
    """The tab Generate."""

    def __init__(self) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=250):
                self.model = gr.Dropdown([], label="Diffusion model")
                self.classes = gr.Dropdown([], multiselect=True, label="Classes")
                self.prompts = gr.Textbox(PROMPTS, lines=2, label="Prompts, one a line", visible=False)
                self.each = slider(1, 16, 4, 1, "Samples of each")
                self.make_options()
                with gr.Row():
                    self.draw = gr.Button("Draw", variant="primary", min_width=80)
                    self.stop = gr.Button("Stop", min_width=80)
            with gr.Column(scale=4, min_width=320):
                self.result = gr.HTML(elem_id="samples")
        self.inputs |= {self.classes, self.prompts, self.each}
        self.of_model = [self.classes, self.prompts, *self.how.values()]
        self.of_models = [self.model, *self.of_model, self.result]

    def filled(self, models: Any, actions: Any) -> dict[Any, Any]:
        """The diffusion models; without any, how to come by one."""
        missing = {} if models.diffusion else {self.result: none()}
        return self.of_first(models, actions) | missing

    def what(self, settings: dict[str, Any]) -> dict[Any, Any]:
        """Classes, or prompts."""
        classes = settings["classes"]
        first = [number for _, number in classes[:1]]
        return {
            self.classes: gr.Dropdown(classes, value=first, visible=not settings["is_text"]),
            self.prompts: gr.Textbox(visible=settings["is_text"]),
        }

    def asked(self, models: Any, actions: Any, said: Said) -> Any:
        """What the controls say, an `ldm.app.actions.Asked`; raises what `order` does."""
        prompts = lines(said[self.prompts])
        return self.order(models, actions, said, said[self.classes] or [], prompts, int(said[self.each]))


class Between(Sampling):
    """The tab Between."""

    IMAGES: ClassVar = "images"
    CONDITIONS: ClassVar = "classes or prompts"

    def __init__(self) -> None:
        with gr.Row():
            with gr.Column(scale=1, min_width=250):
                self.kind = gr.Radio([self.IMAGES, self.CONDITIONS], value=self.IMAGES, label="Between two")
                self.count = slider(3, 18, 9, 1, "Images, with both ends")
                with gr.Column() as images:
                    self._make_images()
                with gr.Column(visible=False) as conditions:
                    self._make_conditions()
                with gr.Row():
                    self.show = gr.Button("Show", variant="primary", min_width=80)
                    self.stop = gr.Button("Stop", min_width=80, visible=False)
            with gr.Column(scale=4, min_width=320):
                self.result = gr.HTML(elem_id="between")
        self.groups = [images, conditions, self.stop]
        examples = [end.example for end in self.ends]
        kept = [end.kept for end in self.ends]
        self.of_images = {self.tokenizer, *kept, *examples, self.side, self.count, self.path}
        self.inputs |= {self.kind, *self.of_images, *self.classes, *self.prompts}
        self.of_model = [*self.classes, *self.prompts, *self.how.values()]
        self.of_models = [self.tokenizer, self.side, *examples, self.model, *self.of_model]

    def _make_images(self) -> None:
        self.ends = [Image("First image", "cat"), Image("Second image", "coffee")]
        self.tokenizer = gr.Dropdown([], label="Tokenizer")
        self.side = gr.Dropdown([64], value=64, label="Side in pixels (centre crop)")
        self.path = gr.Radio(["linear", "spherical"], value="linear", label="Interpolation in the latent")

    def _make_conditions(self) -> None:
        self.model = gr.Dropdown([], label="Diffusion model")
        self.classes = [gr.Dropdown([], label=f"{which} class") for which in ("First", "Second")]
        texts = PROMPTS.splitlines()
        self.prompts = [
            gr.Textbox(text, label=f"{which} prompt", visible=False)
            for which, text in zip(("First", "Second"), texts, strict=True)
        ]
        self.make_options()

    def shown(self, kind: str) -> list[Any]:
        """Which groups of controls are seen."""
        is_images = kind == self.IMAGES
        return [gr.Column(visible=is_images), gr.Column(visible=not is_images), gr.Button(visible=not is_images)]

    def filled(self, models: Any, actions: Any) -> dict[Any, Any]:
        """The models."""
        names = list(models.tokenizers)
        sides, side = models.sides()
        return {
            self.tokenizer: gr.Dropdown(names, value=names[0], visible=len(names) > 1),
            self.side: gr.Dropdown(sides, value=side),
            **self.ends[0].filled(actions),
            **self.ends[1].filled(actions),
        } | self.of_first(models, actions)

    def what(self, settings: dict[str, Any]) -> dict[Any, Any]:
        """Two classes, or two prompts."""
        classes, is_text = settings["classes"], settings["is_text"]
        numbers = [number for _, number in classes] or [None]
        chosen = (numbers[0], numbers[min(1, len(numbers) - 1)])
        return {
            control: gr.Dropdown(classes, value=value, visible=not is_text)
            for control, value in zip(self.classes, chosen, strict=True)
        } | {control: gr.Textbox(visible=is_text) for control in self.prompts}

    def of_two_images(self, said: Said) -> tuple[Any, ...]:
        """What the controls of two images say, as `ldm.app.actions.between_images` takes it behind the models."""
        ends = [(said[end.kept], said[end.example]) for end in self.ends]
        return said[self.tokenizer], ends, int(said[self.side]), int(said[self.count]), said[self.path]

    def of_two_conditions(self, models: Any, actions: Any, said: Said) -> tuple[Any, int]:
        """What the controls of two conditions say, an `ldm.app.actions.Asked`, and how many images are wanted.

        Raises:
            ValueError: as `order` does; if there are not two.
        """
        classes = [said[control] for control in self.classes if said[control] is not None]
        prompts = [text for text in (said[control] or "" for control in self.prompts) if text.strip()]
        found = self.order(models, actions, said, classes, prompts)
        if len(found.values) != 2:
            raise ValueError("give two, one for each end")
        return found, int(said[self.count])


def slider(low: float, high: float, value: float, step: float, label: str) -> Any:
    """A slider with its number, and no button beside that."""
    return gr.Slider(low, high, value=value, step=step, label=label, buttons=[])


def lines(text: str | None) -> list[str]:
    """The lines of a text that say something."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def none() -> str:
    """What is said where there are no diffusion models, as HTML."""
    told = "No diffusion model was given. Start the page with a folder of one, too; <code>make demo</code> trains one."
    return f'<p class="vv-note">{told}</p>'
