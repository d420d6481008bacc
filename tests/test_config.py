"""Configurations: strict, hashable, and refused with file, dotted field, value and remedy."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.config import ArmConfig, ConfigError, StudyConfig, choose_by_name, load_config
from capsfl.sweeps.config import load_sweep

ROOT = Path(__file__).resolve().parent.parent
GOOD = """
[phantom]
patients = 9

[segmentation]
rounds = 2

[privacy]
clip_norm = 1.0
"""


def load(tmp_path: Path, text: str) -> StudyConfig:
    """Reads a configuration from a file."""
    file = tmp_path / "study.toml"
    file.write_text(text)
    return load_config(file)


# Those of `capsfl bench mnist` are read in tests/test_bench_mnist.py.
STUDIES = [path for path in sorted((ROOT / "configs").glob("*.toml")) if not path.name.startswith("mnist")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_configuration_of_the_repository_is_valid_and_hashable(path: Path):
    read = load_sweep if "\n[sweep]\n" in path.read_text() else load_config
    config = read(path)
    assert hash(config) == hash(read(path))
    assert config.out.startswith("runs/")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        pytest.param("seeds = 1", "seeds", "unknown key", id="unknown key"),
        pytest.param("[privacy]\nclip_norm = 1.0\nnoises = 1.0", "privacy.noises", "unknown key", id="key below"),
        pytest.param("seed = 1.0", "seed", "= 1.0", id="float for int"),
        pytest.param("seed = true", "seed", "= true", id="bool for int"),
        pytest.param("[privacy]\nclip_norm = '1'", "privacy.clip_norm", '= "1"', id="string for float"),
        pytest.param("phantom = 3", "phantom", "= 3", id="number for table"),
        pytest.param("data = [1]", "data", "= [1]", id="array for table"),
        pytest.param("arms = 'all'", "arms", '= "all"', id="string for array"),
        pytest.param("[data]\nfield = [8, 8]", "data.field.2", "missing; add it", id="short tuple"),
        pytest.param("[privacy]\nclip_norm = 0", "privacy.clip_norm", "= 0", id="out of range"),
        pytest.param("[[arms]]\nclip_norm = -1.0", "arms.0.clip_norm", "= -1.0", id="out of range in a list"),
        pytest.param("[privacy]\nclip_norm = 1.0\nsampler = 'often'", "privacy.sampler", '"often"', id="bad choice"),
        pytest.param("[privacy]\nclip_norm = inf", "privacy.clip_norm", "inf", id="infinity"),
        pytest.param("[privacy]\nclip_norm = nan", "privacy.clip_norm", "nan", id="not a number"),
        pytest.param("[[arms]]\nclip_norm = nan", "arms.0.clip_norm", "nan", id="not a number in a list"),
        pytest.param("seed = 2020-01-01", "seed", "2020-01-01", id="date"),
        pytest.param("seed = 07:32:00", "seed", "07:32:00", id="time"),
        pytest.param("[privacy]\ndelta = 1e-5", "privacy.clip_norm", "missing; add it", id="missing"),
    ],
)
def test_a_bad_value_is_refused_by_file_field_and_value(tmp_path: Path, text: str, field: str, value: str):
    # Keys before tables, and no section twice.
    sections = [section for section in GOOD.strip().split("\n\n") if section.split("\n")[0].strip("[]") not in text]
    whole = "\n\n".join([*sections, text] if text.startswith("[") else [text, *sections])
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, whole)
    lines = str(refusal.value).splitlines()
    assert all(line.startswith(f"{tmp_path / 'study.toml'}: ") for line in lines)
    assert any(field in line and value in line for line in lines), lines


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("seed = 1\nseed = 2", "Cannot overwrite a value"),
        ("seed = ", "Invalid value"),
        ("[privacy\n", "line 1"),
    ],
)
def test_broken_toml_is_refused_by_file_and_reason(tmp_path: Path, text: str, what: str):
    with pytest.raises(ConfigError, match=rf"study\.toml: not valid TOML: .*{what}"):
        load(tmp_path, text)


def test_an_absent_file_a_folder_and_bytes_are_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file or directory; name a readable TOML file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=f"{tmp_path}: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.toml: not valid TOML"):
        load_config(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[phantom]\n", "neither \\[segmentation\\] nor \\[classification\\]"),
        (
            "[phantom]\n[segmentation]\n[[arms]]\nmodel={name='vgg16'}\n",
            r"arms.0.model: there is no \[classification\]",
        ),
        ("[phantom]\n[classification]\nclass_weights=[1.0]\n", r"class_weights = \[1.0\]: expected 2 weights"),
        ("[segmentation]\n", "data.source: empty, and there is no \\[phantom\\]"),
        ("[phantom]\n[segmentation]\n[[arms]]\nname='a'\n[[arms]]\nname='a'\n", "different names"),
        ("arms = []\n[phantom]\n[segmentation]\n", "at least one arm"),
        ("[phantom]\n[segmentation]\n[[arms]]\nname='../../etc'\n", "arms.0.name"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "{ name = 'resnet51' }",
            r"classification\.model = .*: unknown network; its name is one of capsnet, .*resnet50,",
        ),
        ("{ name = 'vgg16', depth = 3 }", r"classification\.model\.depth unknown key"),
        ("{ conv_channels = 3 }", r"classification\.model\.image_size missing"),
        ("{ name = 'inceptionv3', image_size = 64 }", r"image_size 64: inceptionv3 needs images of at least 75 pixels"),
        ("3", r"classification\.model = 3: unknown network"),
    ],
)
def test_a_bad_network_is_refused_with_what_there_is(tmp_path: Path, model: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, f"[phantom]\n[classification]\nmodel = {model}\n")


def test_a_network_is_a_capsnet_unless_named_and_takes_the_sections_classes_and_size(tmp_path: Path):
    table = (
        "[phantom]\n[classification]\nclasses = 3\nimage_size = 80\nmodel = { image_size = 28, conv_channels = 8 }\n"
    )
    arms = "[[arms]]\n[[arms]]\nname = 'resnet'\nmodel = { name = 'resnet50', norm = 'group' }\n"
    study = load(tmp_path, table + arms)
    found = []
    for arm in study.arms:
        stage = study.arm(arm).classification
        assert stage is not None
        found.append((stage.network.name, stage.network.classes, stage.network.image_size, stage.side))
    assert found == [("capsnet", 3, 80, 80), ("resnet50", 3, 80, 80)]
    with pytest.raises(ConfigError, match=r"arms\.1\.model: image_size 72: inceptionv3 needs"):
        load(
            tmp_path,
            (table + arms).replace("resnet50", "inceptionv3").replace("= 80", "= 72").replace(", norm = 'group'", ""),
        )


def test_all_bad_fields_are_named_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, "seed = -1\n" + GOOD.replace("rounds = 2", "rounds = 0"))
    assert [line.split(": ")[1].split(" ")[0] for line in str(refusal.value).splitlines()] == [
        "seed",
        "segmentation.rounds",
    ]


def test_the_digest_covers_what_decides_the_result_and_nothing_else(tmp_path: Path):
    config = load(tmp_path, GOOD)
    digest = config.digest()
    assert digest == load(tmp_path, "# another comment\n" + GOOD).digest()
    elsewhere = config.model_copy(update={"out": "elsewhere"})
    assert elsewhere.digest() == digest
    on_devices = config.model_copy(update={"devices": config.devices.model_copy(update={"parallel": "pmap"})})
    assert on_devices.digest() == digest
    plainer = config.model_copy(update={"report": config.report.model_copy(update={"interpretation": False})})
    assert plainer.digest() == digest
    for change in ({"seed": 1}, {"keep_checkpoints": 2}, {"arms": (ArmConfig(name="other"),)}):
        assert config.model_copy(update=change).digest() != digest


@given(clip=st.floats(1e-3, 1e3), noise=st.floats(0, 10), partition=st.sampled_from(["hospitals", "pooled", "local"]))
def test_an_arm_replaces_only_what_it_names_and_spends_no_privacy_alone(clip: float, noise: float, partition: str):
    arm = ArmConfig.model_validate({"name": "x", "clip_norm": clip, "partition": partition})
    study = StudyConfig.example()
    privacy = study.privacy.model_copy(update={"noise_multiplier": noise, "sampler": "poisson", "target_epsilon": 3.0})
    found = study.model_copy(update={"privacy": privacy}).arm(arm)
    assert found.privacy.clip_norm == clip
    assert found.arms == (arm,)
    assert found.privacy.delta == privacy.delta
    if partition == "hospitals":
        assert found.privacy == privacy.model_copy(update={"clip_norm": clip})
    else:
        assert (found.privacy.sampler, found.privacy.noise_multiplier) == ("all", 0.0)
        assert found.privacy.target_epsilon is None


def test_an_arm_of_another_seed_keeps_the_split_of_patients(tmp_path: Path):
    study = load(tmp_path, GOOD + "[[arms]]\nname = 'a'\n[[arms]]\nname = 'b'\nseed = 9\n")
    first, second = (study.arm(arm) for arm in study.arms)
    assert (first.seed, second.seed) == (study.seed, 9)
    assert first.split_seed == second.split_seed == study.split_seed == study.seed
    assert first.data == study.data, "what no arm asks for changes no digest"
    pinned = study.model_copy(update={"data": study.data.model_copy(update={"split_seed": 4}), "seed": 1})
    assert [pinned.arm(arm).split_seed for arm in pinned.arms] == [4, 4]
    for arms in ("[[arms]]\nseed = -1\n", "[[arms]]\nseed = true\n"):
        with pytest.raises(ConfigError, match=r"arms\.0\.seed"):
            load(tmp_path, GOOD + arms)
    with pytest.raises(ConfigError, match=r"data\.split_seed = 1\.5"):
        load(tmp_path, GOOD + "[data]\nsplit_seed = 1.5\n")


def test_a_configuration_survives_json():
    study = StudyConfig.example()
    assert StudyConfig.model_validate_json(json.dumps(study.model_dump(mode="json"))) == study


def test_a_name_on_the_command_line_brings_its_section_along(tmp_path: Path):
    study = load(tmp_path, "[phantom]\n[segmentation]\n[classification]\n")
    words = [
        "--classification.model.name",
        "resnet50",
        "--data.collection.name=covid-ct",
        "--segmentation.model.name",
        "unet",
    ]
    found = choose_by_name(study, words)
    assert found.classification is not None
    assert found.segmentation is not None
    assert (found.classification.network.name, found.segmentation.model.name) == ("resnet50", "unet")
    assert found.data.collection is not None
    assert found.data.collection.name == "covid-ct"
    assert choose_by_name(study, ["--classification.model.name", "capsnet", "--seed", "1"]) == study
    with pytest.raises(ConfigError, match=r"classification\.model = .*unknown network; its name is one of capsnet"):
        choose_by_name(study, ["--classification.model.name", "resnet"])
    with pytest.raises(ConfigError, match=r"data\.collection\.name"):
        choose_by_name(study, ["--data.collection.name", "nowhere"])
