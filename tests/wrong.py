"""Inputs that can't be meant, each with the words that its message must have: what is wrong, and its value."""

from __future__ import annotations

import copy
from typing import Any

REMOVED = object()

Change = dict[str, Any]
"""Values of parameters by their dotted names; ``REMOVED`` takes one away."""

RANKS = "frontier.vgg11.ranks"
PARAMETERS: list[tuple[Change, str]] = [
    # unknown keys
    ({"sede": 1}, "unknown key sede; did you mean 'seed'?"),
    ({"measure.epsilon": [1.0]}, "unknown key measure.epsilon; did you mean 'epsilons'?"),
    ({"runs.vgg11.train.epoch": 3}, "unknown key runs.vgg11.train.epoch; did you mean 'epochs'?"),
    ({"runs.vgg11.model.patchsize": 4}, "unknown key runs.vgg11.model.patchsize; did you mean 'patch_size'?"),
    ({"data.imagesize": 32}, "unknown key data.imagesize; did you mean 'image_size'?"),
    ({"decompose.method": ["svd"]}, "unknown key decompose.method; did you mean 'methods'?"),
    ({"runs.vgg11.train.augmentation": {"rotation": 3}}, "train.augmentation.rotation; did you mean 'rotate'?"),
    # missing
    ({"runs": REMOVED}, "runs is missing"),
    ({"measure": REMOVED}, "measure is missing"),
    ({"data.dataset": REMOVED}, "data.dataset is missing"),
    ({"runs.vgg11.finetune.lr": REMOVED}, "runs.vgg11.finetune.lr is missing"),
    # wrong types
    ({"seed": "zero"}, "seed is 'zero'"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"threads": None}, "threads is None"),
    ({"runs": ["vgg11"]}, "runs is ['vgg11']"),
    ({"measure.epsilons": 1.0}, "measure.epsilons is 1.0"),
    ({"measure.epsilons": ["one"]}, "measure.epsilons.0 is 'one'"),
    ({"data": "digits"}, "data is 'digits'"),
    ({"notes": "cut"}, "notes is 'cut'"),
    ({"runs.vgg11.label": 11}, "runs.vgg11.label is 11"),
    ({"runs.vgg11.train.epochs": True}, "runs.vgg11.train.epochs is True"),
    ({"runs.vgg11.train.augmentation": {"flip": "sometimes"}}, "augmentation.flip is 'sometimes'"),
    # out of range
    ({"runs": {}}, "runs is {}"),
    ({"seed": -1}, "seed is -1"),
    ({"threads": 0}, "threads is 0"),
    ({"data.image_size": 4}, "data.image_size is 4"),
    ({"data.search": 0}, "data.search is 0"),
    ({"data.search": -0.2}, "data.search is -0.2"),
    ({"data.search": 10.5}, "data.search is 10.5"),
    ({"data.crop": 1.2}, "data.crop is 1.2"),
    ({"data.workers": -1}, "data.workers is -1"),
    ({"data.limit": 0}, "data.limit is 0"),
    ({"measure.epsilons": [-1.0]}, "measure.epsilons.0 is -1.0"),
    ({"measure.epsilons": [101.0]}, "measure.epsilons.0 is 101.0"),
    ({"measure.epsilons": [float("nan")]}, "measure.epsilons.0 is nan"),
    ({"measure.memory": 0}, "measure.memory is 0"),
    ({"measure.rows": 0}, "measure.rows is 0"),
    ({"measure.calibration_images": 0}, "measure.calibration_images is 0"),
    ({"runs.vgg11.train.epochs": 0}, "runs.vgg11.train.epochs is 0"),
    ({"runs.vgg11.train.lr": 0}, "runs.vgg11.train.lr is 0"),
    ({"runs.vgg11.train.lr": float("inf")}, "runs.vgg11.train.lr is inf"),
    ({"runs.vgg11.train.batch_size": 1}, "runs.vgg11.train.batch_size is 1"),
    ({"runs.vgg11.train.label_smoothing": 1.0}, "runs.vgg11.train.label_smoothing is 1.0"),
    ({"runs.vgg11.model.width": 0}, "runs.vgg11.model.width is 0"),
    ({"runs.vgg11.train.augmentation": {"shift": 0.6}}, "augmentation.shift is 0.6"),
    ({"decompose.sweep_points": 1}, "decompose.sweep_points is 1"),
    ({"decompose.methods": []}, "decompose.methods is []"),
    ({"pretrained.simclr_vit.temperature": 0}, "pretrained.simclr_vit.temperature is 0"),
    ({"pretrained.simclr_vit.mask_ratio": 1.0}, "pretrained.simclr_vit.mask_ratio is 1.0"),
    # not one of what there is
    ({"precision": "float8"}, "precision is 'float8'"),
    ({"data.source": "imagenet"}, "data.source is 'imagenet'"),
    ({"data.dataset": "digit"}, "sklearn has no 'digit'; did you mean 'digits'?"),
    ({"measure.criterion": "ranks"}, "measure.criterion is 'ranks'"),
    ({"measure.qkv": "both"}, "measure.qkv is 'both'"),
    ({"runs.vgg11.train.optimizer": "adam"}, "runs.vgg11.train.optimizer is 'adam'"),
    ({"runs.vgg11.train.method": "none"}, "runs.vgg11.train.method is 'none'"),
    ({"runs.vgg11.model.architecture": "vgg12"}, "there is no 'vgg12'; did you mean 'vgg11'?"),
    ({"decompose.methods": ["svd", "pca"]}, "decompose.methods.1 is 'pca'"),
    ({"decompose.objective": "size"}, "decompose.objective is 'size'"),
    ({"pretrained.simclr_vit.method": "dino"}, "pretrained.simclr_vit.method is 'dino'"),
    # names
    ({"name": "raw"}, "name: raw is taken"),
    ({"name": "my study"}, "name is 'my study'"),
    ({"name": "../elsewhere"}, "name is '../elsewhere'"),
    ({"name": ""}, "name is ''"),
    ({"runs.a/b": "vgg11"}, "runs.a/b"),
    ({"pretrained.none": "simclr_vit"}, "pretrained.none is taken"),
    # what does not go together
    ({"measure.epsilons": [1.0, 1.0]}, "epsilons [1.0, 1.0] names one twice"),
    ({"runs.vit_linear.label": "VGG11"}, "2 of them have the label 'VGG11'"),
    ({"runs.vgg11.pretrained": "simclr"}, "there is no 'simclr'; did you mean 'simclr_vit'?"),
    ({"runs.vgg11.pretrained": "simclr_vit"}, "simclr_vit was made with another model"),
    ({"runs.vgg11.train.method": "linear"}, "runs.vgg11.pretrained is none, so train.method must be supervised"),
    ({"data.image_size": 16}, "data.image_size must be at least 32, not 16"),
    ({"data.image_size": 36}, "patch_size 8 does not divide data.image_size 36"),
    ({"runs.vit_linear.model.heads": 5}, "dim 96 is not a multiple of heads 5"),
    ({"runs.vgg11.model.mean": (0.5,)}, "mean and std belong together"),
    ({"data.search": 0.5, "data.test": 0.5}, "search + test must leave something to train on"),
    ({"decompose.finetuned": ["svd"], "decompose.methods": ["optimal"]}, "finetuned names ['svd']"),
    ({"pretrained.simclr_vit.url": "https://a.b/c"}, "url belongs to method: checkpoint"),
    ({"pretrained.simclr_vit.file": "a.pt"}, "file and sha256 belong to method: checkpoint"),
    ({"pretrained.simclr_vit.supervision": "supervised"}, "supervision belongs to method: checkpoint and published"),
    ({"comparisons.vit.linear": "vit_lin"}, "there is no 'vit_lin'; did you mean 'vit_linear'?"),
    ({"comparisons.vit.supervised": "vgg11"}, "its runs do not share one model"),
    ({"repeats.two": {"label": "two", "runs": ["vgg11", "vgg11"]}}, "runs ['vgg11', 'vgg11'] names one twice"),
    ({"repeats.two": {"label": "two", "runs": ["vgg11", "vit_linear"]}}, "differ in more than their labels"),
]


def changed(parameters: dict[str, Any], change: Change) -> dict[str, Any]:
    """A copy of a study's parameters with some of them changed; a string in place of a section copies that one."""
    parameters = copy.deepcopy(parameters)
    for name, value in change.items():
        *parents, last = name.split(".")
        section = parameters
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is REMOVED:
            del section[last]
        elif parents in (["runs"], ["pretrained"]) and isinstance(value, str):
            section[last] = copy.deepcopy(section[value])
        else:
            section[last] = value
    return parameters
