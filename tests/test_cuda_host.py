"""The CUDA kernels, the very same files, on the host: threads as fibers, under the address sanitizer, against NumPy.

Threads run forward, backward and in random order, blocks too; every buffer is allocated to the byte. This stands in for
the correctness of the kernels where there is no GPU, never for their speed.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests import cases
from tests.cuda_host import host
from tests.cuda_host.host import SCHEDULES

BOUND = {"float32": 1e-6, "float64": 4e-15, "float16": 1e-6, "bfloat16": 1e-6}


@pytest.fixture
def session(driver):
    session = host.Session(driver)
    yield session
    session.close()


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_within(got, expected, bound, scale=None, what=""):
    assert got.shape == expected.shape
    if not expected.size:
        return
    error = np.abs(got.astype(np.float64) - expected)
    ratio = np.where(error == 0, 0, error / np.maximum(np.abs(expected) if scale is None else scale, 1e-300))
    worst = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
    assert ratio[worst] <= bound, (
        f"{what} at {tuple(map(int, worst))}: got {got[worst]}, expected {expected[worst]}, {ratio[worst]:.3g}"
    )


def distances(a, b):
    return 0.5 * ((a.astype(np.float64)[:, :, None] - b.astype(np.float64)[:, None]) ** 2).sum(-1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_distances_of_awkward_sizes(session, dtype):
    shapes = [(n, m, d) for n in cases.AWKWARD for m in cases.AWKWARD for d in cases.AWKWARD if len({n, m, d}) == 3]
    for number, (n, m, d) in enumerate([*shapes, (129, 3, 17), (5, 260, 8), (70, 65, 300)]):
        a, b = normal(1, n, d, seed=1), normal(1, m, d, seed=2)
        kind = dtype
        if dtype == "bfloat16":
            a, b = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
            exact = [(x.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
        else:
            exact = a, b = a.astype(dtype), b.astype(dtype)
        got = host.neuron_distances(session, a, b, schedule=SCHEDULES[number % 4], kind=kind)
        assert_within(got, distances(*exact), BOUND[dtype], what=(n, m, d))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("dtype, out", [("float32", ""), ("float64", ""), ("float64", "float32")])
def test_distances_of_batches_and_slices(session, dtype, out, schedule):
    """Float32, for three processors: 132 x 130 in large tiles, two each way; others in tiles of 32 x 32, 1600 columns
    of them in slices and 1200 in two runs of a thread's. Else tiles are large from 6 of them on, of 256 columns each;
    1200 and 1600 columns are shared out. 24 is 6 words a row."""
    shapes = [(0, 3, 3, 3), (3, 19, 7, 24), (7, 5, 3, 24), (2, 3, 5, 1200), (1, 132, 130, 33), (1, 3, 5, 1600)]
    shapes += [(1, 111, 99, 111), (1, 111, 99, 112)]
    for batch, n, m, d in [*shapes, (2, 132, 130, 33)]:
        a, b = normal(batch, n, d, seed=1, dtype=dtype), normal(batch, m, d, seed=2, dtype=dtype)
        got = host.neuron_distances(session, a, b, out, schedule)
        assert_within(got, distances(a, b), BOUND[out or dtype], what=(batch, n, m, d))


def test_distances_of_large_tiles_in_runs(session):
    """Many columns, and large tiles all the same: the sums of runs are added up in the result."""
    for d, schedule in ((140, SCHEDULES[2]), (133, SCHEDULES[1])):
        a, b = normal(1, 372, d, seed=1), normal(1, 120, d, seed=2)
        got = host.neuron_distances(session, a, b, schedule=schedule)
        assert_within(got, distances(a, b), BOUND["float32"])


@pytest.mark.parametrize("dtype, out", [("float32", ""), ("float64", ""), ("float64", "float32")])
def test_nearly_equal_rows(session, dtype, out):
    """Rows 1e-4 apart in float32, 1e-9 in float64: the difference counts, not the rows."""
    a = normal(1, 20, 576, dtype=dtype)
    b = a + (1e-4 if dtype == "float32" else 1e-9) * normal(1, 20, 576, seed=1, dtype=dtype)
    got = host.neuron_distances(session, a, b, out)
    assert_within(got, distances(a, b), 1e-6 if out or dtype == "float32" else 1e-13)
    assert not host.neuron_distances(session, a, a, out)[0].diagonal().any(), "equal rows are at distance 0"


def test_distances_of_views(session):
    wide = normal(2, 40, 44)
    for a, b in [
        (wide[:, :19, 1:30:2], wide[:, 20:, ::3]),  # columns with a stride
        (wide[:, ::2, 4:24], wide[:, 1:8, 4:24]),  # 16-byte words at an offset
        (wide[:, ::2, 3:24], wide[::-1, 1:8, 3:24]),  # not aligned; a negative stride
        (wide.transpose(0, 2, 1), wide.transpose(0, 2, 1)[:, :5]),
        (np.broadcast_to(wide[:1, :9], (2, 9, 44)), wide),
    ]:
        depth = min(a.shape[-1], b.shape[-1])
        a, b = a[..., :depth], b[..., :depth]
        assert_within(host.neuron_distances(session, a, b), distances(a, b), 1e-6)


def test_nan_and_inf_stay_with_their_pairs(session):
    for dtype, out in (("float32", ""), ("float64", "float32")):
        a, b = normal(1, 19, 50, dtype=dtype), normal(1, 21, 50, seed=1, dtype=dtype)
        a[0, 3, 7], b[0, 5, 49] = np.nan, np.inf
        got = host.neuron_distances(session, a, b, out)[0]
        assert np.isnan(got[3]).all() and np.isinf(got[:3, 5]).all()
        keep = np.ones_like(got, dtype=bool)
        keep[3], keep[:, 5] = False, False
        assert np.isfinite(got[keep]).all()


def greedy(matrix, count):
    """All pairs in order of (cost, row, column), each taken if both are free."""
    m = matrix.shape[1]
    rows, columns, pairs = set(), set(), []
    for e in np.argsort(matrix.reshape(-1), kind="stable"):
        i, j = divmod(int(e), m)
        if len(pairs) < count and i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            pairs.append((i, j))
    return np.array(pairs, np.int64).reshape(count, 2)


def check_matching(session, distances, count, schedule):
    pairs, status = host.match_neurons(session, distances, count, schedule)
    assert (status == -1).all()
    for matrix, got in zip(distances, pairs, strict=True):
        assert np.array_equal(got, greedy(matrix, count)), (distances.shape, count, schedule)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_matching_of_awkward_sizes(session, dtype):
    for number, (n, m) in enumerate((n, m) for n in cases.AWKWARD for m in cases.AWKWARD):
        distances = normal(2, n, m, dtype=dtype)
        for count in sorted({0, min(1, n, m), min(n, m) // 2, min(n, m)}):
            check_matching(session, distances, count, SCHEDULES[(number + count) % 4])
    wide = normal(4, 60, 80, dtype=dtype)
    check_matching(session, wide[::2, 5:45:2, ::3].transpose(0, 2, 1), 15, SCHEDULES[2])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_matching_of_structured_costs(session, schedule):
    i, j = np.arange(33, dtype=np.float32)[:, None], np.arange(40, dtype=np.float32)[None]
    for matrix in (
        0 * (i + j),  # all equal
        i + j,  # one pair at a time
        j + 0 * i,  # every row likes the same column
        np.abs(i - j),
        (i * 7919 + j * 104729) % 5,  # many ties
        np.where((i + j) % 3 == 0, np.inf, (i * j) % 7),
        np.where((i + j) % 2 == 0, np.float32(-0.0), np.float32(0)),
    ):
        matrix = matrix.astype(np.float32)
        check_matching(session, np.stack([matrix, matrix + 1]), 33, schedule)
        check_matching(session, matrix.T[None], 20, schedule)


def test_matching_names_the_first_nan(session):
    distances = normal(3, 40, 50)
    distances[1, 35, 49] = distances[1, 36, 0] = np.nan
    pairs, status = host.match_neurons(session, distances, 7)
    assert status.tolist() == [-1, 35 * 50 + 49, -1] and (pairs[1] == -1).all()
    assert np.array_equal(pairs[2], greedy(distances[2], 7))


def second_moment(x, kernel, stride, padding, dilation, groups):
    """By slices of the padded image, one for every offset: [groups, C / groups k, positions], times itself."""
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *((p, p) for p in padding)])
    ends = [size - d * (k - 1) for size, k, d in zip(x.shape[2:], kernel, dilation, strict=True)]
    patches = [
        x[:, :, u : u + ends[0] : stride[0], v : v + ends[1] : stride[1]]
        for u in range(0, kernel[0] * dilation[0], dilation[0])
        for v in range(0, kernel[1] * dilation[1], dilation[1])
    ]
    patches = np.stack(patches, 2)  # [N, C, k, oy, ox]
    n, c, k, across, down = patches.shape
    patches = patches.reshape(n, groups, c // groups * k, across * down).transpose(1, 2, 0, 3)
    patches = patches.reshape(groups, c // groups * k, n * across * down)
    return patches @ patches.swapaxes(1, 2)


def check_moment(session, x, arguments, schedule, kind="", exact=None):
    got, status = host.conv2d_second_moment(session, x, *arguments, schedule, kind)
    expected = second_moment(x if exact is None else exact, *arguments)
    diagonal = np.diagonal(expected, axis1=1, axis2=2)
    scale = np.sqrt(diagonal[:, :, None] * diagonal[:, None])
    assert status == 0
    assert_within(got, expected, 1e-14 if got.dtype == np.float64 else 1e-6, scale, (x.shape, arguments, schedule))
    assert np.array_equal(got, got.swapaxes(1, 2)), "exactly symmetric"


CONVOLUTIONS = [
    # N, C, H, W, then kernel, stride, padding, dilation, groups
    (3, 4, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 19, 9, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 5, 11, 13, (5, 3), (1, 1), (0, 2), (1, 1), 1),
    (2, 7, 12, 13, (3, 3), (2, 1), (1, 0), (1, 2), 1),
    (2, 3, 15, 15, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (2, 17, 6, 5, (1, 1), (1, 1), (2, 2), (1, 1), 1),
    (2, 12, 9, 9, (3, 3), (1, 1), (1, 1), (1, 1), 3),
    (2, 8, 9, 9, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    (0, 4, 5, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 0, 5, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (111, 19, 3, 1, (3, 1), (1, 1), (1, 0), (1, 1), 1),
    (9, 3, 19, 29, (2, 2), (1, 1), (0, 0), (1, 1), 1),  # slices of positions
]
SHIFTED = [
    # by shifts of the image: enough channels for them to pay
    (2, 40, 6, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 61, 12, 9, (3, 3), (1, 1), (0, 0), (1, 1), 1),  # every window misses lines
    (2, 62, 6, 5, (3, 3), (1, 1), (2, 2), (1, 1), 1),  # none does
    (1, 72, 8, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1),  # two tiles of channels, the second of two
    (3, 120, 9, 2, (3, 1), (1, 1), (1, 0), (1, 1), 2),  # groups
    (1, 50, 3, 3, (5, 5), (1, 1), (2, 2), (1, 1), 1),  # windows that share nothing
    (6, 40, 17, 12, (3, 3), (1, 1), (1, 1), (1, 1), 1),  # slices of positions
]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_moments_of_convolutions(session, dtype):
    # half precision is converted when the image is packed: one case is enough
    for number, case in enumerate([*CONVOLUTIONS, *(SHIFTED[:1] if dtype.endswith("16") else SHIFTED)]):
        x, exact = normal(*case[:4]), None
        if dtype == "bfloat16":
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
            exact = (x.astype(np.uint32) << 16).view(np.float32)
        else:
            x = x.astype(dtype)
        check_moment(session, x, case[4:], SCHEDULES[number % 4], dtype, exact)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_moments_of_views(session, schedule):
    wide, arguments = normal(4, 9, 10, 21), ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    views = [wide[::2, :, ::2, ::3], wide.transpose(0, 3, 1, 2)[:, :5], wide[:, ::-1, 1:8, 2:9]]
    for x in [*views, np.broadcast_to(wide[:1], (2, 9, 10, 21))]:
        check_moment(session, x, arguments, schedule)


def test_shifted_moments_of_views(session):
    wide, arguments = normal(4, 40, 10, 21), ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    views = [
        wide[::2, :, ::2, ::3],
        wide.transpose(0, 1, 3, 2)[:2, ::-1, :5],
        np.broadcast_to(wide[:1, :, :3, :4], (2, 40, 3, 4)),
    ]
    for number, x in enumerate(views):
        check_moment(session, x, arguments, SCHEDULES[number])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("channels", [20, 44], ids=["patches", "shifts"])
def test_values_that_are_not_finite_are_named_and_leave_nothing(session, value, channels):
    x = normal(3, channels, 6, 6)
    x[2, channels - 3, 5, 5] = value
    for stride in ((1, 1), (2, 2)):
        out, status = host.conv2d_second_moment(session, x, (3, 3), stride, (0, 0), (1, 1), 1)
        assert status == 1 and np.isnan(out).all()
