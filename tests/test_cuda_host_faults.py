"""Faults planted in copies of the CUDA kernels: the host run must notice each.

A missing barrier, an access outside, an unhandled tail, a copy that is not waited for. Each is one change of one place,
the part between «»; the probe is a small case like those of test_cuda_host.py that meets it. All are compiled in at
once, and one takes effect at a time. Those in updates of inverses stand in planted_inverses.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests import planted_inverses
from tests.cuda_host import host
from tests.cuda_host.host import SCHEDULES
from tests.test_cuda_host import (
    CONVOLUTIONS,
    SHIFTED,
    assert_within,
    check_matching,
    check_moment,
    distances,
    normal,
)
from tests.test_cuda_host_inverses import SMALL


def probe_distances(session, schedule):
    for n, m, d in ((19, 7, 24), (20, 8, 99), (132, 130, 36)):
        a, b = normal(2, n, d, seed=1), normal(2, m, d, seed=2)
        assert_within(host.neuron_distances(session, a, b, schedule=schedule), distances(a, b), 1e-6)
    for d in (36, 37):
        a, b = normal(1, 19, d, dtype="float64"), normal(1, 7, d, seed=1, dtype="float64")
        assert_within(host.neuron_distances(session, a, b, "float32", schedule), distances(a, b), 1e-6)
    a, b = normal(7, 2, 140, dtype="float64"), normal(7, 3, 140, seed=1, dtype="float64")  # two runs of columns
    assert_within(host.neuron_distances(session, a, b, "float32", schedule), distances(a, b), 1e-6)
    for batch, d in ((3, 1040), (1, 1600)):  # two runs of a group's, and slices
        a, b = normal(batch, 2, d), normal(batch, 3, d, seed=1)
        assert_within(host.neuron_distances(session, a, b, schedule=schedule), distances(a, b), 1e-6)


def probe_matching(session, schedule):
    check_matching(session, normal(2, 40, 33), 33, schedule)
    check_matching(session, normal(1, 33, 70).round(), 33, schedule)  # many ties
    check_matching(session, normal(1, 24, 24), 24, schedule)


def probe_moments(session, schedule):
    for case in (CONVOLUTIONS[1], CONVOLUTIONS[3], CONVOLUTIONS[6], CONVOLUTIONS[12]):
        check_moment(session, normal(*case[:4]), case[4:], schedule)
    x = normal(1, 3, 20, 30)
    x[0, 2, 19, 29] = np.nan
    assert host.conv2d_second_moment(session, x, (3, 3), (2, 2), (0, 0), (1, 1), 1, schedule)[1] == 1


def probe_shifts(session, schedule):
    for case in (SHIFTED[1], SHIFTED[3], SHIFTED[6]):
        check_moment(session, normal(*case[:4]), case[4:], schedule)
    x = normal(2, 40, 3, 4)
    x[1, 39, 2, 3] = np.nan
    out, status = host.conv2d_second_moment(session, x, (3, 3), (1, 1), (1, 1), (1, 1), 1, schedule)
    assert status == 1 and np.isnan(out).all()


ROWS, PIECES, DISTANCES = "rows.cuh", "pieces.cuh", "neuron_distances.cu"
MATCHING, MOMENTS = "match_neurons.cu", "conv2d_second_moment_patches.cu"
SHIFTS, SHIFT_PLAN = "conv2d_second_moment_shifts.cu", "shift_plan.cuh"
READING = "\n        for (int r = y; r < kSide; r += kThreads / kSide) {\n            const Index i = i0 + x"
CLEARING = "look(w, false); if (first == 0) w.rounds[round ^ 1] = 0;"
CHECKING = "; e += Index(gridDim.x) * blockDim.x) {\n        const Index x"
MORE = "start(k + Depth, 0);\n            "
FAULTS = {
    **planted_inverses.FAULTS,
    probe_distances: {
        "no barrier before a piece is used": (PIECES, MORE + "«sync_block();»", ""),
        "no barrier before the next piece is put": (
            PIECES,
            "«sync_block();»  // all threads are done with the piece",
            "",
        ),
        "copies not waited for": (PIECES, "«copy_async_wait<ahead - 1>();»", "copy_async_wait<ahead>();"),
        "the next piece over one in use": (PIECES, "ahead * Depth, «stage == 0 ? ahead : stage - 1»)", "stage"),
        "the same words again": (PIECES, "next[w] += «Tile::kDepth»;", "0"),
        "words of another group": (ROWS, "from = «int(threadIdx.x) / kGroup * share»;", "0"),
        "no barrier before the sums of groups are put": (
            PIECES,
            "«sync_block();»  // all threads are done with the last",
            "",
        ),
        "no barrier before the sums of groups are added up": (PIECES, "«sync_block();»  // the sums of all", ""),
        "one group is not added up": (PIECES, "«g < Tile::kGroups»; ++g", "g < Tile::kGroups - 1"),
        "rows beyond the end are read": (ROWS, "return data + («i < count» ?", "true"),
        "rows beyond the end are read in words": (PIECES, "row = «i < source.count» ?", "true"),
        "one column too many": (PIECES, "inside = «k + x < count»;", "k + x <= count"),
        "one column too many in words": (PIECES, "left = «count - k - x»,", "count - k - x + 1"),
        "unaligned rows are taken for words": (ROWS, "«m.row_stride % wide == 0»", "true"),
        "another thread's words are converted": (
            PIECES,
            "raw)[«w * Tile::kThreads + thread»]",
            "w * Tile::kThreads + (thread ^ 1)",
        ),
        "shared memory too small": (PIECES, "take<S>(«kSize»)", "kSize - 8"),
        "shared memory too small for what is converted": (PIECES, "take<In>(«kRaw»)", "kRaw - 1"),
        "columns beyond the end are written": (DISTANCES, "if («16 * c < here») row", "i < a.count"),
        "runs are not added up": (DISTANCES, "first = «k < kRun»;", "true"),
        "columns beyond the end are written by groups": (DISTANCES, "«j + 8 * c < b.count») out", "true"),
        "rows beyond the end are written by groups": (DISTANCES, "if («i < a.count» && ", "true"),
        "runs of groups are not added up": (DISTANCES, "«total[r][c] += sum[r][c];»", "total[r][c] = sum[r][c];"),
        "the last columns are left out": (
            DISTANCES,
            "smaller(«g.d», (slice + 1) * plan.length), shared, sum, [&](int k)",
            "g.d / 4 * 4",
        ),
        "the last columns are left out by groups": (
            DISTANCES,
            "smaller(«g.d», (slice + 1) * plan.length), shared, sum, [&](int)",
            "g.d / 4 * 4",
        ),
        "one slice is not added up": (DISTANCES, "«s < slices»; ++s", "s < slices - 1"),
    },
    probe_matching: {
        "no barrier in a turned tile": (MATCHING, "«sync_block();»" + READING, ""),
        "no barrier between tiles": (MATCHING, "«sync_block();»  // the tile", ""),
        "a turned tile is not cut off": (MATCHING, "if («i < g.n && j < g.m») w.turned", "j < g.m"),
        "no barrier after looking": (MATCHING, "look(w, false);\n        «sync_grid();»", ""),
        "no barrier after taking": (MATCHING, "«sync_grid();»\n        if (w.rounds", ""),
        "cleared while others read": (MATCHING, "look(w, true);\n        «look(w, false);»", CLEARING),
        "ties by any column": (MATCHING, "(cost == least && «other < best»)", "false"),
        "one lane too many": (MATCHING, "i = threadIdx.x % kWarp; «i < count»", "i <= count"),
        "half of a warp is not counted": (MATCHING, "mask = «kWarp / 2»; mask > 0; mask /= 2) before", "kWarp / 4"),
    },
    probe_moments: {
        "no barrier before tables of rows are used": (MOMENTS, "plan.side, j0, rows_b);\n    «sync_block();»", ""),
        "the row below the image is read": (MOMENTS, "y >= 0 && «y < g.height»", "y <= g.height"),
        "the column before the image is read": (MOMENTS, "«x >= 0» && x < g.width", "x >= -1"),
        "rows beyond the end are read": (MOMENTS, "{«row < side ? offset : Patches<In>::kNoRow», y, x}", "offset"),
        "columns beyond the end are written": (MOMENTS, "if («i > j || j >= plan.side») continue;", "i > j"),
        "the last positions are left out": (MOMENTS, "smaller(«plan.positions», (slice", "plan.positions / 8 * 8"),
        "the last values are not checked": (MOMENTS, "«e < count»" + CHECKING, "e < count / 256 * 256"),
    },
    probe_shifts: {
        "no barrier in a strip": (SHIFTS, "«sync_block();»\n    for (int k = row", ""),
        "no barrier before a piece is used": (SHIFTS, "«sync_block();»  // this piece is there", ""),
        "copies not waited for": (SHIFTS, "«copy_async_wait<0>();»", "copy_async_wait<1>();"),
        "one position too many": (SHIFTS, "inside = «k + k_mine < count»;", "k + k_mine <= count"),
        "no zeros behind a row": (SHIFTS, "width = g.width + «g.kernel[1] - 1»;", "0"),
        "no zeros below a sample": (SHIFTS, "sample = (g.height + «g.kernel[0] - 1») * width;", "0"),
        "no zeros in front": (SHIFTS, "before = «(g.kernel[0] - 1) * width + g.kernel[1] - 1»;", "0"),
        "no zeros at the end": (SHIFTS, "before + g.samples * sample + «g.kernel[1] - 1»;", "0"),
        "rows are not changed": (SHIFTS, "if (x >= nx) «x -= nx, ++y;»", "x -= nx;"),
        "samples are not changed": (SHIFTS, "if (y >= ny) «y -= ny, ++sample;»", "y -= ny;"),
        "corners are taken away": (SHIFTS, "value += «(py == 0) == (px == 0)» ?", "py + px == 0"),
        "border lines behind are forgotten": (SHIFT_PLAN, "if («q < from || q >= to») parts", "q < from"),
        "border lines in front are forgotten": (SHIFT_PLAN, "from = «start > low ? start : low»,", "low"),
        "one slice is not added up": (SHIFTS, "slice < («sliced ? w.slices : 1»); ++slice", "1"),
        "another slot": (
            SHIFTS,
            "«Index(in_y - y.long_spans) * x.spans + in_x»;",
            "Index(in_y - y.long_spans) * x.long_spans + in_x",
        ),
        "a tile with itself is not turned": (SHIFTS, "(«i == j && row % offsets > column % offsets»)", "false"),
        "columns beyond the end are written": (
            SHIFTS,
            "«column < tile && to_column + column < side»; column",
            "column < tile",
        ),
        "not finite values stay where they are": (SHIFTS, "S(«bad ? kNaN : value»)", "value"),
        "the last channels are not packed": (
            SHIFTS,
            "if («inside && c0 + c < w.channels»)",
            "inside && c0 + c < w.channels / 4 * 4",
        ),
    },
}
ALL = [fault for of_probe in FAULTS.values() for fault in of_probe.values()]


def notice(driver, probe, fault: int = 0) -> str:
    """What noticed the fault, or nothing."""
    for schedule in SCHEDULES:
        memory, tensor_cores = getattr(probe, "shared_memory", SMALL), getattr(probe, "tensor_cores", True)
        session = host.Session(driver, memory, fault, tensor_cores)
        try:
            probe(session, schedule)
        except (host.Fault, AssertionError, RuntimeError) as error:
            return f"{schedule}: {type(error).__name__} {error}"
        finally:
            session.close()
    return ""


@pytest.fixture(scope="module")
def faulty():
    return host.build_with(ALL)


@pytest.mark.parametrize(
    "probe, name", [pytest.param(p, name, id=f"{p.__name__}: {name}") for p in FAULTS for name in FAULTS[p]]
)
def test_planted_fault_is_noticed(faulty, probe, name):
    noticed = notice(faulty, probe, ALL.index(FAULTS[probe][name]) + 1)
    assert noticed, "nothing noticed this fault"
    print(noticed[:300])


@pytest.mark.parametrize("probe", FAULTS, ids=lambda p: p.__name__)
def test_without_a_fault_nothing_is_noticed(faulty, probe):
    assert notice(faulty, probe) == ""
