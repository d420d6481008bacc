"""What a model card says about the images that a model takes."""

from dataclasses import replace

import pytest

from capsfl.config import ClassificationStage, DataConfig, SegmentationStage, StudyConfig
from capsfl.ct.collections import CollectionConfig
from capsfl.ct.normalize import VolumeConfig
from capsfl.export.card import CardModel, model_card
from capsfl.export.run import _programs

MODEL = CardModel("classification", "capsnet", 1, 1, "ab", "images", {"classification/program.stablehlo": "cd"})
LEDGER = {"blocks": 1, "head": "h", "chain_id": "c", "root": "r"}


def card_of(config: StudyConfig, *kinds: str) -> str:
    return model_card(config, {}, LEDGER, [MODEL], holders={"A": 1}, version="0", kinds=kinds)


@pytest.fixture(scope="module")
def pictures() -> StudyConfig:
    collection = CollectionConfig(name="covid-ct", side=96, fit="pad", levels="kept")
    return StudyConfig(data=DataConfig(source="x", collection=collection), classification=ClassificationStage())


def test_a_card_of_pictures_says_how_they_were_made_and_names_no_window(pictures: StudyConfig):
    card = card_of(pictures, "pictures")
    assert "Pictures, whose grey values are not Hounsfield units: 96 pixels a side, fit pad, levels kept." in card
    assert "window" not in card.lower()
    assert "Standard volumes" not in card
    listed = pictures.model_copy(update={"data": DataConfig(source="x")})
    assert "64 pixels a side, fit stretch, levels standardized." in card_of(listed, "pictures"), "of a manifest"
    _, _, words = _programs(pictures, "classification", ("pictures",))
    assert words.endswith("in [0, 1]: grey pictures")


def test_a_card_names_the_weights_that_training_began_with_by_their_digest(pictures: StudyConfig):
    assert "- classification: trained from random weights." in card_of(pictures, "pictures")
    began = replace(MODEL, initial=("resnet50_notop.h5", "ab" * 32))
    card = model_card(pictures, {}, LEDGER, [began], holders={"A": 1}, version="0", kinds=["pictures"])
    assert f"trained from the weights of the file resnet50_notop.h5, SHA-256 `{'ab' * 32}`" in card


def test_a_card_of_volumes_says_through_which_window_they_are_seen():
    data = DataConfig(source="x", field=(64, 96, 96))
    config = StudyConfig(data=data, segmentation=SegmentationStage(), classification=ClassificationStage())
    card = card_of(config, "volume")
    assert "preset tiny (128 voxels a side, of it the central 64 x 96 x 96)" in card
    assert "Window (level/width): -600/1600 HU for all scanners." in card
    assert "Pictures" not in card
    own = config.model_copy(update={"data": DataConfig(source="x", volumes=VolumeConfig(window="scanner"))})
    assert "of the scan's own scanner: A1 -600/1200 HU," in card_of(own, "volume")
    for stage in ("segmentation", "classification"):
        assert "their scanner's window" in _programs(own, stage, ("volume",))[2]
        assert "the lung window" in _programs(config, stage, ("volume",))[2]
