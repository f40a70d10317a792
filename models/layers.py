"""The table of sections: a name, and the builder that makes a Layer of it; and what the table leaves out."""

from .layer import Builder
from .layers_attention import ca, eca, sa
from .layers_conv import convolutional, crnn, depthwise, quan_convolutional
from .layers_dense import batchnorm, connected
from .layers_head import contrastive, cost, gaussian_yolo, region, softmax, yolo
from .layers_merge import channel_shuffle, route, sam, scale_channels, shortcut
from .layers_pool import activation, avgpool, crop, dropout, empty, local_avgpool, maxpool, reorg, reorg3d, upsample
from .macros import MACROS

SECTIONS: dict[str, Builder] = {
    "convolutional": convolutional,
    "conv": convolutional,
    "depthwise": depthwise,
    "quan_convolutional": quan_convolutional,
    "quantize_convolutional": quan_convolutional,
    "IAO_convolutional": quan_convolutional,
    "connected": connected,
    "conn": connected,
    "batchnorm": batchnorm,
    "BatchNorm2d": batchnorm,
    "crnn": crnn,
    "maxpool": maxpool,
    "max": maxpool,
    "local_avgpool": local_avgpool,
    "local_avg": local_avgpool,
    "avgpool": avgpool,
    "avg": avgpool,
    "upsample": upsample,
    "reorg3d": reorg3d,
    "reorg": reorg,
    "crop": crop,
    "dropout": dropout,
    "activation": activation,
    "empty": empty,
    "silence": empty,
    "blank": empty,
    "route": route,
    "shortcut": shortcut,
    "scale_channels": scale_channels,
    "sam": sam,
    "channel_shuffle": channel_shuffle,
    "eca": eca,
    "ca": ca,
    "sa": sa,
    "yolo": yolo,
    "Gaussian_yolo": gaussian_yolo,
    "region": region,
    "contrastive": contrastive,
    "softmax": softmax,
    "soft": softmax,
    "cost": cost,
}

# Sections that Darknet itself does not know.
OWN = frozenset(
    """depthwise quan_convolutional quantize_convolutional IAO_convolutional BatchNorm2d channel_shuffle eca ca
    sa""".split()
)

# Darknet's sections that have no place in a detector of pictures: a cfg with one is refused in one line.
REFUSED: dict[str, str] = {
    "rnn": "is a recurrent text model",
    "gru": "is a recurrent text model",
    "lstm": "is a recurrent text model",
    "conv_lstm": "is a recurrent model of video",
    "history": "is a recurrent model of video",
    "local": "is a layer of YOLOv1 (locally connected)",
    "detection": "is the head of YOLOv1",
    "lrn": "is local response normalisation",
    "normalization": "is local response normalisation",
    "implicit": "is a layer of YOLOR",
}

# Darknet's own keys that describe its trainer or its own files, per section.
NET_KEYS = """batch subdivisions inputs max_crop min_crop learning_rate learning_rate_min policy burn_in power steps
    scales step scale gamma sgdr_cycle sgdr_mult seq_scales max_batches max_epochs momentum decay adam B1 B2 eps
    ema_alpha loss_scale angle aspect saturation exposure hue flip blur gaussian_noise mixup cutmix mosaic
    mosaic_bound letter_box resize_step label_smooth_eps attention adversarial_lr max_chart_loss contrastive
    contrastive_jit_flip contrastive_color unsupervised augment_speed sequential_subdivisions try_fix_nan
    weights_reject_freq equidistant_point badlabels_rejection_percentage num_sigmas_reject_badlabels
    dynamic_minibatch optimized_memory workspace_size_limit_MB use_cuda_graph show_receptive_field track time_steps
    seen""".split()
LAYER_KEYS = "clip dont_update burnin_update learning_rate".split()  # of any section but [net]
CONV_KEYS = "assisted_excitation dot grad_centr stream wait_stream".split()
YOLO_KEYS = """max jitter resize ignore_thresh truth_thresh iou_thresh random objectness_smooth label_smooth_eps
    iou_normalizer obj_normalizer cls_normalizer delta_normalizer uc_normalizer max_delta iou_loss iou_thresh_kind
    counters_per_class focal_loss show_details map beta1 embedding_layer track_history_size sim_thresh dets_for_track
    dets_for_show track_ciou_norm""".split()
TRAINER_KEYS: dict[str, list[str]] = dict.fromkeys((*SECTIONS, *MACROS), LAYER_KEYS) | {
    "net": NET_KEYS,
    "network": NET_KEYS,
    "convolutional": LAYER_KEYS + CONV_KEYS,
    "conv": LAYER_KEYS + CONV_KEYS,
    "quan_convolutional": LAYER_KEYS + CONV_KEYS,
    "quantize_convolutional": LAYER_KEYS + CONV_KEYS,
    "IAO_convolutional": LAYER_KEYS + CONV_KEYS,
    "crop": LAYER_KEYS + "flip angle saturation exposure shift".split(),
    "dropout": LAYER_KEYS + "dropblock dropblock_size_rel dropblock_size_abs".split(),
    "yolo": LAYER_KEYS + YOLO_KEYS,
    "Gaussian_yolo": LAYER_KEYS + YOLO_KEYS,
    "region": LAYER_KEYS
    + """bias_match jitter rescore object_scale noobject_scale class_scale coord_scale mask_scale absolute thresh random
        max log sqrt focal_loss resize classfix map""".split(),
    "contrastive": LAYER_KEYS + "temperature cls_normalizer max_delta contrastive_neg_max".split(),
    "softmax": LAYER_KEYS + ["noloss"],
    "soft": LAYER_KEYS + ["noloss"],
    "cost": LAYER_KEYS + "type scale ratio".split(),
}
