"""Whole residual blocks taken out: which there are, which goes first, and that the network equals its silenced one."""

import copy
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import Darknet, dump, load_cfg, load_model, parse, save_weights
from models.storage import Levels
from tests.networks import FIXTURES, ROOT, name, seeded
from utils.log import DataError
from utils.residual_blocks import Block, choose_blocks, find_blocks, importance_of, remove_blocks

CONV = "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\npad=1\nactivation=leaky\n"
ADD = "[shortcut]\nfrom=-2\nactivation=linear\n"
HEAD = "[convolutional]\nfilters=18\nactivation=linear\n[yolo]\nanchors=9,9, 20,20, 30,30\nmask=0,1,2\nclasses=1\n"
PLAIN = CONV + CONV + ADD  # layers 0, 1 and the shortcut 2, whose body is layer 1


class Silent(nn.Module):
    """Put out zero in the shape of a block's output."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.zeros_like(self.block(*inputs))


def built(layers: str) -> Darknet:
    return Darknet(parse(f"[net]\nwidth=32\nheight=32\n{layers}{HEAD}")).eval()


def check_exact(model: Darknet, blocks: list[Block], folder: Path) -> Darknet:
    """Compare the network without blocks, from its files, with the one whose bodies put out zero."""
    silenced = copy.deepcopy(model).double()
    for block in blocks:
        silenced.blocks[block.last - 1] = Silent(silenced.blocks[block.last - 1])
    removed = remove_blocks(model, blocks, path=str(folder / "pruned.cfg"))
    (folder / "pruned.cfg").write_text(dump(removed.cfg))
    save_weights(removed, folder / "pruned.weights")
    compact = load_model(folder / "pruned.cfg", folder / "pruned.weights").double()
    x = torch.rand(1, model.channels, 2 * model.stride, 2 * model.stride, dtype=torch.float64)
    with torch.inference_mode():
        for wanted, found in zip(silenced(x), compact(x), strict=True):
            assert wanted.isfinite().all()
            assert (found - wanted).norm() <= 1e-9 * wanted.norm()
    return compact


SHIPPED = {"yolov3": 23, "yolov4": 23, "ghostnet-yolov3": 11, "mobilenetv3-large": 10, "demo": 5, "vovnet39-yolov3": 2}
OFFICIAL = {"resnet50": 12, "csresnext50-panet-spp": 12, "yolov4-csp": 23, "efficientnet-lite3": 18}
HEAVY = ("vovnet39-yolov3", "yolov4-csp", "csresnext50-panet-spp")
PATHS = [ROOT / f"cfg/{stem}.cfg" for stem in SHIPPED] + [Path(f"darknet/official-cfg/{stem}.cfg") for stem in OFFICIAL]


@pytest.mark.parametrize(
    "cfg", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in HEAVY)) for p in PATHS], ids=name
)
def test_a_network_equals_the_one_whose_bodies_are_silent(
    cfg: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two of three blocks go, under references from all over the network."""
    path = cfg if cfg.is_absolute() else request.getfixturevalue("shared_data") / cfg
    model = seeded(path)
    blocks = find_blocks(model)
    assert len(blocks) == (SHIPPED | OFFICIAL)[cfg.stem]
    gone = [block for place, block in enumerate(blocks) if place % 3 != 1]
    compact = check_exact(model, gone, tmp_path)
    layers = sum(block.last - block.first + (not block.is_activated) for block in gone)
    assert len(compact.layers) == len(model.layers) - layers
    silent = [index for block in gone for index in range(block.first, block.last)]
    weights = sum(p.numel() for index in silent for p in model.layers[index].module.parameters())
    assert weights > 0
    assert sum(p.numel() for p in compact.parameters()) == sum(p.numel() for p in model.parameters()) - weights


@pytest.mark.parametrize("blocks", [slice(None), slice(1, 2), slice(0, 1)], ids=["all", "outer", "inner"])
def test_blocks_in_blocks(blocks: slice, tmp_path: Path) -> None:
    """A [residual] and a [shortcut] behind it begin at the same layer."""
    model = seeded(FIXTURES / "valid/blocks.cfg")
    found = find_blocks(model)
    nested = [(a, b) for a, b in itertools.pairwise(found) if a.first == b.first and a.last < b.last]
    assert len(nested) == 1
    check_exact(model, found if blocks == slice(None) else list(nested[0][blocks]), tmp_path)


def test_a_sum_may_get_levels_that_it_had_not() -> None:
    own = "[quan_convolutional]\nbatch_normalize=1\nfilters=8\nactivation=linear\n"
    body = own.replace("filters", "w_bits=16\nfilters")
    model = Darknet(parse(f"[net]\nwidth=32\nheight=32\nmap_bits=8\n{own}{body}{ADD}{own}{ADD}{HEAD}"))
    assert not isinstance(model.blocks[4].levels, Levels)
    removed = remove_blocks(model, find_blocks(model)[:1], path="pruned.cfg")
    assert removed.blocks[2].levels.is_fresh


def test_a_block_around_another_and_a_layer_of_its_own(tmp_path: Path) -> None:
    model = built(CONV + CONV + CONV + ADD + CONV + "[shortcut]\nfrom=0\nactivation=linear\n" + CONV)
    inner, outer = find_blocks(model)
    assert (inner, outer) == (Block(2, 3), Block(1, 5))
    for blocks, left in (([inner], 5), ([outer], 2), ([outer, inner], 2)):
        assert len(check_exact(model, blocks, tmp_path).layers) == left + 2


NO_BLOCKS = {
    "body read outside": PLAIN + "[route]\nlayers=1\n",
    "body named outside": PLAIN + "[convolutional]\nbatch_normalize=1\nfilters=8\nsize=3\npad=1\nshare_index=1\n",
    "body reads outside": CONV + CONV + "[route]\nlayers=-1,0\n" + CONV + "[shortcut]\nfrom=1\n",
    "weights": CONV + CONV + ADD + "weights_type=per_feature\n",
    "three inputs": CONV + CONV + "[shortcut]\nfrom=-2,-2\n",
    "other channels": CONV + CONV.replace("filters=8", "filters=4") + ADD,
    "other size": CONV + CONV + "[maxpool]\nsize=2\nstride=2\n[shortcut]\nfrom=-3\n",
    "freezes": CONV + CONV + "stopbackward=1\n" + ADD,
    "no body": CONV + "[shortcut]\nfrom=-1\nactivation=linear\n",
    "body on the other side": CONV + CONV + "[route]\nlayers=0\n[shortcut]\nfrom=1\nactivation=linear\n",
    "head in the body": CONV.replace("8", "18") + HEAD + "[route]\nlayers=-2\n[shortcut]\nfrom=0\n",
}


@pytest.mark.parametrize("case", NO_BLOCKS)
def test_what_is_no_block(case: str) -> None:
    assert find_blocks(built(PLAIN)) == [Block(1, 2)]
    assert find_blocks(built(NO_BLOCKS[case])) == []


def test_indices_stay_relative_or_absolute(tmp_path: Path) -> None:
    """Spaces and comments stay too; what reads the shortcut reads the layer before the block."""
    text = PLAIN + "# next stage\n" + CONV + "[route]\nlayers = -1, 2 # both\n" + CONV + "[shortcut]\nfrom=-3\n"
    compact = check_exact(built(text), [Block(1, 2)], tmp_path)
    written = (tmp_path / "pruned.cfg").read_text()
    assert written.startswith("[net]\n")
    assert "layers = -1,0 # both\n" in written
    assert re.findall("from=.*", written) == ["from=-3"]
    assert [layer.inputs for layer in compact.layers][:5] == [(-1,), (0,), (1, 0), (2,), (3, 1)]
    assert "# next stage\n" in written


def test_relative_indices_across_a_block_shrink(tmp_path: Path) -> None:
    check_exact(built(CONV + PLAIN + "[shortcut]\nfrom=-4\n"), [Block(2, 3)], tmp_path)
    assert re.findall("from=.*", (tmp_path / "pruned.cfg").read_text()) == ["from=-2"]


def test_an_activated_sum_stays_activated(tmp_path: Path) -> None:
    """Leaky twice is not leaky once: the activation takes the place of the shortcut."""
    text = PLAIN.replace("linear", "mish") + CONV + "[shortcut]\nfrom=2\n"
    model = built(text)
    assert find_blocks(model) == [Block(1, 2, is_activated=True), Block(3, 4)]
    compact = check_exact(model, find_blocks(model), tmp_path)
    assert [section.name for section in compact.cfg.sections[1:3]] == ["convolutional", "activation"]


def test_macros_are_written_out(tmp_path: Path) -> None:
    text = f"{CONV}[residual]\nrepeat=2\n{CONV}[shortcut]\nfrom=-2\n"
    model = built(text)
    blocks = find_blocks(model)
    assert len(model.cfg.sections) < len(model.expanded.sections)
    check_exact(model, blocks[:1], tmp_path)


def fill(model: Darknet, **gammas: float) -> None:
    """Set every γ of layers, named `_index`; the other layers keep 1."""
    for key, value in gammas.items():
        model.layers[int(key[1:])].module.bn.weight.data.fill_(value)


def test_blocks_rank_by_what_they_add_to_their_stream() -> None:
    """γ² of a body over the sum of γ² before it: later blocks of a stream weigh less, and no sign counts."""
    model = built(PLAIN + CONV + ADD + CONV + CONV + ADD)  # bodies 1, 3 on the stream of 0; 6 on that of 5
    fill(model, _0=2, _1=-4, _3=5, _5=10, _6=6)
    blocks = find_blocks(model)
    assert [block.last for block in blocks] == [2, 4, 7]
    assert importance_of(model, blocks) == pytest.approx([16 / 4, 25 / 20, 36 / 100])
    assert [block.last for block in choose_blocks(model, 3)] == [7, 4, 2]
    fill(model, _0=0, _1=0, _3=1)
    assert [block.last for block in choose_blocks(model, 3)] == [2, 7, 4]  # nothing on nothing, and all of a stream


def test_both_halves_of_a_ghost_module_count() -> None:
    model = seeded(ROOT / "cfg/ghostnet-yolov3.cfg")
    block = find_blocks(model)[0]
    for index, value in ((block.first - 1, 2), (block.last - 3, 3), (block.last - 2, 1)):  # primary, cheap
        model.layers[index].module.bn.weight.data.fill_(value)
    assert importance_of(model, [block]) == pytest.approx((9 + 1) / 2 / 4)


def test_of_a_concatenation_wide_parts_count_more() -> None:
    narrow, wide = CONV.replace("filters=8", "filters=2"), CONV.replace("filters=8", "filters=6")
    model = built(CONV + narrow + wide + "[route]\nlayers=-2,-1\n[shortcut]\nfrom=0\n")
    fill(model, _1=4, _2=2)
    assert importance_of(model, [Block(1, 4)]) == pytest.approx((2 * 16 + 6 * 4) / 8)


def test_a_body_that_no_normalisation_ends_goes_last() -> None:
    """What stands before a convolution with a bias does not tell how much is added."""
    biased = CONV.replace("batch_normalize=1\n", "")
    model = built(PLAIN + CONV + CONV + CONV + biased + "[shortcut]\nfrom=-3\n" + CONV + CONV + ADD)
    fill(model, _1=9)
    assert [block.last for block in choose_blocks(model, 3)] == [10, 2, 7]
    assert np.isnan(importance_of(model, find_blocks(model))).tolist() == [False, True, False]


def test_a_gate_is_not_what_is_added() -> None:
    """Squeeze and excitation at the end of a body: the convolution that it opens counts."""
    model = built(CONV + CONV + "[se]\nreduction=2\n[shortcut]\nfrom=0\n")
    fill(model, _1=0.5)
    assert importance_of(model, find_blocks(model)) == pytest.approx([0.25])


def test_shared_tensors_count_as_their_owner() -> None:
    model = built(CONV + CONV + CONV + CONV + "share_index=1\n[shortcut]\nfrom=-3\n")
    fill(model, _1=3, _2=5)
    assert find_blocks(model) == [Block(2, 4)]
    assert importance_of(model, [Block(2, 4)]) == pytest.approx([1])


def test_no_more_blocks_than_there_are() -> None:
    model = seeded(ROOT / "cfg/demo.cfg")
    assert len(choose_blocks(model, 5)) == 5
    with pytest.raises(DataError, match=r"^--layers 6: .*demo\.cfg has 5 residual blocks that can go"):
        choose_blocks(model, 6)
    with pytest.raises(DataError, match=r"^--layers 2: <string> has 1 residual block that can go"):
        choose_blocks(built(PLAIN), 2)
    slim = Darknet(load_cfg(ROOT / "cfg/slim-m.cfg"))
    with pytest.raises(DataError, match=r"^--layers 1: .*slim-m\.cfg has no residual block that can go"):
        choose_blocks(slim, 1)
