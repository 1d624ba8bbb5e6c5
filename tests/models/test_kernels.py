"""hf_cifar.models.kernels: depthwise convolutions under bfloat16 on a CPU."""

import torch
from torch import nn
from transformers import TimmWrapperConfig

from hf_cifar.models.kernels import restore_kernels, use_float32_depthwise


def test_slow_depthwise_layers_train_in_float32():
    """Return True if the gradients of a sum are those of a layer computed in float32."""
    convolutions = nn.ModuleDict(
        {
            "stride": nn.Conv2d(4, 4, 3, stride=2, groups=4),
            "filter": nn.Conv2d(4, 4, 5, groups=4),
            "fast": nn.Conv2d(4, 4, 3, groups=4),
            "full": nn.Conv2d(4, 4, 5, stride=2),
        }
    )
    convolutions.config = TimmWrapperConfig()
    images = torch.randint(-9, 9, (2, 4, 9, 9)).float()

    def gradients(autocast):
        found = {}
        for name, convolution in convolutions.items():
            convolution.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = convolution(images / 7)
            assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
            output.float().sum().backward()
            found[name] = convolution.weight.grad.clone()
        return found

    expected = gradients(autocast=False)
    use_float32_depthwise(convolutions)
    found = gradients(autocast=True)
    exact = {name for name in convolutions if torch.equal(found[name], expected[name])}
    assert exact == {"stride", "filter"}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        spared = convolutions["stride"](images / 7)
        restore_kernels(convolutions)
        assert torch.equal(spared, convolutions["stride"](images / 7))
    exact = {name for name in convolutions if torch.equal(gradients(True)[name], expected[name])}
    assert not exact


def test_a_frozen_depthwise_layer_computes_in_bfloat16():
    """It needs no gradients, unless an earlier layer trains."""
    layer = nn.Conv2d(4, 4, 3, stride=2, groups=4).requires_grad_(False)
    images = torch.randn(2, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = layer(images)
    with torch.autocast("cpu", enabled=False):
        rounded = layer(images).bfloat16()
    assert not torch.equal(in_bfloat16, rounded)
    use_float32_depthwise(nn.ModuleList([layer]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(images), in_bfloat16)
        assert torch.equal(layer(images.requires_grad_()), rounded)
