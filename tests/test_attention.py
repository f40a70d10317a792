"""The gates [eca], [ca], [sa] and [channel_shuffle] against loops over numbers, in every layout and type."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from networks import ROOT, build, random, run
from numpy_reference import channel_gate, eca, shuffle, spatial_gate

from models import CfgError, Darknet, parse
from models.attention import adaptive_kernel
from models.darknet import count_parameters
from utils.lint import receptive_fields

NET = "[net]\nheight=32\nwidth=64\n"
HEAD = "[convolutional]\nfilters=6\n[yolo]\nanchors=8,8\nclasses=1\n"

# a section, what it computes, and the shapes of its weights in the order of the file, for 12 channels
FORMULAS: dict[str, tuple[Callable[..., np.ndarray], tuple[tuple[int, ...], ...]]] = {
    "[eca]": (eca, ((1, 1, 3),)),
    "[eca]\nkernel_size=5": (eca, ((1, 1, 5),)),
    "[eca]\nkernel_size=1": (eca, ((1, 1, 1),)),
    "[eca]\nkernel_size=0": (eca, ((1, 1, 3),)),
    "[ca]": (channel_gate, ((1, 12), (12, 1))),  # 12 // 16, but at least one
    "[ca]\nratio=3": (channel_gate, ((4, 12), (12, 4))),
    "[ca]\nhidden=5\nratio=3": (channel_gate, ((5, 12), (12, 5))),
    "[sa]": (spatial_gate, ((1, 2, 7, 7),)),
    "[sa]\nkernelsize=3": (spatial_gate, ((1, 2, 3, 3),)),
    "[sa]\nkernel_size=5": (spatial_gate, ((1, 2, 5, 5),)),
    "[channel_shuffle]": (partial(shuffle, groups=2), ()),
    "[channel_shuffle]\ngroups=4": (partial(shuffle, groups=4), ()),
}
ONE_OF_EACH = ["[eca]", "[ca]\nratio=1", "[sa]", "[channel_shuffle]"]


@pytest.mark.parametrize("text", FORMULAS)
def test_formula_and_weights(text: str) -> None:
    formula, shapes = FORMULAS[text]
    layer, x = build(text, (12, 7, 9)), random(2, 12, 7, 9)
    tensors = [layer.module.get_parameter(name) for name in layer.tensors]
    assert [tuple(tensor.shape) for tensor in tensors] == [*shapes]
    assert count_parameters(layer.module) == sum(map(np.prod, shapes))
    weights = [tensor.detach().numpy() for tensor in tensors]
    np.testing.assert_allclose(
        run(layer, x), np.stack([formula(each, *weights) for each in x.numpy()]), rtol=1e-5, atol=1e-6
    )


def test_adaptive_kernels_are_odd_and_nearest_to_the_papers_formula() -> None:
    # log2(C)/2 + 1/2: 0.5, 1, 2, 2.5, 3.5, 4, 4.5, 5, 5.5, 6; a tie goes up, as in the authors' code
    channels = (1, 2, 8, 16, 64, 128, 256, 512, 1024, 2048)
    assert [adaptive_kernel(each) for each in channels] == [1, 1, 3, 3, 3, 5, 5, 5, 5, 7]


# The published figures of YOLOv3-tiny with one class and a block after its convolution of 1024 channels.
@pytest.mark.parametrize(
    ("block", "parameters"),
    [("", 8_669_876), ("[se]\nreduction=8", 8_933_172), ("[cbam]", 8_801_046), ("[eca]", 8_669_879)],
)
def test_parameters_of_tiny_with_attention(block: str, parameters: int) -> None:
    first, wide, rest = (ROOT / "cfg/yolov3-tiny-hand.cfg").read_text(encoding="utf-8").partition("filters=1024")
    inner, header, after = rest.partition("\n[")
    with torch.device("meta"):
        assert count_parameters(Darknet(parse(f"{first}{wide}{inner}\n{block}{header}{after}"))) == parameters


@pytest.mark.parametrize("text", ONE_OF_EACH)
@pytest.mark.parametrize("shape", [(1, 12, 11, 15), (3, 12, 1, 1)])
def test_channels_last_stays_and_changes_no_value(text: str, shape: tuple[int, ...]) -> None:
    module, x = build(text, (12, 11, 15)).module, random(*shape)
    with torch.inference_mode():
        y = module(x)
        last = module.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_bf16_autocast_is_near_float32(text: str) -> None:
    module, x = build(text, (12, 11, 15)).module, random(1, 12, 11, 15)
    with torch.inference_mode():
        y = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x.bfloat16())
    torch.testing.assert_close(low.float(), y, rtol=0.03, atol=0.01)  # bf16 has 8 bits


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_gradients(text: str) -> None:
    module, x = build(text, (4, 3, 5)).module.double().train(), random(2, 4, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


@pytest.mark.parametrize("text", ONE_OF_EACH)
def test_a_network_with_a_gate_trains_at_any_size(text: str) -> None:
    torch.manual_seed(0)  # no hidden channel of [ca] is dead
    stem = "[convolutional]\nfilters=12\nsize=3\nstride=32\npad=1\nbatch_normalize=1\nactivation=leaky\n"
    model = Darknet(parse(f"{NET}{stem}{text}\n{HEAD}"))
    (head,) = model.train()(random(2, 3, 352, 480))
    head.square().sum().backward()
    assert head.shape == (2, 6, 11, 15)
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("text", "field"),
    [("[eca]", (32, 64)), ("[ca]", (32, 64)), ("[sa]\nkernelsize=5", (10, 10)), ("[channel_shuffle]", (2, 2))],
)
def test_receptive_fields(text: str, field: tuple[int, int]) -> None:
    model = Darknet(parse(f"{NET}channels=4\n[maxpool]\nsize=2\nstride=2\n{text}\n{HEAD}"))
    assert receptive_fields(model) == [(2, 2), field, field, field]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[eca]\nkernel_size=4", "[eca] 'kernel_size' expects an odd number, gets 4 (set kernel_size=5)"),
        ("[sa]\nkernelsize=6", "[sa] 'kernelsize' expects an odd number, gets 6 (set kernelsize=7)"),
        ("[sa]\nkernel_size=6", "[sa] 'kernel_size' expects an odd number, gets 6 (set kernel_size=7)"),
        ("[eca]\nkernel_size=-1", "[eca] 'kernel_size' expects at least 0, gets -1"),
        ("[sa]\nkernelsize=0", "[sa] 'kernelsize' expects at least 1, gets 0"),
        ("[ca]\nratio=0", "[ca] 'ratio' expects at least 1, gets 0"),
        ("[channel_shuffle]\ngroups=5", "[channel_shuffle] expects groups=5 to divide the 12 channels of its input"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(CfgError) as caught:
        build(text, (12, 4, 4))
    assert str(caught.value) == f"<string>:3: {message}"
