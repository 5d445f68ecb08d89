"""Each sample's random stream follows from (seed, pass, sample), whatever the sample is called."""

from __future__ import annotations

import random

import numpy as np
import torch

from paceline.data.fetch import seed_sample


def drawn(key: int, index: object) -> tuple[float, float, float]:
    seed_sample(key, index)
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_an_index_is_the_same_sample_in_any_integer_type():
    for index in (np.int64(41), np.int32(41), torch.tensor(41)):
        assert drawn(5, index) == drawn(5, 41)


def test_samples_called_by_texts_have_streams_of_their_own():
    names = [f"{folder}/{i}/image.png" for folder in "ab" for i in range(50)]
    assert len({drawn(5, name) for name in names}) == len(names)
    assert drawn(5, names[0]) == drawn(5, names[0])


def test_streams_differ_by_key_and_by_generator():
    assert drawn(5, 1) != drawn(6, 1)
    assert len(set(drawn(5, 1))) == 3
