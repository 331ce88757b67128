"""Text encoders of Hugging Face's transformers: any language model, or the language part of one that sees, too."""

import copy
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vfm_vae.frozen import device_of, sha256_of
from vfm_vae.frozen_vfm import Precision
from vfm_vae.options import at_least, one_of
from vfm_vae.pretrained import CONFIG, model_folder
from vfm_vae.text import TextEncoder
from vfm_vae.tower_weights import Part, load_part, quiet
from vfm_vae.towers import made_config, read_config

SPECIMEN = "A photograph of two cats, and a red-and-white sign that says: “Café № 7, open!”"  # whose tokens are hashed
TOGETHER = 64  # captions that are computed at once, which bounds the memory that it takes
ALONE = {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}
"""Classes of text towers that the library's AutoModel does not make, by the `model_type` of their config."""
TOKENIZER = ("tokenizer.json", "*.model", "vocab.*")
"""Files one of which every tokenizer has; without one the library would make a tokenizer that knows nothing."""
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*")
SAID = "A caption, which shows what a chat template does with it."
EXAMPLES = "for instance 'Qwen/Qwen2.5-VL-3B-Instruct', 'google/t5-v1_1-xl' or 'openai/clip-vit-large-patch14'"


class TransformersText(TextEncoder):
    """Embeds captions by a hidden layer of a frozen language model of transformers'.

    Such are Llama, Qwen and Gemma, of T5 its encoder, and of CLIP, SigLIP or Qwen2.5-VL the part that reads. Only that
    part is kept in memory. Nothing but its config is read until captions are counted, which takes the tokenizer, or
    embedded, which takes the weights.

    Captions are padded on the right, and padding is masked, so each embedding depends on its own caption alone; but
    captions that are computed together may change its last digit.

    A model that was tuned for conversations gets the caption as a user's message, in its chat template, up to where its
    answer would begin. What is cut off a caption that is too long is the end of the caption: the template stays whole,
    as do tokens that begin and end each text.

    Args:
        name: Folder, or `owner/model` on the Hugging Face hub, for instance `Qwen/Qwen2.5-VL-3B-Instruct`. Weights are
            read from safetensors.
        layer: Which hidden states the embeddings are, as `output_hidden_states` of the library counts them: 0 is what
            enters the first block, k what leaves block k, and -1 what leaves the final norm.
        max_tokens: The most tokens of a caption, those of the template included.
        precision: Precision of weights and computation, `bfloat16` or `float32`. The embeddings are bfloat16.
        template: Whether captions are put into the tokenizer's chat template; the default is true if it has one.
        weights: File with the weights to use instead (safetensors or a torch checkpoint, in the library's layout); the
            language model may be one of its parts.

    Raises:
        ValueError: if there is no such model, it does not read, or it has no such layer or precision; later, if its
            tokenizer or weights can't be had, or the template alone is longer than `max_tokens`.
    """

    whereabouts: ClassVar[frozenset[str]] = frozenset({"name", "weights"})

    def __init__(
        self,
        name: str,
        layer: int = -1,
        max_tokens: int = 256,
        precision: Precision = "bfloat16",
        template: bool | None = None,
        weights: str | None = None,
    ) -> None:
        one_of("precision", precision, *get_args(Precision))
        at_least(1, max_tokens=max_tokens)
        self.name, self.layer, self.max_tokens = name, layer, max_tokens
        self.precision, self.template, self.weights = precision, template, weights
        self.config = _config_of(name)
        sizes = getattr(self.config, "encoder", self.config)
        self.width = int(sizes.hidden_size)
        if not -sizes.num_hidden_layers - 1 <= layer <= sizes.num_hidden_layers:
            raise ValueError(
                f"layer: {name} has no layer {layer}; its {sizes.num_hidden_layers} blocks give layers 0 to "
                f"{sizes.num_hidden_layers} and {-sizes.num_hidden_layers - 1} to -1"
            )
        positions = getattr(sizes, "max_position_embeddings", None)
        if isinstance(positions, int) and max_tokens > positions:
            raise ValueError(f"max_tokens: {name} reads at most {positions} tokens, given {max_tokens}")

    def __getstate__(self) -> dict[str, Any]:
        """What goes to other processes: they read weights of their own where they need them."""
        kept = {"_network", "_tokenizer", "_blank", "_empty"}
        return {name: value for name, value in vars(self).items() if name not in kept}

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return "_network" in vars(self)

    def count(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has before it is cut, those of the template included."""
        return [len(ids) for ids in self._ids(captions)]

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, over how a text is divided into tokens, template included, and over the weights.

        The weights count by their shapes and bytes, in the precision that they are held in; their names are left out,
        as versions of transformers call them differently.
        """
        return self._fingerprint

    def tokens(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """Embeddings, see `TextEncoder.tokens`."""
        every = self._ids(captions)
        self.note_cut([caption for caption, ids in zip(captions, every, strict=True) if len(ids) > self.max_tokens])
        cut = [self._cut(ids) for ids in every]
        by_length = sorted(range(len(cut)), key=lambda place: len(cut[place]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(cut), TOGETHER):
            places = by_length[start : start + TOGETHER]
            found |= zip(places, self._embedded([cut[place] for place in places], device), strict=True)
        return [found[place] for place in range(len(cut))]

    @torch.no_grad()
    def _embedded(self, every: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
        """Embeddings of captions by their tokens' numbers."""
        lengths = [len(ids) for ids in every]
        padding = self._tokenizer.pad_token_id or 0
        inputs = pad_sequence([torch.tensor(ids) for ids in every], True, padding).to(device)
        mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        network = self._network
        if device_of(network) != inputs.device:
            with torch.inference_mode(False):  # moved in it, weights could not be used outside
                network.to(device)
        options: dict[str, Any] = {} if self.layer == -1 else {"output_hidden_states": True}
        with torch.autocast(inputs.device.type, enabled=False):
            result = network(input_ids=inputs, attention_mask=mask if len({*lengths}) > 1 else None, **options)
        states = result.last_hidden_state if self.layer == -1 else result.hidden_states[self.layer]
        return [row[:length].to(torch.bfloat16) for row, length in zip(states, lengths, strict=True)]

    def _ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Numbers of each caption's tokens, of which there is one at least."""
        alone = self._blank or [self._first_token]
        return [ids or alone for ids in self._read(captions)]

    def _read(self, captions: Sequence[str]) -> list[list[int]]:
        texts = [self._in_template(caption) if self._has_template else caption for caption in captions]
        with quiet():  # the library would warn of long captions
            return [self._tokenizer(text, add_special_tokens=not self._has_template).input_ids for text in texts]

    def _in_template(self, caption: str) -> str:
        """A conversation that begins with the caption."""
        return self._conversation([{"type": "text", "text": caption}] if self._takes_lists else caption)

    @cached_property
    def _takes_lists(self) -> bool:
        """Whether the chat template passes over content that is no list."""
        return SAID not in self._conversation(SAID)

    def _conversation(self, content: str | list[dict[str, str]]) -> str:
        said = [{"role": "user", "content": content}]
        # Without a date, Llama's template would take that of the day, by which embeddings would change.
        options = {"tokenize": False, "add_generation_prompt": True, "date_string": "26 Jul 2024"}
        return str(self._tokenizer.apply_chat_template(said, **options))

    def _cut(self, ids: Sequence[int]) -> Sequence[int]:
        """Leaves out the end of a caption that is too long: tokens that all texts begin and end with stay."""
        excess, blank = len(ids) - self.max_tokens, self._blank
        if excess <= 0:
            return ids
        begin = _num_equal(ids, blank)
        end = len(ids) - _num_equal(ids[::-1], blank[begin:][::-1])
        return [*ids[: end - excess], *ids[end:]]

    @cached_property
    def _blank(self) -> list[int]:
        """Tokens around every caption.

        Raises:
            ValueError: if there is no room for others.
        """
        (blank,) = self._read([""])
        if len(blank) >= self.max_tokens:
            raise ValueError(
                f"max_tokens: {self.max_tokens} leave no room for captions: {self.name} has {len(blank)} tokens around "
                f"each of them; give at least {len(blank) + 1}" + (", or template: false" if self._has_template else "")
            )
        return blank

    @property
    def _first_token(self) -> int:
        """What the empty caption is made of where nothing is around captions."""
        known = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.pad_token_id, 0)
        return next(number for number in known if number is not None)

    @property
    def _has_template(self) -> bool:
        return self._tokenizer.chat_template is not None if self.template is None else self.template

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder = model_folder(self.name, {"allow_patterns": [CONFIG, *TOKENIZER, *BESIDE]})
        if not any(file for pattern in TOKENIZER for file in folder.glob(pattern)):
            raise ValueError(f"name: {self.name!r} holds no tokenizer; save one there with its save_pretrained")
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # the library's parts raise many kinds
            cause = " ".join(str(error).split())
            raise ValueError(
                f"name: {self.name!r} holds no tokenizer that transformers can read ({type(error).__name__}: {cause})"
            ) from error
        if self.template and tokenizer.chat_template is None:
            raise ValueError(f"template: the tokenizer of {self.name!r} has no chat template; leave the option out")
        return tokenizer

    @cached_property
    def _network(self) -> Any:
        """Reads the weights, and leaves torch's random numbers as they are."""
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]), quiet():
            return _load(self.name, self.config, self.weights, getattr(torch, self.precision))

    @cached_property
    def _fingerprint(self) -> str:
        each = sorted({sha256_of({"": tensor}) for tensor in self._network.state_dict().values()})
        return sha256_of({"tokens": torch.tensor(self._ids([SPECIMEN])[0])}, *each)


def _config_of(name: str) -> Any:
    """The config of a language model; of a model with several parts, that of the one that reads.

    Raises:
        ValueError: if there is none.
    """
    import transformers

    with quiet():
        whole = made_config(read_config(name), "name", name)
    config = whole if whole.is_encoder_decoder else whole.get_text_config()
    sizes = getattr(config, "encoder", config)
    numbers = [getattr(sizes, size, None) for size in ("vocab_size", "hidden_size", "num_hidden_layers")]
    known = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING if whole.is_encoder_decoder else transformers.MODEL_MAPPING
    if not all(isinstance(number, int) for number in numbers) or not (
        type(config) in known or config.model_type in ALONE
    ):
        raise ValueError(
            f"name: {name!r} is a {config.model_type!r}, of which transformers makes no text encoder; choose another, "
            + EXAMPLES
        )
    return config


def _load(name: str, config: Any, weights: str | None, dtype: torch.dtype) -> Any:
    """A language model with its weights, frozen."""
    import transformers

    config = copy.deepcopy(config)
    modules: Collection[str] = ()
    config.use_cache = False  # of keys and values, which serve to go on with a text
    with torch.device("meta"):
        if config.model_type in ALONE:
            empty = getattr(transformers, ALONE[config.model_type])(config)
        elif config.is_encoder_decoder:
            config.is_encoder_decoder = False
            empty = transformers.AutoModelForTextEncoding.from_config(config)
            modules = {tensor.partition(".")[0] for tensor in empty.state_dict()}
        else:
            empty = transformers.AutoModel.from_config(config)
    embedding = empty.get_input_embeddings().weight
    anchors = [own for own, tensor in empty.named_parameters(remove_duplicate=False) if tensor is embedding]
    network = load_part(empty, name, weights, Part("language model", anchors, modules), dtype)
    if hasattr(network, "pooler"):
        network.pooler = None
    return network.eval().requires_grad_(False)


def _num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """How many entries two sequences begin with alike."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
