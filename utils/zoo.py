"""The shipped cfgs that `python -m utils.compose --all` writes: a name under cfg/, and the arguments that make it."""

VISDRONE = " --data data/visdrone.data --anchors visdrone"
HAND = " --data data/oxfordhand.data --anchors oxfordhand"
COCO = " --data data/coco.data --anchors coco"
TINY = "--backbone darknet-tiny --head yolov3-tiny"
GHOST = "--backbone ghostnet --head yolov3"
VOVNET = "--backbone vovnet39 --head yolov3"
SHUFFLE_1X = "--backbone shufflenetv2-1x --head yolov3-tiny --attention eca"
SHUFFLE_15X = "--backbone shufflenetv2-1.5x --head yolov3-tiny --attention eca"

ZOO: dict[str, str] = {
    "ghost-yolov3-visdrone": GHOST + VISDRONE,
    "ghostnet-yolov3-visdrone": GHOST + VISDRONE + " --note 'The network of cfg/ghost-yolov3-visdrone.cfg'",
    "ghost-yolov3-visdrone-quan": GHOST + VISDRONE + " --quantize 8",
    "vovnet-yolov3-visdrone": VOVNET + VISDRONE,
    "shufflenetv2-1x-visdrone": SHUFFLE_1X + VISDRONE,
    "shufflenetv2-1.5x-visdrone": SHUFFLE_15X + VISDRONE,
    "yolov3-tiny-visdrone": TINY + VISDRONE,
    "yolov3-tiny-se-hand": TINY + " --attention se" + HAND,
    "yolov3-tiny-cbam-hand": TINY + " --attention cbam" + HAND,
    "yolov3-tiny-eca-hand": TINY + " --attention eca" + HAND,
    "yolov3-tiny-hand-quan": TINY + HAND + " --quantize 8",
    "shufflenetv2-1x-hand": SHUFFLE_1X + HAND,
    "shufflenetv2-1.5x-hand": SHUFFLE_15X + HAND,
    "yolov3-tiny-se": TINY + " --attention se" + COCO,
    "yolov3-tiny-cbam": TINY + " --attention cbam" + COCO,
    "yolov3-tiny-eca": TINY + " --attention eca" + COCO,
    "yolov3-tiny-quan": TINY + COCO + " --quantize 8",
    "yolov4": "--backbone cspdarknet53 --head yolov4 --img-size 608" + COCO,
    "yolov4-tiny": "--backbone cspdarknet53-tiny --head yolov4-tiny" + COCO,
    "ghostnet-yolov3": GHOST + COCO,
    "ghostnet-yolov3-quan": GHOST + COCO + " --quantize 8",
    "vovnet39-yolov3": VOVNET + COCO,
    "shufflenetv2-1x": SHUFFLE_1X + COCO,
    "shufflenetv2-1.5x": SHUFFLE_15X + COCO,
    "mobilenetv3-large": "--backbone mobilenetv3-large --head pan-lite" + COCO,
    "mobilenetv3-small": "--backbone mobilenetv3-small --head pan-lite" + COCO,
}
