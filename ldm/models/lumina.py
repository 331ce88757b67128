"""Lumina-Next (Zhuo et al. 2024, arXiv 2406.18583), by the library diffusers, whose weights it takes and gives.

Times and signs are those of this project: 0 is noise, 1 is data, and the output is the velocity, data minus noise. So
`LuminaPipeline` of diffusers has it, which turns its scheduler's noise levels into `1 - level` for the network, and the
network's output around for the scheduler, whose velocities lead from data to noise.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.models.denoiser import Denoiser, Prediction, Predicts
from ldm.models.layers import layers_of, run_block, scaled_init, token_grid, unpatchify, xavier_init, zero_init
from ldm.text import text_of
from vfm_vae.checkpoints import fill
from vfm_vae.diffusers_folder import defaults_of, read_diffusers
from vfm_vae.options import at_least, positive

# What diffusers calls our options.
OPTIONS = {
    "in_channels": "in_channels",
    "patch_size": "patch_size",
    "depth": "num_layers",
    "width": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "text_channels": "cross_attention_dim",
    "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_dim_multiplier",
    "norm_eps": "norm_eps",
    "qk_norm": "qk_norm",
    "learn_sigma": "learn_sigma",
}


class LuminaNextDiT(Denoiser):
    """A transformer on patches of the latent, which is told a text by cross-attention and by adaptive norms.

    In each block, tokens attend to each other and to the text at once, and a gate for each head, which begins closed,
    lets the text in. The defaults are the size that the VFM-VAE paper takes for text to image.

    Args:
        in_channels: Channels C of the latent.
        input_size: Height and width of the latent, or one number for a square.
        patch_size: Height and width of a patch.
        depth: Number of blocks.
        width: Channels D of the tokens, a multiple of 4 · num_heads.
        num_heads: Number of attention heads of queries.
        num_kv_heads: Number of attention heads of keys and values, which divides num_heads; null for as many.
        text_channels: Width of the texts' embeddings, which is the text encoder's.
        multiple_of: The MLPs' hidden width is rounded up to a multiple of this.
        ffn_dim_multiplier: Multiplies the MLPs' hidden width, which is `8/3 · D` otherwise; null for that.
        norm_eps: What the norms of tokens add to mean squares.
        qk_norm: Whether to normalise queries and keys.
        learn_sigma: Whether the output has as many channels again, which are not used; published weights have them.
        activation_checkpointing: Whether to compute blocks again in the backward pass: it takes about a third more time
            and a fraction of the memory.
        predicts: What the network's output is: the `velocity`, or the `data`, of which the velocity is made.

    Raises:
        ValueError: if a number lies outside its range, or sizes do not divide.
    """

    rotary: Tensor

    def __init__(
        self,
        in_channels: int = 32,
        input_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        depth: int = 24,
        width: int = 2304,
        num_heads: int = 32,
        num_kv_heads: int | None = 8,
        text_channels: int = 2048,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        learn_sigma: bool = False,
        activation_checkpointing: bool = False,
        predicts: Predicts = "velocity",
    ):
        super().__init__(in_channels, input_size, predicts=predicts)
        at_least(1, patch_size=patch_size, depth=depth, width=width, num_heads=num_heads, num_kv_heads=num_kv_heads)
        at_least(1, text_channels=text_channels, multiple_of=multiple_of)
        positive(ffn_dim_multiplier=ffn_dim_multiplier, norm_eps=norm_eps)
        if width % (4 * num_heads):
            raise ValueError(f"width: {width} does not divide by 4 · num_heads = {4 * num_heads}")
        if num_kv_heads is not None and num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: {num_kv_heads} does not divide num_heads = {num_heads}")
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
        from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel

        self.grid = token_grid(self.input_size, patch_size)
        self.patch_size, self.depth, self.width, self.text_channels = patch_size, depth, width, text_channels
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.qk_norm, self.norm_eps = qk_norm, norm_eps
        self.multiple_of, self.ffn_dim_multiplier, self.learn_sigma = multiple_of, ffn_dim_multiplier, learn_sigma
        self.activation_checkpointing = activation_checkpointing
        # Its parts rather than the whole, which has a weight that nothing uses.
        network = LuminaNextDiT2DModel(**self.diffusers_config())
        self.patch_embedder, self.time_caption_embed = network.patch_embedder, network.time_caption_embed
        self.blocks, self.norm_out = network.layers, network.norm_out
        table = get_2d_rotary_pos_embed_lumina(width // num_heads, *self.grid)  # complex [rows, columns, d / 2]
        # As bits, since a change of the module's precision rounds what looks like numbers.
        self.register_buffer("rotary", torch.view_as_real(table).view(torch.int32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors' code begins, which diffusers leaves to PyTorch: Xavier, N(0, 0.02²) for time, and zeros."""
        time, text = self.time_caption_embed.timestep_embedder, self.time_caption_embed.caption_embedder
        xavier_init(*layers_of(self))
        scaled_init(0.02, *(layer.weight for layer in layers_of(time)))
        zero_init(*layers_of(text, self.norm_out, *(block.get_submodule("norm1") for block in self.blocks)))

    def forward(self, state: Tensor, t: Tensor, condition: Condition, align: bool = False) -> Prediction:
        """See `Denoiser.forward`."""
        told = text_of(condition)
        dtype = self.patch_embedder.proj.weight.dtype
        text, rotary = told.embeddings.to(dtype), torch.view_as_complex(self.rotary.view(torch.float32))
        time_and_text = self.time_caption_embed(t, text, told.mask)  # [B, min(D, 1024)]
        tokens, mask, _, rotary = self.patch_embedder(state.to(dtype), rotary)  # [B, N, D]
        tokens = tokens.to(dtype)  # float32 under autocast, as between blocks, which so share one compilation
        inputs: tuple[Any, ...] = mask, rotary, text, told.mask, time_and_text, {}
        for block in self.blocks:
            tokens = run_block(block, tokens, *inputs, recompute=self.activation_checkpointing)
        output = unpatchify(self.norm_out(tokens, time_and_text), self.grid, self.patch_size)[:, : self.in_channels]
        return Prediction(self.as_velocity(output.to(state.dtype), state, t))

    @property
    def regions(self) -> list[nn.Module]:
        """Blocks, and what follows them."""
        return [*super().regions, self.norm_out]

    def diffusers_config(self) -> dict[str, Any]:
        """Options of diffusers' `LuminaNextDiT2DModel`."""
        given = {theirs: getattr(self, ours) for ours, theirs in OPTIONS.items()}
        return {"sample_size": max(self.input_size), **given}

    @classmethod
    def from_diffusers(cls, name: str | Path, hub: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """Loads a folder that `save_pretrained` of diffusers' `LuminaNextDiT2DModel` wrote, or such a one of the hub.

        Args:
            name: The folder, such as `transformer` of a pipeline's, or the hub's `owner/model`.
            hub: Options of `huggingface_hub.snapshot_download`.
            **options: Arguments that the folder does not tell, such as `predicts`; by default, `input_size` is the
                folder's `sample_size`.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if there is no such model, or weights are missing.
        """
        from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel

        config, tensors, _ = read_diffusers(name, LuminaNextDiT2DModel, hub or {})
        given = defaults_of(LuminaNextDiT2DModel) | config
        told = {ours: given[theirs] for ours, theirs in OPTIONS.items()} | {"input_size": given["sample_size"]}
        model = cls(**told | options)
        ours = {key.replace("layers.", "blocks.", 1): tensor for key, tensor in tensors.items() if key != "pad_token"}
        fill(model, ours, f"name: {str(name)!r}: the weights are of another model than its config.json")
        return model.eval()

    def to_diffusers(self, folder: str | Path) -> None:
        """Writes a folder that diffusers' `LuminaNextDiT2DModel.from_pretrained` reads.

        Args:
            folder: Is made if it is missing.
        """
        from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel

        weights = {key.replace("blocks.", "layers.", 1): tensor for key, tensor in self.state_dict().items()}
        with torch.device("meta"):
            network = LuminaNextDiT2DModel(**self.diffusers_config())
        weights["pad_token"] = self.patch_embedder.proj.bias.new_zeros(self.width)  # nothing uses it
        network.load_state_dict(weights, assign=True)
        network.save_pretrained(folder)
