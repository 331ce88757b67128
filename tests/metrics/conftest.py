"""Inception with random weights, in a file as torch-fidelity's are."""

import pytest
import torch

from vfm_vae.metrics.inception import Inception, InceptionNetwork


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file; features differ clearly between images, which torch's initialisation would shrink to nothing."""
    torch.manual_seed(0)
    network = InceptionNetwork()
    for name, parameter in network.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    torch.nn.init.normal_(network.fc.weight, std=0.05)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(inception_weights):
    return Inception(str(inception_weights))
