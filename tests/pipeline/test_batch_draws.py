"""Tables of random numbers that an image's number indexes."""

import numpy as np
from scipy import stats

from pipeline.batch_draws import DrawTable

UNLIKELY = 1e-3
GOLDEN = [0.64372027, 0.88345408, 0.65454262]  # changed numbers would break the resume of runs


def table(seed=0, num_images=40, num_draws=6):
    return DrawTable(seed, num_images, num_draws, num_noise=2000)


def row(index=3, epoch=0, repeat=0, **settings):
    return table(**settings).rows(epoch, np.array([index]), np.array([repeat]))[0]


def test_a_row_depends_on_seed_epoch_image_and_repeat():
    rows = [row(i, e, r, seed=s) for i in (3, 4) for e in (0, 1) for r in (0, 1) for s in (0, 1)]
    assert len({each.tobytes() for each in rows}) == 16
    np.testing.assert_array_equal(row(), rows[0])
    np.testing.assert_allclose(rows[0][:3], GOLDEN, atol=1e-7)


def test_rows_of_a_batch_are_those_of_its_images():
    indices, repeats = np.array([5, 0, 5, 39, 5]), np.array([1, 0, 2, 1, 1])
    of_one = table()
    of_one.rows(7, np.array([1]), np.array([0]))  # another epoch's rows were read before
    rows = of_one.rows(2, indices, repeats)
    assert rows.shape == (5, 6) and rows.dtype == np.float32
    for place, (index, repeat) in enumerate(zip(indices, repeats, strict=True)):
        np.testing.assert_array_equal(rows[place], row(index, 2, repeat))


def test_numbers_are_uniform_and_noise_is_normal():
    rows = table(num_images=2000).rows(0, np.arange(2000), np.zeros(2000, int))
    for column in rows.T:
        assert stats.kstest(column, "uniform").pvalue > UNLIKELY
    assert abs(np.corrcoef(rows.T) - np.eye(6)).max() < 0.1
    noise = table().noise(0)
    assert noise.shape == (2000,) and stats.kstest(noise.numpy(), "norm").pvalue > UNLIKELY
    assert (noise != table().noise(1)).all() and (noise != table(seed=1).noise(0)).all()
