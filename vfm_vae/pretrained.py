"""Models as folders, on disk or on the Hugging Face hub: safetensors, `config.json` and a model card.

`config.json` holds `format_version`, the `model` as configs have it (`class_path` and `init_args`), and what else the
kind of model needs. Nothing in a folder is unpickled, and only classes of this project, or of the package of a class
that the caller gives, are built from one; other VFMs and parts are, if their modules were imported before.
A checkpoint may also have modules imported, but of others' classes only `Described` ones are built from it.

`huggingface_hub.ModelHubMixin` is no base for it: saving, it removes the former `config.json` before the new weights
are written, and reading, it takes entries of `config.json` for arguments before anything has checked them. What it
offers of the hub (`cache_dir`, `local_files_only`, `create_pr`, …) is passed on here, too.
"""

import inspect
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from torch import Tensor

from vfm_vae.checkpoints import fill, read_json, read_weights
from vfm_vae.derived import complete
from vfm_vae.description import Described, class_at, class_path, describe, is_imported, named_classes
from vfm_vae.former import upgrade
from vfm_vae.schema import TOKENIZER, Kind, read
from vfm_vae.writing import put_tensors, whole_file

FORMAT_VERSION = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PACKAGES = ("vfm_vae", "ldm")
HUB_OPTIONS = frozenset(inspect.signature(snapshot_download).parameters) - {"repo_id"}

# Options that take anything, such as a VFM's `model_args`, keep a description as the plain data that it is.
set_parsing_settings(instantiate_subclass_spec_in_any=False)


def build(base: type, description: Mapping[str, Any], place: str = "description:") -> Any:
    """Makes the object that a description, see `describe`, stands for.

    Args:
        base: The class that it has to be of.
        description: Plain data, as from a config or a checkpoint.
        place: Says in messages what the description is of.

    Raises:
        ArgumentError: if class and arguments do not fit.
        ValueError: if it asks for a class that is no part of a model.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "model", required=True)
    model = upgrade(json.loads(json.dumps(description)))
    # The parser checks the outermost class, which has to be of `base`.
    check_classes(place, model.get("init_args"), class_at(str(model.get("class_path")), place))
    try:
        return parser.instantiate_classes(parser.parse_object({"model": complete(model)})).model
    except ValueError as error:  # of an optional part the parser says first that it is not None
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise cause from cause.__cause__
        raise


def check_classes(
    place: str, description: Any, hint: Any = Any, packages: Collection[str] = PACKAGES, imports: bool = True
) -> None:
    """Checks that a description names only classes that may be built, before any of them is asked for anything.

    Args:
        place: Begins the message.
        description: Plain data.
        hint: What the description is for, see `named_classes`.
        packages: Packages all of whose classes may be built; classes of others have to be `Described`.
        imports: Whether modules of others may be imported for it.

    Raises:
        ValueError: if it names another class, or one that does not exist.
    """
    for path in named_classes(description, hint):
        if imports or path.partition(".")[0] in packages or is_imported(path):
            cls: Any = class_at(path, place)
            # A module also has names of classes that it has imported from elsewhere.
            if isinstance(cls, type) and (cls.__module__.partition(".")[0] in packages or issubclass(cls, Described)):
                continue
        raise ValueError(
            f"{place} asks for {[path]}, but only classes of this project are built, and parts of models "
            + (
                "that derive from vfm_vae.description.Described"
                if imports
                else "from modules that were imported before; give a tokenizer of others by its class "
                "(model.tokenizer.tokenizer_class)"
            )
        )


class Pretrained(Described):
    """A model that is saved, loaded and shared as a folder, or read from a checkpoint; mixed into an `nn.Module`.

    Attributes:
        kind: The kind of checkpoint that holds such a model.
    """

    kind: ClassVar[Kind] = TOKENIZER

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> Self:
        """Loads a folder that `save_pretrained` wrote, or a model of the Hugging Face hub.

        Args:
            name: The folder, or the hub's `owner/model`.
            **hub: Options of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, …

        Returns:
            The model, in eval mode.

        Raises:
            TypeError: if an option is unknown.
            ValueError: if there is no such model, or it is in a format that is not this version's.
        """
        config, tensors = read_pretrained(name, cls, **hub)
        return load(cls, config["model"], tensors, f"name: {str(name)!r}").completed(config)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """Loads a checkpoint of training; its averaged weights where it has them.

        Args:
            path: File that `fit` wrote.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if the file is no checkpoint of such a model.
        """
        stored = read(path, "checkpoint", cls.kind)
        config = stored.config()
        return load(cls, config["model"], stored.model(), stored.place, "configuration").completed(config)

    def completed(self, config: Mapping[str, Any]) -> Self:
        """Applies what a config says beside the model, and returns the model."""
        return self

    def described(self) -> dict[str, Any]:
        """How to make the model again on this machine, as a checkpoint says it: plain data with an entry `model`.

        Raises:
            ValueError: if a part can't be described.
        """
        return {"model": describe(self)}

    def pretrained_config(self) -> dict[str, Any]:
        """How to make it again on any machine, as `config.json` says it beside the format's version."""
        return self.described()

    def model_card(self) -> str:
        """What the card says, in Markdown."""
        return f"# {type(self).__name__}\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model into a folder, which is made if it is missing.

        Args:
            folder: Gets `model.safetensors`, `config.json` and `README.md`; a former model in it is replaced.
        """
        folder = Path(folder)
        metadata = ModelCardData(library_name="vfm-vae", tags=["vfm-vae", "arxiv:2510.18457"])
        card = f"---\n{metadata.to_yaml()}\n---\n\n{self.model_card()}".encode()
        config = (json.dumps({"format_version": FORMAT_VERSION, **self.pretrained_config()}, indent=2) + "\n").encode()
        model: Any = self
        tensors = model.state_dict()
        # All three are written before the first takes its place, the weights first.
        with (
            whole_file(folder / CONFIG, len(config)) as config_file,
            whole_file(folder / CARD, len(card)) as card_file,
            whole_file(folder / WEIGHTS, sum(tensor.nbytes for tensor in tensors.values())) as weights_file,
        ):
            config_file.write(config)
            card_file.write(card)
            put_tensors(weights_file, tensors)
            if (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() != config:
                (folder / CONFIG).unlink()  # a folder without it is no model: so none is half one, half other

    def push_to_hub(
        self,
        name: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload model",
        **options: Any,
    ) -> str:
        """Uploads the model to the Hugging Face hub.

        Args:
            name: `owner/model`; made if it is missing.
            private: Whether a new one is.
            token: Access token for the hub; the default is the one that `hf auth login` stored.
            commit_message: Message of the commit that uploads the files.
            **options: Further ones of `huggingface_hub.HfApi.upload_folder`: `revision`, `create_pr`, …

        Returns:
            Address of the commit.
        """
        api = HfApi(token=token)
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            upload = api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message, **options)
            return str(upload)


def read_pretrained(name: str | Path, base: type, **hub: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder that `save_pretrained` wrote, or such a one of the Hugging Face hub.

    Args:
        name: The folder, or the hub's `owner/model`.
        base: Class of model that is wanted.
        **hub: Options of `huggingface_hub.snapshot_download`.

    Returns:
        What its `config.json` says, and its tensors by name.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if there is no such model, it is of another kind, or of a format that is not this version's.
    """
    folder = model_folder(name, hub)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"name: {str(name)!r} holds no {CONFIG}; give a folder that save_pretrained wrote")
    config = read_json(folder / CONFIG, "name")
    check_config(name, config, base)
    tensors = read_weights(folder / WEIGHTS, "name")
    if not isinstance(tensors, Mapping):
        raise ValueError(f"name: the {WEIGHTS} in {str(name)!r} holds a {type(tensors).__name__}, and no tensors")
    return config, dict(tensors)


def load(
    base: type, description: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str, described: str = CONFIG
) -> Any:
    """Builds a model and gives it all of its weights.

    Args:
        base: Its class.
        description: As `build` takes it.
        tensors: Weights by name.
        place: Names the option and what it gave, in messages.
        described: What described the model.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: if the description does not fit the classes, or the weights do not fit the description.
    """
    try:
        model = build(base, description, f"{place}: its {described}")
    except ArgumentError as error:
        cause = " ".join(str(error).partition("Given value")[0].split())
        raise ValueError(f"{place}: its {described} does not fit: {cause}") from error
    fill(model, tensors, f"{place}: the weights are of another model than its {described}")
    return model.eval()


def model_folder(name: str | Path, hub: Mapping[str, Any]) -> Path:
    """The folder of a model, which is downloaded if it is one of the Hugging Face hub.

    Args:
        name: The folder, or the hub's `owner/model`.
        hub: Options of `huggingface_hub.snapshot_download`; by default it fetches the files of a folder of ours.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if there is no such folder, and it can't be downloaded.
    """
    if unknown := sorted(set(hub) - HUB_OPTIONS):
        raise TypeError(
            f"from_pretrained got {unknown}, which are neither its own options nor those of "
            "huggingface_hub.snapshot_download: see its docstring for their names"
        )
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]*\w/[\w.-]*\w", str(name)):
        raise ValueError(f"name: there is no folder {str(name)!r}; on the Hugging Face hub it would be owner/model")
    try:
        files = [CONFIG, WEIGHTS, CARD]
        return Path(snapshot_download(str(name), **{"allow_patterns": files} | dict(hub)))
    except (HFValidationError, OSError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(
            f"name: there is no folder {str(name)!r}, and from the Hugging Face hub it could not be had "
            f"({type(error).__name__}: {cause})"
        ) from error


def check_config(name: str | Path, config: Mapping[str, Any], base: type) -> None:
    """Checks that a config has this version's format and describes the model that is wanted.

    Args:
        name: Names its place.
        config: What `config.json` says.
        base: Class of model that is wanted.

    Raises:
        ValueError: if it is of another format, asks for another class, or for one that is neither of this project nor
            of the package that the wanted class is of, nor a VFM's that was imported before.
    """
    version = config.get("format_version", 0) if isinstance(config, Mapping) else 0
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "install a newer version of this project" if newer else "convert its checkpoint again"
        raise ValueError(
            f"name: {str(name)!r} is in format version {version}, but this version of vfm_vae reads {FORMAT_VERSION}; "
            + advice
        )
    if not isinstance(config.get("model"), Mapping) or "class_path" not in config["model"]:
        raise ValueError(f"name: the {CONFIG} in {str(name)!r} describes no model")
    packages = {*PACKAGES, base.__module__.partition(".")[0]}
    others = {name: part for name, part in config.items() if name != "vfm"}
    check_classes(f"name: {str(name)!r}", upgrade(others), packages=packages, imports=False)
    vfm = config.get("vfm") or {}
    vfm_class = str(vfm.get("class_path", ""))
    if vfm_class and vfm_class.partition(".")[0] not in packages and not is_imported(vfm_class):
        raise ValueError(
            f"name: {str(name)!r} was trained on a {vfm_class}, which is not of this project: import its module "
            "first, or give the checkpoint of its training"
        )
    hint: Any = class_at(vfm_class, f"name: the VFM of {str(name)!r}:") if vfm_class else Any
    arguments = {name: value for name, value in vfm.items() if name != "class_path"}
    check_classes(f"name: the VFM of {str(name)!r}", arguments, hint, packages, imports=False)
    path = config["model"]["class_path"]
    if path != class_path(base) and not _names_subclass(path, base):
        raise ValueError(f"name: {str(name)!r} holds a {path}, and no {base.__qualname__}")


def _names_subclass(path: str, base: type) -> bool:
    try:
        return issubclass(class_at(path), base)
    except (TypeError, ValueError):
        return False
