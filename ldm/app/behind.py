"""What goes on behind the page: models are read in a thread, while the page is there already."""

import importlib
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ldm.app.finding import Source

ACTIONS = "ldm.app.actions"
FIRST_PAGE = 3.0  # seconds that reading waits for, as it would take the page's processor


class Behind:
    """Reads models in a thread, once the first page has been shown or does not come.

    This module imports nothing that takes long, neither torch nor what needs it.

    Args:
        sources: The models.
        device: Name of the device, or `auto` for a GPU where there is one.

    Attributes:
        state: What is being done, in a line.
    """

    def __init__(self, sources: Sequence[Source], device: str = "auto"):
        self.sources, self.device, self.state = sources, device, "starting"
        self.shown, self._done = threading.Event(), threading.Event()
        self._models: Any = None
        self._problem = ""

    def start(self) -> None:
        """Begins to read."""
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self, timeout: float) -> bool:
        """Waits so many seconds until models are read, or won't be; returns whether they are or won't."""
        return self._done.wait(timeout)

    def models(self) -> Any:
        """The models, an `ldm.app.models.Models`; waits for them.

        Raises:
            ValueError: if there are none.
        """
        self._done.wait()
        if self._problem:
            raise ValueError(self._problem)
        return self._models

    def actions(self) -> Any:
        """The module `ldm.app.actions`, once models are read; raises what `models` does."""
        self.models()
        return importlib.import_module(ACTIONS)

    def _read(self) -> None:
        self.shown.wait(FIRST_PAGE)
        try:
            self.state = "importing torch"
            device = find_device(self.device)
            models = importlib.import_module("ldm.app.models")
            importlib.import_module(ACTIONS)
            self._models = models.Models(self.sources, device, self._say)
            for problem in self._models.problems:
                print(f"left out: {problem}", file=sys.stderr, flush=True)
        except Exception as error:  # whatever it is, the page has to say it
            self._problem = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {self._problem}", file=sys.stderr, flush=True)
        finally:
            self._done.set()

    def _say(self, line: str) -> None:
        self.state = line


def find_device(name: str) -> Any:
    """The device of a name, of which `auto` is a GPU where there is one; imports torch.

    Raises:
        ValueError: if it can't be used here.
    """
    torch = importlib.import_module("torch")
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        cause = str(error).partition("\n")[0]
        raise ValueError(f"--device: {name!r} can't be used here ({cause}); give another, or leave it out") from error
    return device
