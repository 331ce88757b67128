"""How precisely float32 is multiplied: what the option of the command lines sets, and where."""

import pytest
import torch
import torch.nn.functional as F
from building import build

from ldm.module import DiffusionModule
from vfm_vae.cli import CLI, set_matmul_precision
from vfm_vae.metrics.features import float32_arithmetic
from vfm_vae.module import TokenizerModule

CONFIGS = {
    TokenizerModule: ["demo/tokenizer.yaml", "demo/weak.yaml", "trainer/cpu.yaml"],
    DiffusionModule: ["demo/ldm.yaml", "trainer/cpu.yaml"],
}


def setting() -> tuple[str, bool]:
    """Of products, and whether convolutions may take TF32."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    "command", ["fit"] + [pytest.param(name, marks=pytest.mark.slow) for name in ("validate", "test", "predict")]
)
@pytest.mark.parametrize("module", CONFIGS)
def test_every_command_sets_it_before_anything_is_built(module, command, monkeypatch):
    """The configs say nothing of it, like those that runs saved before there was the option."""
    seen = []
    monkeypatch.setattr(CLI, "instantiate_classes", lambda self: seen.append(setting()))
    for options in ([], ["--matmul_precision=highest"], ["--matmul_precision=medium"]):
        build(*CONFIGS[module], options=options, module=module, command=command)
    assert seen == [("high", True), ("highest", False), ("medium", True)]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_is_always_in_float32_leaves_it_as_it_was(precision):
    set_matmul_precision(precision)
    with float32_arithmetic(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert setting() == (precision, precision != "highest")


def test_cpus_compute_the_same_by_high_and_highest():
    generator = torch.Generator().manual_seed(0)
    a, b, images, weight, heads = (
        torch.randn(shape, generator=generator)
        for shape in ((256, 512), (512, 384), (4, 32, 32, 32), (48, 32, 3, 3), (2, 4, 64, 32))
    )
    results = []
    for precision in ("highest", "high"):
        set_matmul_precision(precision)
        inputs = [tensor.clone().requires_grad_() for tensor in (a, b, images, weight, heads)]
        x, y, pixels, kernel, tokens = inputs
        outputs = [x @ y, F.linear(x, y.T), tokens @ tokens.mT, F.scaled_dot_product_attention(tokens, tokens, tokens)]
        outputs += [F.conv2d(pixels, kernel), F.conv_transpose2d(pixels, kernel.transpose(0, 1))]
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, *(tensor.grad for tensor in inputs)])
    assert all(map(torch.equal, *results))
