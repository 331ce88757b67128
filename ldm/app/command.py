"""The command line: `python -m vfm_vae app FOLDER…`."""

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ldm.app.behind import Behind, find_device
from ldm.app.finding import find

DESCRIPTION = """\
Opens a page on this machine that reconstructs images, draws samples, and shows what lies between two of them.
Nothing leaves the machine, unless --host or --share let others in."""
FOLDER = """\
what to show: folders that save_pretrained wrote, runs' folders or checkpoints, a folder that holds several of these, or
owner/model on the Hugging Face hub; the demo's models, runs/demo/pretrained, if none is given"""
MAX_FILE_SIZE = "64mb"
DEBUG = "VFM_VAE_DEBUG"
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong; other command lines' `short_errors` would import torch first."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        fail(message)


def fail(message: str) -> NoReturn:
    """Ends the process with a line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves the page until it is interrupted, by the options of a command line; by default of this process's."""
    parser = Parser(prog="python -m vfm_vae app", description=DESCRIPTION)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=FOLDER)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at (%(default)s)")
    parser.add_argument("--share", action="store_true", help="ask gradio for a public link, through its server")
    parser.add_argument("--device", default="auto", help="device to compute on, such as cuda:1 (%(default)s)")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if not 1 <= options.port <= 65535:
            raise ValueError(f"--port: a number from 1 to 65535, given {options.port}")
        behind = Behind(find(options.folders), options.device)
        if options.device not in ("auto", "cpu"):
            find_device(options.device)
        signal.signal(signal.SIGTERM, _end)
        with tempfile.TemporaryDirectory(prefix="vfm_vae_app_") as folder:
            os.environ |= {"GRADIO_TEMP_DIR": folder} | QUIET
            serve(behind, options.host, options.port, options.share)
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        if os.environ.get(DEBUG):
            raise
        fail(" ".join(str(error).split()))


def serve(behind: Behind, host: str, port: int, share: bool = False) -> None:
    """Serves the page until the process is told to end.

    Args:
        behind: Reads the models.
        host: Address to listen at.
        port: Port to listen at.
        share: Whether to ask gradio for a public link.

    Raises:
        ValueError: if gradio is not installed, or nobody can listen there.
    """
    try:
        from ldm.app.page import Page
        from ldm.app.theme import CSS, theme
    except ModuleNotFoundError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'vfm-vae[app]'") from error
    page = Page(behind).build()
    try:
        page.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme(),
            css=CSS,
            max_file_size=MAX_FILE_SIZE,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ValueError(f"--host, --port: can't listen at {host}:{port} ({error}); give others") from error
    print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
    behind.start()
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Ends by SIGTERM as by Ctrl-C, but for the exit code: uploads are removed."""
    sys.exit(128 + number)
