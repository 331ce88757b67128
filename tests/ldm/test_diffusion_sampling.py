"""Samples are reproducible, independent of their batch, and show their class after training."""

import pytest
import torch

from ldm.condition import ClassLabels
from ldm.guidance import Guidance
from ldm.samplers import EulerMaruyama


@pytest.mark.parametrize("sampler", [None, EulerMaruyama(6)])
def test_samples_do_not_depend_on_the_batch(diffusion, latents, trainer, sampler):
    module = diffusion(guidance=Guidance(2.0), **({"sampler": sampler} if sampler else {}))
    trainer(max_steps=20).fit(module, datamodule=latents())
    together = module.draw(torch.arange(9), decode=False)
    apart = [module.draw(part, decode=False) for part in torch.arange(9).split([4, 1, 4])]
    assert torch.equal(together.condition.labels, torch.cat([part.condition.labels for part in apart]))
    assert torch.allclose(together.latents, torch.cat([part.latents for part in apart]), atol=1e-4)
    assert not torch.allclose(together.latents[0], together.latents[1], atol=0.1)
    given = module.draw(torch.arange(9), together.condition, decode=False)
    assert torch.equal(given.latents, together.latents)


def test_labels_are_random_or_balanced(diffusion):
    numbers = torch.arange(300)
    balanced = diffusion(label_mode="balanced").sample_condition(numbers).labels
    assert torch.equal(balanced.bincount(), torch.tensor([100, 100, 100]))
    random = diffusion().sample_condition(numbers).labels
    assert random.unique().tolist() == [0, 1, 2]
    assert not torch.equal(random, diffusion(seed=2).sample_condition(numbers).labels)
    assert torch.equal(random[40:50], diffusion().sample_condition(numbers[40:50]).labels)


def test_a_conditioning_chooses_by_itself(diffusion):
    numbers, conditioning = torch.arange(4), ClassLabels(3, "balanced")
    assert diffusion(conditioning=conditioning).sample_condition(numbers).plain() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match=r"model\.label_mode: 'balanced' .* model\.conditioning chooses"):
        diffusion(conditioning=conditioning, label_mode="balanced")


@pytest.mark.slow
def test_samples_show_their_class_after_training(diffusion, latents, trainer):
    module = diffusion(guidance=Guidance(2.0))
    trainer(max_steps=300).fit(module, datamodule=latents(batch_size=16))
    drawn = module.draw(torch.arange(30), decode=False)
    found = ((drawn.latents.mean((1, 2, 3)) - 0.375) / 2).round().long()
    assert (found == drawn.condition.labels).float().mean() > 0.9
