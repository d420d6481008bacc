"""A secret takes the seed's place in every draw, stays in its file, and comes back the same."""

import os
import stat
from typing import Literal

import jax
import numpy as np
import pytest

from capsfl.federated import Federation, RoundsConfig
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import root_name
from capsfl.federated.hospitals import stack_hospitals
from capsfl.learning.tasks import Task
from capsfl.privacy import PrivacyConfig, PrivacyError
from capsfl.privacy.secret import SecretError, fingerprint_key, open_secret, root_key


def test_a_secret_is_drawn_once_and_read_by_its_owner_alone(tmp_path):
    place = tmp_path / "keys" / "noise.secret"
    first = open_secret(place, begun=False)
    assert len(first) == 32
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert open_secret(place, begun=True) == first
    assert open_secret(tmp_path / "other.secret", begun=False) != first
    assert os.listdir(place.parent) == ["noise.secret"], "nothing half-written"


def test_a_secret_that_is_gone_damaged_or_open_to_others_is_refused(tmp_path):
    place = tmp_path / "noise.secret"
    with pytest.raises(SecretError, match=r"noise\.secret: missing, and the run has rounds"):
        open_secret(place, begun=True)
    assert not place.exists()
    open_secret(place, begun=False)
    place.chmod(0o640)
    with pytest.raises(SecretError, match="others can read it"):
        open_secret(place, begun=True)
    place.chmod(0o600)
    for content in ("", "abc", "00" * 31, "zz" * 32):
        place.write_text(content)
        with pytest.raises(SecretError, match="not a secret of 32 bytes"):
            open_secret(place, begun=True)


def test_keys_follow_secret_and_name_and_not_the_seed():
    def bits(**words):
        return jax.random.key_data(root_key(**({"seed": 1, "name": "a", "secret": b"s" * 32} | words))).tolist()

    assert bits() == bits(seed=2)
    assert len({tuple(bits(**words)) for words in ({}, {"name": "b"}, {"secret": b"t" * 32}, {"secret": None})}) == 4
    fingerprint = jax.random.key_data(fingerprint_key(seed=1, name="a", secret=b"s" * 32)).tolist()
    assert fingerprint != bits()
    same = jax.random.key_data(fingerprint_key(seed=1, name="a")).tolist()
    assert same == bits(secret=None), "of a seed, which is no secret, the key itself"


def test_the_published_seed_does_not_draw_the_noise_of_a_secret_run():
    task = Task("zero", lambda w, batch: 0.0 * w.sum(), lambda *_: {}, np.zeros(500, np.float32), lambda w: w)
    rows = stack_hospitals({"A": {"x": np.ones((2, 1), np.float32)}})

    def noise(secret, noise_key: Literal["seed", "secret"] = "secret"):
        privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0, noise_key=noise_key)
        chunk = DevicesConfig(chunk=1)
        engine = Federation(task, rows, config=RoundsConfig(), privacy=privacy, devices=chunk, secret=secret)
        return np.asarray(engine.step(engine.init())[0].parameters)

    secret, other, seed = noise(b"s" * 32), noise(b"t" * 32), noise(None, "seed")
    assert np.array_equal(secret, noise(b"s" * 32))
    assert abs(np.corrcoef([secret, other, seed]) - np.eye(3)).max() < 0.2
    with pytest.raises(PrivacyError, match=r"privacy\.noise_key = secret: needs a secret"):
        noise(None)
    with pytest.raises(PrivacyError, match=r"privacy\.noise_key = seed"):
        noise(b"s" * 32, "seed")


def test_rounds_with_noise_of_other_patient_numbers_draw_from_another_name():
    private = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0, unit="patient", expected_patients=2)
    rounds = RoundsConfig()
    names = {root_name("run", "task", rounds, private, counts) for counts in [(), (("a", 5),), (("a", 6),)]}
    assert len(names) == 3
