import pytest

from utilized_rank.base.sections import StudyError
from utilized_rank.study.config import parse_study

REMOVED = object()


def changed(parameters: dict, path: str, value: object) -> dict:
    """``parameters`` with another value at a dotted path."""
    *parents, last = path.split(".")
    section = parameters
    for name in parents:
        section = section[name]
    if value is REMOVED:
        del section[last]
    else:
        section[last] = value
    return parameters


def message(parameters: object) -> str:
    with pytest.raises(StudyError) as caught:
        parse_study(parameters)
    return str(caught.value)


def test_valid_parameters_give_a_study_with_its_defaults(parameters):
    study = parse_study(parameters)
    assert study.runs["vgg11"].train.epochs == 2
    assert study.runs["vgg11"].pretrained == "none"
    assert study.precision == "float32"
    assert (study.measure.criterion, study.measure.precision, study.measure.rows) == ("rank", "auto", 4)
    assert study.decompose.objective == "parameters"
    assert (study.data.crop, study.data.workers, study.data.limit) == (1.0, 2, None)
    assert (study.runs["vgg11"].model.blocks, study.runs["vgg11"].model.mean) == (None, None)
    assert (study.comparisons.keys(), study.repeats, study.notes) == ({"vit"}, {}, [])


FRONTIER = {
    "methods": ["optimal", "compensated"],
    "ranks": [{"search": "joint", "epsilon": 1.0}, {"budget": {"params": 0.5}, "finetuned": ["compensated"]}],
    "finetune": {"epochs": 1, "lr": 0.01},
}


def test_a_way_of_choosing_ranks_has_a_name_and_a_frontier_its_defaults(parameters):
    frontier = parse_study(parameters | {"frontier": {"vgg11": FRONTIER}}).frontier["vgg11"]
    assert [policy.name for policy in frontier.ranks] == ["joint-1", "params-0.5"]
    assert [policy.kind for policy in frontier.ranks] == ["joint", "params"]
    assert [policy.amount for policy in frontier.ranks] == [1.0, 0.5]
    assert frontier.ranks[0].weights == "compensated"
    assert (frontier.forms, frontier.losses, frontier.scratch) == (["channel", "spatial"], "curvature", None)
    assert (frontier.finetune.lrs, frontier.finetune.seeds, frontier.finetune.distillation) == ([], 1, 0)
    assert parse_study(parameters).frontier == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("precision", "auto"),
        ("measure.criterion", "utilized"),
        ("measure.precision", "bfloat16"),
        ("measure.rows", None),
        ("decompose.objective", "latency"),
        ("data.search", 300),
        ("data.test", None),
        ("data.dataset", "digits"),
        ("data", {"source": "folder", "dataset": "any/where", "image_size": 224, "crop": 0.875, "workers": 0}),
        ("data", {"source": "torchvision", "dataset": "CIFAR100", "image_size": 32, "search": 5000}),
        ("runs.vgg11.model", {"architecture": "timm/any_name.of_weights", "mean": (0.5,), "std": (0.5,), "blocks": 2}),
        ("runs.vgg11.model.architecture", "torchvision/vit_b_16"),
        ("runs.vgg11.train.method", "supervised"),
        ("measure.qkv", "split"),
        ("notes", ["Cut: two epochs."]),
    ],
)
def test_what_may_be_chosen(parameters, path, value):
    section = parse_study(changed(parameters, path, value))
    for name in path.split("."):
        section = section[name] if isinstance(section, dict) else getattr(section, name)
    if isinstance(value, dict):
        assert {name: getattr(section, name) for name in value} == value
    else:
        assert section == value


def test_a_study_cannot_be_changed(parameters):
    study = parse_study(parameters)
    with pytest.raises(ValueError, match="frozen"):
        study.seed = 1


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("runs.vgg11.trian", "train"),
        ("sede", "seed"),
        ("data.image_sise", "image_size"),
        ("runs.vgg11.model.widht", "width"),
        ("runs.vgg11.train.augmentation.filp", "flip"),
        ("pretrained.simclr_vit.temprature", "temperature"),
        ("measure.epsilon", "epsilons"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(parameters, path, nearest):
    if ".augmentation." in path:
        parameters["runs"]["vgg11"]["train"]["augmentation"] = {}
    text = message(changed(parameters, path, 1))
    assert f"unknown key {path}; did you mean {nearest!r}?" in text


def test_an_unknown_key_like_no_other_lists_the_known_ones(parameters):
    text = message(changed(parameters, "measure.xyzzy", 1))
    assert "unknown key measure.xyzzy (known: batch_size, calibration_images, " in text


def test_a_run_may_bear_the_name_of_a_section(parameters):
    parameters["runs"]["train"] = {**parameters["runs"]["vgg11"]}
    assert "unknown key runs.train.labell; did you mean 'label'?" in message(
        changed(parameters, "runs.train.labell", "VGG")
    )


@pytest.mark.parametrize(
    ("source", "dataset", "expected"),
    [
        ("sklearn", "digit", "sklearn has no 'digit'; did you mean 'digits'?"),
        ("sklearn", "CIFAR10", "sklearn has no 'CIFAR10' (known: digits)"),
        ("torchvision", "FashionMnist", "torchvision has no 'FashionMnist'; did you mean 'FashionMNIST'?"),
        ("torchvision", "cifar100", "torchvision has no 'cifar100'; did you mean 'CIFAR100'?"),
        ("torchvision", "CIFAR", "torchvision has no 'CIFAR'; did you mean 'CIFAR10'?"),
        ("torchvision", "ImageNet", "torchvision has no 'ImageNet' (known: CIFAR10, CIFAR100, FashionMNIST)"),
    ],
)
def test_a_dataset_that_its_source_does_not_have_suggests_one_that_it_has(parameters, source, dataset, expected):
    parameters["data"] |= {"source": source, "dataset": dataset}
    assert message(parameters) == f"params.yaml: data: {expected}"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vgg12", "; did you mean 'vgg11'?"),
        ("resnet-20", "; did you mean 'resnet20'?"),
        ("timm", "; did you mean 'timm/NAME'?"),
        (
            "mobilenet",
            " (known: resnet110, resnet20, resnet32, resnet44, resnet56, timm/NAME, torchvision/NAME, vgg11, vit)",
        ),
    ],
)
def test_an_architecture_that_does_not_exist_suggests_one_that_does(parameters, name, nearest):
    text = message(changed(parameters, "runs.vgg11.model.architecture", name))
    assert text == f"params.yaml: runs.vgg11.model.architecture: there is no {name!r}{nearest}"


def test_a_dotted_run_name_is_refused(parameters):
    parameters["runs"]["vgg.11"] = parameters["runs"].pop("vgg11")
    assert "runs.vgg.11 is 'vgg.11'" in message(parameters)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("runs.vit_linear.pretrained", "simclr_vti", "there is no 'simclr_vti'; did you mean 'simclr_vit'?"),
        ("comparisons.vit.linear", "vit_liner", "there is no 'vit_liner'; did you mean 'vit_linear'?"),
        ("comparisons.vit.supervised", "zzz", "there is no 'zzz' (known: vgg11, vit_linear)"),
    ],
)
def test_a_reference_to_what_does_not_exist_suggests_what_does(parameters, path, value, expected):
    assert f"{path}: {expected}" in message(changed(parameters, path, value))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("comparisons.vit.linear", "vgg11", "do not share one model"),
        ("runs.vit_linear.pretrained", "none", "train.method must be supervised"),
        ("runs.vit_linear.model", {"architecture": "vit", "depth": 2}, "made with another model"),
        ("runs.vgg11.model", {"architecture": "vit", "dim": 10, "heads": 3}, "not a multiple of heads 3"),
        ("data.test", 0.8, "must leave something to train on"),
        ("runs.vgg11.model.mean", [0.5], "runs.vgg11.model: mean and std belong together"),
        ("runs.vgg11.model.std", [0.5], "runs.vgg11.model: mean and std belong together"),
        ("runs.vgg11.model", {"architecture": "vgg11", "mean": [0.5], "std": [0.0]}, "runs.vgg11.model"),
        ("pretrained.simclr_vit.method", "checkpoint", "file and sha256"),
        ("pretrained.simclr_vit.file", "a.safetensors", "file and sha256"),
        ("decompose.finetuned", ["svd"], "finetuned names ['svd'], which methods does not build"),
    ],
)
def test_contradictions_are_refused(parameters, path, value, expected):
    parameters["decompose"] = {"methods": ["optimal"], "finetuned": ["optimal"]}
    assert expected in message(changed(parameters, path, value))


@pytest.mark.parametrize(
    ("image_size", "model"),
    [(16, {"architecture": "vgg11"}), (20, {"architecture": "vit", "patch_size": 8})],
    ids=["vgg11_pools_16_pixels_to_none", "patches_of_8_do_not_tile_20_pixels"],
)
def test_a_network_that_does_not_fit_the_images_is_refused(parameters, image_size, model):
    run = {**parameters["runs"]["vgg11"], "model": model}
    parameters |= {"runs": {"only": run}, "pretrained": {}, "comparisons": {}}
    assert "image_size" in message(changed(parameters, "data.image_size", image_size))


def test_all_mistakes_are_reported_one_line_each(parameters):
    changed(parameters, "seed", -1)
    changed(parameters, "runs.vgg11.trian", {})
    changed(parameters, "measure.epsilons", [-1.0, 200.0])
    lines = message(parameters).splitlines()
    assert len(lines) == 4
    for where in ("seed", "runs.vgg11.trian", "measure.epsilons.0", "measure.epsilons.1"):
        assert sum(where in line for line in lines) == 1


def test_all_dangling_references_are_reported(parameters):
    changed(parameters, "comparisons.vit.linear", "nobody")
    changed(parameters, "runs.vit_linear.pretrained", "nothing")
    text = message(parameters)
    assert "comparisons.vit.linear" in text
    assert "runs.vit_linear.pretrained" in text


CHECKPOINT = {"method": "checkpoint", "file": "a.safetensors", "sha256": "0" * 64}
SUPERVISION = "supervision belongs to method: checkpoint and published, which need it"


@pytest.mark.parametrize(
    ("made", "refused"),
    [
        ({"method": "mae"}, None),
        ({"method": "published", "supervision": "weakly supervised", "weights": "IMAGENET1K_V1"}, None),
        (CHECKPOINT | {"supervision": "supervised", "title": "ours"}, None),
        ({"method": "published"}, SUPERVISION),
        (CHECKPOINT, SUPERVISION),
        ({"method": "mae", "weights": "IMAGENET1K_V1"}, "weights belongs to method: published"),
        ({"method": "simclr", "supervision": "self-supervised"}, SUPERVISION),
        ({"method": "mae", "supervision": "self-supervised"}, SUPERVISION),
        ({"method": "published", "supervision": "with labels"}, "pretrained.simclr_vit.supervision is 'with labels'"),
        ({"method": "published", "supervision": "supervised", "file": "a", "sha256": "0"}, "file and sha256 belong"),
        (CHECKPOINT | {"supervision": "supervised", "sha256": None}, "it needs both"),
        (CHECKPOINT | {"supervision": "supervised", "url": "https://example.org/a"}, None),
        ({"method": "mae", "url": "https://example.org/a"}, "url belongs to method: checkpoint"),
    ],
)
def test_given_weights_say_how_they_were_made_and_those_made_here_do_not(parameters, made, refused):
    changed(parameters, "pretrained.simclr_vit", {"model": {"architecture": "vit"}, **made})
    if refused is None:
        parse_study(parameters)
    else:
        assert refused in message(parameters)


def test_initial_weights_are_called_by_their_title_or_their_method(parameters):
    names = {}
    for method in ("simclr", "mae"):
        names[method] = parse_study(changed(parameters, "pretrained.simclr_vit.method", method)).pretrained
    assert {method: made["simclr_vit"].name for method, made in names.items()} == {"simclr": "SimCLR", "mae": "MAE"}
    titled = parse_study(changed(parameters, "pretrained.simclr_vit.title", "ours"))
    assert titled.pretrained["simclr_vit"].name == "ours"


AUGREG = {"architecture": "timm/vit_base_patch16_224.augreg_in1k", "mean": [0.5] * 3, "std": [0.5] * 3}
DINO = {"architecture": "timm/vit_base_patch16_224.dino", "mean": [0.4] * 3, "std": [0.2] * 3}


@pytest.mark.parametrize(
    ("other", "share"),
    [
        (DINO, True),
        ({"architecture": "timm/vit_base_patch16_224"}, True),
        (DINO | {"architecture": "timm/vit_base_patch32_224.dino"}, False),
        (DINO | {"blocks": 6}, False),
        ({"architecture": "torchvision/vit_b_16"}, False),
    ],
    ids=lambda value: "" if isinstance(value, bool) else "-".join(map(str, value.values())),
)
def test_networks_are_compared_that_differ_in_their_weights_alone(parameters, other, share):
    """The part of timm's name behind the dot names weights, and each has a normalisation of its own."""
    run = parameters["runs"]["vgg11"]
    parameters["runs"] = {"augreg": run | {"model": AUGREG}, "other": run | {"label": "other", "model": other}}
    parameters["pretrained"] = {}
    parameters["comparisons"]["vit"] |= {"supervised": "augreg", "linear": "other", "finetuned": "other"}
    if share:
        parse_study(parameters)
    else:
        assert message(parameters) == "params.yaml: comparisons.vit: its runs do not share one model"


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({}, None),
        ({"train": {"epochs": 3}}, "its runs differ in more than their labels"),
        ({"model": {"architecture": "vgg11", "width": 0.5}}, "its runs differ in more than their labels"),
        ({"finetune": {"epochs": 1, "lr": 0.02}}, "its runs differ in more than their labels"),
    ],
)
def test_repeats_differ_in_their_labels_alone(parameters, change, refused):
    parameters["runs"]["again"] = parameters["runs"]["vgg11"] | {"label": "VGG11, again"} | change
    parameters["repeats"] = {"vgg": {"label": "VGG11", "runs": ["vgg11", "again"]}}
    if refused is None:
        assert parse_study(parameters).repeats["vgg"].runs == ["vgg11", "again"]
    else:
        assert message(parameters) == f"params.yaml: repeats.vgg: {refused}"


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (["vgg11", "vgg12"], "repeats.vgg.runs: there is no 'vgg12'; did you mean 'vgg11'?"),
        (["vgg11"], "repeats.vgg.runs is ['vgg11']: list should have at least 2 items"),
        (["vgg11", "vgg11"], "repeats.vgg"),  # one network is no spread
    ],
)
def test_repeats_are_two_runs_of_the_study_at_least(parameters, runs, expected):
    parameters["repeats"] = {"vgg": {"label": "VGG11", "runs": runs}}
    assert message(parameters).startswith(f"params.yaml: {expected}")


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_something_other_than_a_mapping_is_refused(content):
    assert message(content).startswith("params.yaml: the study is ")


@pytest.mark.parametrize("kind", ["supervised", "linear", "finetuned"])
def test_runs_that_are_reported_on_other_images_are_not_compared(parameters, kind):
    """Where the search split of given weights is of the test images, they are reported on the other half."""
    given = {"method": "published", "supervision": "supervised", "model": {"architecture": "vit"}}
    parameters["pretrained"]["given"] = given
    run = parameters["runs"]["vit_linear"]
    parameters["runs"]["given"] = {**run, "label": "given", "pretrained": "given"}
    parameters["comparisons"]["vit"][kind] = "given"
    parse_study(parameters)
    parameters["data"]["search_from"] = "test"
    assert "comparisons.vit: data.search_from is test, so some of its runs are reported on half" in message(parameters)
    parameters["comparisons"]["vit"] |= dict.fromkeys(["supervised", "linear", "finetuned"], "given")
    parse_study(parameters)
