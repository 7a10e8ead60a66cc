"""The CUDA kernels that update inverses, on the host: many small matrices and large ones, against inverting afresh."""

from __future__ import annotations

import numpy as np
import pytest

from tests import cases
from tests.cuda_host import host
from tests.cuda_host.host import SCHEDULES
from tests.test_cuda_host import assert_within, normal

SMALL, LARGE, MOST = 99 << 10, 22 << 10, 227 << 10
"""Shared memory of the device, in bytes: with little of it, matrices of more than about 50 rows take the other way."""
WAYS = {"tensor": (MOST, True), "small": (SMALL, False), "large": (LARGE, True)}
"""With it, whether tensor cores are fast: those then update up to 144 rows of float32 if there is enough of it."""


def damped_inverse(batch, d, seed=0, dtype="float32"):
    x = normal(batch, 4 * d + 1, d, seed=seed, dtype="float64")
    inverse = np.linalg.inv(x.swapaxes(1, 2) @ x / (4 * d + 1) + 1e-3 * np.eye(d))
    return ((inverse + inverse.swapaxes(1, 2)) / 2).astype(dtype)


def afresh(inverse, vectors, weight):
    x = vectors.astype(np.float64)
    added = x.swapaxes(1, 2) @ (weight[..., None] * x)
    return np.linalg.inv(np.linalg.inv(inverse.astype(np.float64)) + added)


def check_update(session, batch, d, k, dtype, schedule, weight=None, what=""):
    inverse, vectors = damped_inverse(batch, d, dtype=dtype), normal(batch, k, d, seed=1, dtype=dtype)
    weight = np.ones((batch, k)) if weight is None else weight
    got, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
    assert not status.any(), (what, status)
    if got.size:
        expected = afresh(inverse, vectors, weight)
        scale = np.abs(expected).max((1, 2), keepdims=True)
        assert_within(got, expected, 2e-5 if dtype == "float32" else 1e-13, scale, (batch, d, k, schedule))
    assert np.array_equal(got, got.swapaxes(1, 2)), "exactly symmetric"


@pytest.fixture(params=WAYS)
def sized_session(driver, request):
    memory, tensor_cores = WAYS[request.param]
    session = host.Session(driver, memory, tensor_cores=tensor_cores)
    yield session
    session.close()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inverses_of_awkward_sizes(sized_session, dtype):
    for number, (d, k) in enumerate((d, k) for d in cases.AWKWARD for k in cases.AWKWARD):
        check_update(sized_session, 2, d, k, dtype, SCHEDULES[number % 4])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_inverses_of_batches_and_weights(sized_session, schedule, request):
    rng = np.random.default_rng(0)
    for batch, d, k in [(0, 19, 3), (7, 5, 20), (3, 33, 70), (1, 300, 2)]:  # 300: two slices
        weight = rng.uniform(0.1, 2, (batch, k))
        check_update(sized_session, batch, d, k, "float32", schedule, weight)
    inverse, vectors = damped_inverse(3, 40), 0.3 * normal(3, 20, 40, seed=1)
    there, _ = host.sherman_morrison(sized_session, inverse, vectors, np.ones((3, 20)), schedule)
    back, status = host.sherman_morrison(sized_session, there, vectors, -np.ones((3, 20)), schedule)
    assert not status.any()
    assert_within(back, inverse.astype(np.float64), 3e-5, np.abs(inverse).max((1, 2), keepdims=True))
    # a vector is taken out before it is put in: only the end has to be positive definite
    vectors = np.zeros((1, 2, 4), np.float32)
    vectors[0, :, 0] = 2, 3
    inverse = np.eye(4, dtype=np.float32)[None]
    got, status = host.sherman_morrison(sized_session, inverse, vectors, np.array([[-1.0, 1]]))
    way = request.node.callspec.params["sized_session"]
    bound = {"abs": 3e-7} if way == "tensor" else {}  # of the 1 that 1 / 6 is left of, as products have 21 bits there
    assert not status.any() and got[0, 0, 0] == pytest.approx(1 / 6, **bound)


@pytest.mark.parametrize("dtype, tensor_cores", [("float32", True), ("float32", False), ("float64", True)])
def test_inverses_of_several_tiles_and_panels(driver, dtype, tensor_cores):
    """Panels are of 64 vectors, rounds of 4 panels; tiles of 128 rows or 64. Rows of 261 and 131 are no whole words."""
    session = host.Session(driver, LARGE, tensor_cores=tensor_cores)
    rng = np.random.default_rng(0)
    for number, (batch, d, k) in enumerate([(1, 261, 64), (1, 392, 5), (2, 131, 65), (2, 132, 150), (1, 200, 190)]):
        weight = rng.uniform(0.1, 2, (batch, k))
        check_update(session, batch, d, k, dtype, SCHEDULES[number % 4], weight)
    for d, k in ((130, 120), (140, 280)):  # vectors put in are taken out in part, in a later panel or round
        inverse, vectors = damped_inverse(2, d, dtype=dtype), 0.1 * normal(2, k, d, seed=1, dtype=dtype)
        weight = np.where(np.arange(k) % 2, 1.0, -0.5)[None].repeat(2, 0)
        vectors[:, ::2] = vectors[:, 1::2]
        got, status = host.sherman_morrison(session, inverse, vectors, weight, SCHEDULES[k % 3])
        expected = afresh(inverse, vectors, weight)
        assert not status.any()
        bound = 2e-5 if dtype == "float32" else 1e-13
        assert_within(got, expected, bound, np.abs(expected).max((1, 2), keepdims=True), k)
    session.close()


@pytest.mark.parametrize("d, k, failing", [(128, 110, 40), (195, 190, 189), (131, 200, 3), (259, 270, 269)])
def test_a_later_panel_or_round_fails(driver, d, k, failing):
    """The vector that fails has a negative weight: it is taken last, in a later panel or round than the others."""
    session = host.Session(driver, LARGE)
    inverse, vectors, weight = damped_inverse(2, d), normal(2, k, d, seed=1), np.ones((2, k))
    expected = afresh(inverse, vectors, weight)
    weight[1, failing] = -100
    got, status = host.sherman_morrison(session, inverse, vectors, weight, SCHEDULES[d % 4])
    assert status.tolist() == [0, 1]
    assert np.array_equal(got[1], inverse[1]), "left as it was, bit for bit"
    assert_within(got[0], expected[0], 5e-5, np.abs(expected[0]).max())  # the matrix has shrunk
    session.close()


def test_inverses_of_views(sized_session):
    buffer = np.full((2, 45, 60), 7, np.float32)
    view = buffer[:, 2:42, 3:43]
    view[...] = damped_inverse(2, 40)
    vectors, weight = normal(2, 40, 10, seed=1)[:, :, ::2].swapaxes(1, 2), np.ones((1, 9))[:, ::2]
    got, status = host.sherman_morrison(sized_session, view, vectors, np.broadcast_to(weight, (2, 5)))
    expected = afresh(view, vectors, np.ones((2, 5)))
    assert_within(got[:, 2:42, 3:43], expected, 2e-5, np.abs(expected).max((1, 2), keepdims=True))
    got[:, 2:42, 3:43] = 7
    assert not status.any() and (got == 7).all(), "nothing outside the view is written"


@pytest.mark.parametrize("tensor_cores", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_small_inverses_of_full_size(driver, schedule, tensor_cores):
    """What fits a large GPU only; the last block of vectors full or not, weights of both signs, rows not of words."""
    session = host.Session(driver, MOST, tensor_cores=tensor_cores)
    try:
        for batch, d, k, dtype in [
            (2, 64, 64, "float32"),
            (1, 144, 144, "float32"),
            (1, 131, 37, "float32"),
            (1, 66, 17, "float64"),
            (1, 190, 33, "float32"),  # more columns than one pass of the threads takes
        ]:
            check_update(session, batch, d, k, dtype, schedule)
        for d, k in ((64, 48), (37, 33), (97, 81)):
            inverse, vectors = damped_inverse(7, d), 0.2 * normal(7, k, d, seed=1)
            weight = np.random.default_rng(2).uniform(0.1, 1, (7, k))
            weight[::2, ::3] *= -0.1  # all others keep the order of the vectors
            got, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
            expected = afresh(inverse, vectors, weight)
            assert not status.any()
            assert_within(got, expected, 2e-5, np.abs(expected).max((1, 2), keepdims=True))
    finally:
        session.close()


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_vectors_are_those_numbers_in_float32(sized_session, kind):
    inverse, vectors, weight = damped_inverse(2, 60), normal(2, 37, 60, seed=1), np.ones((2, 37))
    if kind == "float16":
        half = vectors.astype(np.float16)
        exact = half.astype(np.float32)
    else:
        half = (vectors.view(np.uint32) >> 16).astype(np.uint16)
        exact = (half.astype(np.uint32) << 16).view(np.float32)
    got, status = host.sherman_morrison(sized_session, inverse, half, weight, kind=kind)
    assert not status.any()
    assert np.array_equal(got, host.sherman_morrison(sized_session, inverse, exact, weight)[0])


@pytest.mark.parametrize("fault", ["indefinite update", "indefinite before", "nan vector", "inf inverse", "nan weight"])
def test_bad_matrix_is_left_and_named(sized_session, fault):
    for d in (5, 60):
        inverse, vectors, weight = damped_inverse(3, d), normal(3, 80, d, seed=1), np.ones((3, 80))
        expected = afresh(inverse, vectors, weight)
        if fault == "indefinite update":
            weight[1, 70] = -100
        elif fault == "indefinite before":
            inverse[1] *= -1
        elif fault == "nan vector":
            vectors[1, 79, d - 1] = np.nan
        elif fault == "inf inverse":
            inverse[1, d - 1, d - 1] = np.inf
        else:
            weight[1, 3] = np.nan
        got, status = host.sherman_morrison(sized_session, inverse, vectors, weight, SCHEDULES[d % 4])
        assert status.tolist() == [0, 1 if fault.startswith("indefinite") else 2, 0]
        assert np.array_equal(got[1], inverse[1]), "left as it was, bit for bit"
        assert_within(got[::2], expected[::2], 2e-5, np.abs(expected[::2]).max((1, 2), keepdims=True))


def test_removing_to_the_brink_is_refused(sized_session):
    x = normal(1, 1, 60)
    inverse = (np.eye(60, dtype=np.float32) / np.float32((x**2).sum()))[None]
    got, status = host.sherman_morrison(sized_session, inverse, x, -np.ones((1, 1)))
    assert status.tolist() == [1] and np.array_equal(got, inverse)
