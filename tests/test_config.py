import pytest

from utilized_rank.config import Study, StudyError, load_study, parse_study, project_root

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


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("precision", "auto"),
        ("measure.criterion", "utilized"),
        ("measure.precision", "bfloat16"),
        ("measure.rows", None),
        ("decompose.objective", "latency"),
    ],
)
def test_what_may_be_chosen(parameters, path, value):
    section = parse_study(changed(parameters, path, value))
    for name in path.split("."):
        section = getattr(section, name)
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
    ("path", "value"),
    [
        ("seed", -1),
        ("precision", "float16"),
        ("data.image_size", 4),
        ("data.search_fraction", 1.5),
        ("data.test_fraction", 0),
        ("runs.vgg11.train.epochs", 0),
        ("runs.vgg11.train.lr", 0),
        ("runs.vgg11.train.lr", "fast"),
        ("runs.vgg11.train.lr", float("nan")),
        ("runs.vgg11.train.lr", float("inf")),
        ("runs.vgg11.model.architecture", "vgg12"),
        ("measure.epsilons", []),
        ("measure.epsilons", [-1.0]),
        ("measure.epsilons", [101.0]),
        ("measure.criterion", "both"),
        ("measure.precision", "float16"),
        ("measure.rows", 0),
        ("decompose.methods", ["optimum"]),
        ("decompose.objective", "size"),
        ("decompose.latency_images", 0),
        ("name", "a.b"),
    ],
)
def test_a_value_out_of_range_is_named(parameters, path, value):
    text = message(changed(parameters, path, value))
    assert text.startswith(f"params.yaml: {path}")


def test_the_message_shows_the_value(parameters):
    assert "data.image_size is 4: input should be greater than or equal to 8" in message(
        changed(parameters, "data.image_size", 4)
    )


def test_a_missing_key_is_named(parameters):
    assert "runs.vgg11.train is missing" in message(changed(parameters, "runs.vgg11.train", REMOVED))


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
        ("data.test_fraction", 0.8, "must leave something to train on"),
        ("pretrained.simclr_vit.method", "checkpoint", "file and sha256"),
        ("pretrained.simclr_vit.file", "a.safetensors", "file and sha256"),
        ("decompose.finetuned", ["svd"], "finetuned names ['svd'], which methods does not build"),
    ],
)
def test_contradictions_are_refused(parameters, path, value, expected):
    parameters["decompose"] = {"methods": ["optimal"], "finetuned": ["optimal"]}
    assert expected in message(changed(parameters, path, value))


def test_none_is_no_name_for_an_encoder(parameters):
    parameters["pretrained"]["none"] = parameters["pretrained"]["simclr_vit"]
    assert "pretrained.none is taken" in message(parameters)


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


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_something_other_than_a_mapping_is_refused(content):
    assert message(content).startswith("params.yaml: the study is ")


YAML = """
name: toy
title: Toy
data: {source: sklearn, dataset: digits, image_size: 32, search_fraction: 0.2, test_fraction: 2e-1}
runs:
  vgg11:
    label: VGG11
    model: {architecture: vgg11}
    train: {epochs: 1, lr: 1e-3}
    finetune: {epochs: 1, lr: 5e-4}
measure: {calibration_images: 10, epsilons: [1]}
decompose: {methods: [svd], finetuned: [svd]}
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "params.yaml").write_text(YAML)
    return tmp_path


def test_scientific_notation_is_a_number_as_in_dvc(project):
    study = load_study(project)
    assert study.runs["vgg11"].train.lr == 0.001
    assert study.data.test_fraction == 0.2


def test_the_project_is_found_from_a_folder_inside_it(project, monkeypatch):
    (project / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(project / "deep" / "er")
    assert project_root() == project
    assert isinstance(load_study(), Study)


def test_outside_of_a_project_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=r"no params\.yaml in"):
        project_root()


def test_a_missing_file_is_a_study_error(tmp_path):
    with pytest.raises(StudyError, match=r"params\.yaml cannot be read"):
        load_study(tmp_path)


@pytest.mark.parametrize("text", ["runs: [", "seed: 1\nseed: 2\n"], ids=["syntax", "key given twice"])
def test_broken_yaml_is_a_study_error(project, text):
    (project / "params.yaml").write_text(text)
    with pytest.raises(StudyError, match=r"params\.yaml is not valid YAML"):
        load_study(project)
