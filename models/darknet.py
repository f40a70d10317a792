"""The network: a Cfg becomes an nn.Module whose forward pass is Darknet's own loop over its layers."""

import copy
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .cfg import Cfg, suggest
from .layers import SECTIONS, Built, Convolution, Layer
from .yolo import HeadSpec, decode

MAX_SIDE, MAX_CHANNELS = 65536, 1024

# Darknet's own keys that describe its trainer or its own files, per section.
NET_KEYS = """batch subdivisions inputs max_crop min_crop learning_rate learning_rate_min policy burn_in power steps
    scales step scale gamma sgdr_cycle sgdr_mult seq_scales max_batches max_epochs momentum decay adam B1 B2 eps
    ema_alpha loss_scale angle aspect saturation exposure hue flip blur gaussian_noise mixup cutmix mosaic
    mosaic_bound letter_box resize_step label_smooth_eps attention adversarial_lr max_chart_loss contrastive
    contrastive_jit_flip contrastive_color unsupervised augment_speed sequential_subdivisions try_fix_nan
    weights_reject_freq equidistant_point badlabels_rejection_percentage num_sigmas_reject_badlabels
    dynamic_minibatch optimized_memory workspace_size_limit_MB use_cuda_graph show_receptive_field""".split()
TRAINER_KEYS = {
    "net": NET_KEYS,
    "network": NET_KEYS,
    "yolo": """max jitter resize ignore_thresh truth_thresh iou_thresh random objectness_smooth label_smooth_eps
        iou_normalizer obj_normalizer cls_normalizer delta_normalizer max_delta iou_loss iou_thresh_kind nms_kind
        beta_nms counters_per_class focal_loss show_details""".split(),
    "region": """bias_match jitter rescore object_scale noobject_scale class_scale coord_scale mask_scale absolute
        thresh random max log sqrt focal_loss resize""".split(),
}


class Darknet(nn.Module):
    """A detector built from a cfg.

    `forward` takes images [B, channels, H, W] in 0..1 (RGB) and returns the raw map [B, A*(5+C), h, w] of every head,
    in the cfg's order and in every mode; `decode` makes boxes of them. Raises CfgError with all mistakes of the file.
    """

    def __init__(self, cfg: Cfg, *, allow_unknown: bool = False) -> None:
        super().__init__()
        self.cfg = copy.deepcopy(cfg)  # building marks what it reads
        built = _build(self.cfg, allow_unknown=allow_unknown)
        self.layers = built.layers
        self.size, self.channels = built.image.size, built.image.channels  # (height, width) as [net] asks for
        self.blocks = nn.ModuleList(layer.module for layer in self.layers)
        self.heads: list[HeadSpec] = [layer.head for layer in self.layers if layer.head]
        self.header = (0, 2, 5, 0)  # of its .weights file: major, minor, revision, images seen
        self.is_fused = False
        last_use = {index: index for index, layer in enumerate(self.layers) if not layer.head}  # what nobody reads
        last_use |= {index: reader for reader, layer in enumerate(self.layers) for index in layer.inputs}
        self._done = [[i for i, last in last_use.items() if last == reader] for reader in range(len(self.layers))]

    @property
    def stride(self) -> int:
        """Pixels that every input side must be a multiple of: the coarsest stride of a head or an upsampled map."""
        strides = [head.stride for head in self.heads]
        strides += [below.stride for below, above in pairwise(self.layers) if isinstance(above.module, nn.Upsample)]
        return max(1, *(int(side) for stride in strides for side in stride))

    @property
    def classes(self) -> int:
        return self.heads[0].classes

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs, heads = {-1: x}, []
        for index, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            outputs[index] = block(*[outputs[i] for i in layer.inputs])
            if layer.head:
                heads.append(outputs[index])
            for done in self._done[index]:
                del outputs[done]
        return heads

    def decode(self, heads: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Decode raw maps of an input of `size` (height, width): boxes [B, N, 4] xywh_px and scores [B, N, C]."""
        pairs = [decode(raw.float(), spec, size) for raw, spec in zip(heads, self.heads, strict=True)]
        boxes, scores = zip(*pairs, strict=True)
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)

    def fuse(self) -> "Darknet":
        """Return a copy in evaluation mode with every batch normalisation folded into its convolution."""
        fused = copy.deepcopy(self).eval()
        for block in fused.blocks:
            if isinstance(block, Convolution) and isinstance(block.bn, nn.BatchNorm2d):
                block.conv = fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.Identity()
        fused.is_fused = True
        return fused

    def summary(self) -> str:
        """Describe every layer: filters, output size at the cfg's own input size, parameters, BFLOPs."""
        rows = [
            f"{'layer':>5}  {'section':<16}{'from':>12}{'channels':>9}{'output':>11}{'parameters':>12}{'BFLOPs':>8}"
        ]
        for index, (layer, section) in enumerate(zip(self.layers, self.cfg.sections[1:], strict=True)):
            inputs = ",".join(map(str, layer.inputs)) if layer.inputs != (index - 1,) else ""
            output = f"{layer.size[0]}x{layer.size[1]}"
            count = sum(parameter.numel() for parameter in layer.module.parameters())
            rows.append(
                f"{index:5}  {section.name:<16}{inputs:>12}{layer.channels:9}{output:>11}{count or '':>12}"
                + (f"{layer.flops / 1e9:8.3f}" if layer.flops else "")
            )
        total, flops = count_parameters(self), sum(layer.flops for layer in self.layers) / 1e9
        rows.append(
            f"{len(self.layers)} layers, {total:,} parameters, {flops:.3f} BFLOPs at {self.size[1]}x{self.size[0]}"
        )
        return "\n".join(rows)


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _build(cfg: Cfg, *, allow_unknown: bool) -> Built:
    if not cfg.sections or cfg.sections[0].name not in ("net", "network"):
        cfg.raise_mistakes()
    net = cfg.sections[0]
    size = tuple(net.int(key, 416, minimum=1, maximum=MAX_SIDE) for key in ("height", "width"))
    channels = net.int("channels", 3, minimum=1, maximum=MAX_CHANNELS)
    built = Built(Layer(nn.Identity(), (), channels, (size[0], size[1]), (1, 1)))
    for section in cfg.sections[1:]:
        builder = SECTIONS.get(section.name)
        if builder is None:
            section.fail(f"is no section (expected {suggest(section.name, SECTIONS)})")
            section.known.update(section.options)
            layer = replace(built.previous, inputs=(built.index - 1,), head=None)
        else:
            layer = builder(section, built)
        guesses = {guess for index in layer.inputs for guess in built.at(index).guesses}
        if layer.is_fresh:
            guesses.discard("channels")
        if builder is None or section.unsure:
            guesses |= {"channels", "size"}
        built.layers.append(replace(layer, guesses=frozenset(guesses)))
    if not any(layer.head for layer in built.layers):
        cfg.fail(cfg.sections[-1].line, "the cfg has no head (end it with a [yolo] section)")
    cfg.check_unread(TRAINER_KEYS, allow_unknown=allow_unknown)
    cfg.raise_mistakes()
    return built
