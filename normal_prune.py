"""Prune a network: cut the channels that it would miss least, and check what is left.

    python normal_prune.py --cfg cfg/x.cfg --weights runs/sparse/last.pt --data data/x.data --percent 0.6

Writes pruned.cfg, weights/pruned.weights and .pt, and report.md, .json and .png, and prints what it did to parameters,
operations, size, latency and mAP. Takes seconds, and as long as testing takes where --data is given.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import Darknet, dump, save_weights
from models.weights import save_checkpoint, write_atomically
from utils import cli
from utils.datasets import Pictures, collate, evaluation_batches, to_input
from utils.device import autocast_type, seed_everything, select_device
from utils.evaluate import Settings, evaluate
from utils.guard import RUIN, TOLERATED, check_exactness, largest_within
from utils.importance import measure_importance
from utils.labels import Labelled, check_labels, merge_classes
from utils.log import DataError, log
from utils.plan import make_plan
from utils.prune import find_groups, mask
from utils.prune_flags import parse_args
from utils.scores import Evaluation
from utils.slimming import groups_to_cut, make_goal, slim
