"""Small random language models in folders, as transformers writes them, each with a tokenizer that is trained here."""

import shutil
from pathlib import Path

from tiny_towers import CONFIGS, Folders

WIDTH, DEPTH = 16, 2
VOCABULARY = 320
SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
DECODER = SIZES | {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "head_dim": 8}
T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": DEPTH, "num_heads": 2, "vocab_size": VOCABULARY}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = SIZES | ENDS | {"vocab_size": VOCABULARY, "max_position_embeddings": 24}
MULTIPLE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
READERS = {
    "qwen2_5_vl": {
        "text_config": DECODER | ENDS | {"rope_parameters": MULTIPLE},
        "vision_config": CONFIGS["qwen2_5_vl_vision"] | {"out_hidden_size": WIDTH, "depth": 1},
    },
    "llama": DECODER | ENDS,
    "t5": T5 | {"decoder_start_token_id": 0},
    "bert": TOWER,
    "siglip": {"text_config": TOWER | {"projection_size": WIDTH}, "vision_config": CONFIGS["siglip_vision_model"]},
    "gemma3": {
        "text_config": DECODER | ENDS,
        "vision_config": CONFIGS["siglip_vision_model"],
        "mm_tokens_per_image": 16,
    },
}
TEMPLATE = """
{%- for message in messages %}
{%- if loop.first %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""That of Qwen2.5-VL in short."""


def tokenizer(template: str | None = None, ends: str | None = None):
    """Byte pairs, of few words.

    Args:
        template: Chat template.
        ends: What every text ends with: a special token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["a red fox in the snow, a blue fox in the sun", "user system assistant"], trainer)
    if ends is not None:
        special_tokens = [(ends, made.token_to_id(ends))]
        made.post_processor = processors.TemplateProcessing(single=f"$A {ends}", special_tokens=special_tokens)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **names)


class Readers(Folders):
    """Makes folders with a language model and its tokenizer; each once."""

    configs = READERS

    def __call__(self, kind: str, *args, **options) -> str:
        place = super().__call__(kind, *args, **options)
        if not (Path(place) / "tokenizer.json").exists():
            ends = "</s>" if kind in ("t5", "bert", "siglip") else None
            tokenizer(TEMPLATE if kind == "qwen2_5_vl" else None, ends).save_pretrained(place)
        return place

    def copy(self, kind: str, name: str) -> Path:
        """Another folder with the same, to be changed."""
        return Path(shutil.copytree(self(kind), self.root / name, dirs_exist_ok=True))
