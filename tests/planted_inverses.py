"""The faults of test_cuda_host_faults.py that are planted in updates of inverses, and the probes that meet them."""

from __future__ import annotations

import numpy as np

from tests.cuda_host import host
from tests.test_cuda_host import assert_within, normal
from tests.test_cuda_host_inverses import LARGE, MOST, afresh, check_update, damped_inverse


def probe_inverses(session, schedule):
    for batch, d, k in ((7, 19, 20), (1, 84, 36), (1, 24, 81)):
        check_update(session, batch, d, k, "float32", schedule)
    check_taken_out_first(session, 20, schedule)
    # the first matrix fails: its pivot is -1 + 3
    inverse = np.eye(5, dtype=np.float32)[None].repeat(6, 0)
    vectors = inverse[:, :1].copy()
    weight = np.array([-3.0, 1, 1, 1, 1, 1])[:, None]
    _, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
    assert status.tolist() == [1, 0, 0, 0, 0, 0]


probe_inverses.tensor_cores = False


def probe_tensor_inverses(session, schedule):
    check_update(session, 2, 64, 70, "float32", schedule)
    check_update(session, 2, 100, 36, "float32", schedule)
    check_update(session, 1, 19, 40, "float32", schedule, np.random.default_rng(0).uniform(0.1, 2, (1, 40)))
    check_update(session, 2, 3, 80, "float32", schedule)  # loses too much in panels of more than 16 vectors
    probe_inverses(session, schedule)
    check_first_failure(session, 64, schedule)


probe_tensor_inverses.shared_memory = MOST


def check_first_failure(session, d, schedule):
    """The first pivot that fails is 0, and what follows is NaN; or the last of all pivots fails."""
    inverse, vectors = damped_inverse(2, d), normal(2, 60, d, seed=1)
    inverse[1], vectors[1, 30:] = np.eye(d), np.eye(1, d)
    weight = np.ones((2, 60))
    weight[0, 40], weight[1, 30:] = -100, -1
    vectors[1, :30] = 0
    got, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
    assert status.tolist() == [1, 1] and np.array_equal(got, inverse)


def check_taken_out_first(session, d, schedule):
    """Vectors of negative weight come before those that replace them."""
    inverse, vectors = damped_inverse(2, d), normal(2, 40, d, seed=1)
    weight = np.ones((2, 40))
    weight[1, :20], vectors[1, 20:] = -1, 1.25 * vectors[1, :20]
    got, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
    expected = afresh(inverse, vectors, weight)
    assert not status.any()
    assert_within(got, expected, 2e-5, np.abs(expected).max((1, 2), keepdims=True))


def probe_large_inverses(session, schedule):
    check_update(session, 2, 99, 3, "float32", schedule)
    check_update(session, 1, 300, 20, "float32", schedule)
    check_update(session, 1, 130, 120, "float32", schedule)
    check_update(session, 1, 200, 190, "float32", schedule)
    check_update(session, 1, 130, 120, "float64", schedule)
    check_taken_out_first(session, 99, schedule)
    inverse, vectors, weight = damped_inverse(1, 99), 0.02 * normal(1, 40, 99, seed=1), -np.ones((1, 40))
    got, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
    expected = afresh(inverse, vectors, weight)
    assert not status.any()
    assert_within(got, expected, 2e-5, np.abs(expected).max())
    # rows of words, of which the last is cut off
    buffer = np.full((1, 70, 76), np.nan, np.float32)
    view = buffer[:, :, :70]
    view[...] = damped_inverse(1, 70)
    vectors, weight = normal(1, 3, 70, seed=1), np.ones((1, 3))
    got, status = host.sherman_morrison(session, view, vectors, weight, schedule)
    expected = afresh(view, vectors, weight)
    assert not status.any() and np.isnan(got[:, :, 70:]).all()
    assert_within(got[:, :, :70], expected, 2e-5, np.abs(expected).max())
    # the second matrix fails, in the only round and in the last of several
    inverse, vectors, weight = damped_inverse(2, 70), normal(2, 20, 70, seed=1), np.ones((2, 20))
    weight[1, 19] = -100
    got, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
    assert status.tolist() == [0, 1] and np.array_equal(got[1], inverse[1])
    inverse, vectors, weight = damped_inverse(2, 70), normal(2, 70, 70, seed=1), np.ones((2, 70))
    weight[1, 69] = -100
    got, status = host.sherman_morrison(session, inverse, vectors, weight, schedule)
    assert status.tolist() == [0, 1] and np.array_equal(got[1], inverse[1])
    expected = afresh(inverse[:1], vectors[:1], weight[:1])
    assert_within(got[:1], expected, 2e-5, np.abs(expected).max())
    check_first_failure(session, 99, schedule)


probe_large_inverses.shared_memory = LARGE


def probe_plain_large_inverses(session, schedule):
    probe_large_inverses(session, schedule)


probe_plain_large_inverses.shared_memory = LARGE
probe_plain_large_inverses.tensor_cores = False


INVERSES, SMALL_INVERSES, LARGE_INVERSES = (f"sherman_morrison{part}" for part in (".cuh", "_small.cu", "_large.cu"))
RESIDENT, TENSOR, TENSOR_STEPS = (f"sherman_morrison_{part}" for part in ("resident.cuh", "tensor.cu", "tensor.cuh"))
PIVOTS, TILES = "pivots.cuh", "tiles.cuh"
LARGE_PRODUCT, LARGE_PANELS = (f"sherman_morrison_large{part}" for part in (".cuh", "_panels.cu"))
LARGE_SMALL = "sherman_morrison_large_product.cuh"
LARGE_TILES = "sherman_morrison_large_tiles.cuh"
LARGE_TENSOR, LARGE_TENSOR_KERNELS = (f"sherman_morrison_large_tensor.{kind}" for kind in ("cuh", "cu"))
SMALL_STEPS = "sherman_morrison_small.cuh"
FAULTS = {
    probe_inverses: {
        "the first copies not waited for": (
            SMALL_INVERSES,
            "«copy_async_wait<0>();»\n        sync_block();  // the matrix and",
            "",
        ),
        "copies not waited for": (
            SMALL_INVERSES,
            "«copy_async_wait<0>();»\n            sync_block();  // L, U",
            "",
        ),
        "no barrier before the matrix is used": (SMALL_INVERSES, "«sync_block();»  // the matrix and", ""),
        "no barrier after the order": (RESIDENT, "«sync_block();»  // the order is", ""),
        "no barrier after the first vectors": (SMALL_INVERSES, "«sync_block();»  // block 0", ""),
        "no barrier after the pivots": (SMALL_INVERSES, "«sync_block();»  // L, U", ""),
        "no barrier before the update": (SMALL_INVERSES, "«sync_block();»  // V and E", ""),
        "no barrier after the update": (SMALL_INVERSES, "«sync_block();»  // the matrix has", ""),
        "no barrier after S": (SMALL_INVERSES, "«sync_block();»  // S of the next", ""),
        "one column too many": (
            RESIDENT,
            "left = from ? «d - j * Count» :",
            "d + 1 - j * Count",
        ),
        "one row too many": (RESIDENT, "return «i < g.d» ? from + i", "i <= g.d"),
        "one vector too many": (RESIDENT, "return «first + q < g.k» ? from", "first + q <= g.k"),
        "unaligned rows are taken for words": (RESIDENT, "«stride % count == 0 && other % count == 0»", "true"),
        "negative weights stay where they are": (RESIDENT, "!sync_block_any(«other»)", "false"),
        "signs of another block": (SMALL_STEPS, "sign + «b % kKept» * K", "b % 2"),
        "the middle row of tiles twice": (SMALL_STEPS, "return «i > r»;", "true"),
        "half of the lanes are not summed": (
            SMALL_STEPS,
            "«shuffle_xor(sent, mask)»",
            "mask == 1 ? 0 * shuffle_xor(sent, mask) : shuffle_xor(sent, mask)",
        ),
        "the last columns twice": (SMALL_STEPS, "«w < 4 * octets» ?", "w <= 4 * octets"),
        "the last pivot only": (SMALL_STEPS, "if («other < worst») worst", "other > worst"),
        "a part of the mirror image is not turned": (SMALL_STEPS, "swap_if(«turn_c != 0»", "false"),
        "columns of L from another lane": (SMALL_STEPS, "-below, shuffle_from(row[k], «j»)", "j ^ 1"),
        "V is not corrected": (SMALL_INVERSES, "others + («next ? at.side : 0»)", "0"),
        "the diagonal is mirrored": (SMALL_STEPS, "if («i == j») return;", "false"),
        "no barrier in the order": (INVERSES, "«sync_block();»\n    Index positive", ""),
    },
    probe_tensor_inverses: {
        "the first copies not waited for": (
            TENSOR,
            "«copy_async_wait<0>();»\n        sync_block();  // the matrix and",
            "",
        ),
        "copies not waited for": (TENSOR, "«copy_async_wait<0>();»\n            sync_block();  // the matrix has", ""),
        "no barrier before the matrix is used": (TENSOR, "«sync_block();»  // the matrix and", ""),
        "no barrier before S": (TENSOR, "«sync_block();»  // V is there", ""),
        "no barrier before the update": (TENSOR, "«sync_block();»  // V is solved", ""),
        "no barrier after the update": (TENSOR, "«sync_block();»  // the matrix has", ""),
        "the next panel over this one": (TENSOR, "start_vectors(p, order, first + panel, «out»)", "in"),
        "the last block is left out": (
            TENSOR,
            "«ceil_div(smaller(g.k - first, panel), lane.kBlock)»",
            "larger(1, smaller(g.k - first, panel) / lane.kBlock)",
        ),
        "one panel's weights for all": (TENSOR, "«keep_weight(w);»", ""),
        "no sign": (TENSOR, "«lane.root[resident.thread] < 0» ? -1 : 1;", "false"),
        "a vector more than rows": (TENSOR_STEPS, "return int(«smaller(larger(d / 16, 1) * 16, kPanel)»);", "kPanel"),
        "the last columns of V are left out": (
            TENSOR_STEPS,
            "if («j >= side») continue;\n                float",
            "j >= side - 8",
        ),
        "columns of V beyond the end": (TENSOR_STEPS, "return «j < side» ? j : side - 8;", "true"),
        "another pair of blocks": (TENSOR_STEPS, "«part.rows[1] + 1»,\n            [&]", "part.rows[1]"),
        "one block as the first of a pair": (TENSOR_STEPS, "rows[1] = both ? 3 - pair : «pair»;", "3"),
        "V is not scaled": (TENSOR_STEPS, "return «std::fabs(root[q])»;", "1.0f"),
        "columns of S are not scaled": (TENSOR_STEPS, "first = «std::fabs(of[0])»,", "1.0f"),
        "columns 8 on are not swapped": (TENSOR_STEPS, "eight = «(t & 2) ? -8 : 8»;", "8"),
        "signs of other vectors": (TENSOR_STEPS, "values.at[e] *= -sign[«4 * e»];", "0"),
        "only one of two parts": (TILES, "«part[0][m][n][e] += part[1][m][n][e];»", ""),
        "the element before the diagonal is kept": (TENSOR_STEPS, "else if («one») {", "false"),
        "below the diagonal as well": (TENSOR_STEPS, "if («all || both») {", "true"),
        "no mirror image": (TENSOR_STEPS, "if («all || g < second») turned_to", "false"),
        "a mirror image that is not turned": (TENSOR_STEPS, "first = «2 * t + turned», second", "2 * t"),
        "small parts of b are left out": (TILES, "of_b = «term % 2» ? high", "true"),
        "small parts of a are left out": (TILES, "of_a = «term > 2» ? low", "false"),
        "beyond the end": (TENSOR_STEPS, "if («above < 0 || i0 + i >= side || j0 + j >= side») continue;", "above < 0"),
    },
    probe_large_inverses: {
        "copies not waited for": (LARGE_TENSOR, "«copy_async_wait<P::kStages - 1>();»", ""),
        "no barrier before the first piece is used": (LARGE_TENSOR, "«sync_block();»  // the first piece", ""),
        "the next copies not waited for": (
            LARGE_TENSOR,
            "«copy_async_wait<P::kStages - 2>();»",
            "copy_async_wait<P::kStages - 1>();",
        ),
        "no barrier before a piece is used": (LARGE_TENSOR, "«sync_block();»  // the next piece", ""),
        "the next piece over one in use": (
            LARGE_TENSOR,
            "start(a, left, shared.a + «stage» * P::kSizeA);\n                start(b",
            "(stage + 1) % P::kStages",
        ),
        "stages are not used again": (LARGE_TENSOR, "stage = «stage + 1 == P::kStages» ?", "false"),
        "a stage too many": (LARGE_TENSOR, "left = count - «P::kStages * P::kDepth»;", "(P::kStages - 1) * P::kDepth"),
        "one row too many": (LARGE_TENSOR, ": «y + step(e) < left» ?", "y + step(e) <= left"),
        "one column too many": (LARGE_TENSOR, "left = «columns - x»;", "columns - x + 1"),
        "one word too many": (LARGE_TENSOR, "Whole || «x < left» ?", "x <= left"),
        "the last piece as a whole one": (LARGE_TENSOR, "if («whole && left >= P::kDepth»)", "whole && left > 0"),
        "the last word as a whole one": (LARGE_TENSOR_KERNELS, "P::kRows <= g.d || «g.d % 4 == 0»,", "true"),
        "rows in another slot": (LARGE_TENSOR, "return Words ? «e % 4 + e / 4 * 16 * P::kPanels» :", "e"),
        "rows of b in another slot": (LARGE_TENSOR, "to + place + «e * kDown * P::kDepth»,", "e * P::kDepth"),
        "another panel's columns": (LARGE_TENSOR, "place_b(«first_column()» +", "0"),
        "steps of another lane": (LARGE_TENSOR, "place_a(«threadIdx.x % 4 * 4», row())", "threadIdx.x % 4 * 4 ^ 4"),
        "the first steps again": (LARGE_TENSOR, "shared.load_b(stage, «next / parts * 16»,", "0"),
        "without the small parts": (LARGE_TENSOR, "«multiply(&Tf32::low, &Tf32::high);»", ""),
        "sums in another row": (LARGE_TENSOR, "sum[2 * m + «e / 2»]", "e % 2"),
        "a failed matrix is worked on": (LARGE_TENSOR_KERNELS, "if («!any || w.skipped(p)») return;", "!any"),
        "unaligned rows are taken for words": (LARGE_TENSOR_KERNELS, "«words» ? multiply_kernel", "true"),
        "unaligned rows are written as words": (LARGE_TENSOR_KERNELS, "«words» ? update_kernel", "true"),
        "below the diagonal as well": (LARGE_TILES, "if («i + r <= j + e» &&", "true"),
        "columns beyond the end are written": (LARGE_TILES, "«j + e < d») f(r, e)", "true"),
        "no mirror image": (LARGE_TILES, "«store_global(mirror + e * row, turned);»", ""),
        "one slice is not added up": (LARGE_INVERSES, "«slice < w.slices»; ++slice", "slice < w.slices - 1"),
        "the last rows are left out": (
            LARGE_TENSOR_KERNELS,
            "smaller(w.length, «g.d - first»)",
            "(g.d - first) / 4 * 4",
        ),
        "half of a warp is not counted": (
            LARGE_INVERSES,
            "int mask = «kWarp / 2»; mask > 0; mask /= 2) {",
            "kWarp / 4",
        ),
        "two vectors in one place": (LARGE_INVERSES, "before += «positive && i < q»", "positive && i <= q && q > 0"),
        "a failed matrix is not put back": (LARGE_INVERSES, "else if («w.skipped(p)»)", "false"),
        "half of a warp is not summed": (LARGE_SMALL, "const int half = «8 >> step»;", "4 >> step"),
        "another sum of a lane": (LARGE_SMALL, "kept = «upper ? high : low»;", "low"),
        "one chunk is not added up": (LARGE_PANELS, "«chunk < chunks»; ++chunk", "chunk < chunks - 1"),
        "V is not waited for": (LARGE_PANELS, "«copy_async_wait<0>();»", ""),
        "no barrier before V is used": (LARGE_PANELS, "«sync_block();»  // V is there", ""),
        "no barrier before V is replaced": (LARGE_PANELS, "«sync_block();»  // nobody needs the old V", ""),
        "no barrier before D V is used": (LARGE_PANELS, "«sync_block();»  // D V is there", ""),
        "no barrier before D V is replaced": (LARGE_PANELS, "«sync_block();»  // nobody needs D V", ""),
        "later panels keep this one": (LARGE_PANELS, "along(r) + c] -= «sum[r][c]»;", "T(0)"),
        "no barrier before warps are added up": (LARGE_SMALL, "«sync_block();»  // sums of all warps", ""),
        "no barrier before the next sums": (LARGE_SMALL, "«sync_block();»  // nobody needs these sums", ""),
        "one warp is not added up": (LARGE_SMALL, "«f < kPanelThreads / kWarp»; ++f", "f < kPanelThreads / kWarp - 1"),
        "words behind the end": (LARGE_SMALL, "const bool any = «j + 4 * t < last»;", "true"),
        "rows of another half": (LARGE_PANELS, "? «r % 2 * 8» : r;", "r / 2 * 8"),
        "columns of the other half": (LARGE_PANELS, "? «r / 2 * 8» : 0;", "r % 2 * 8"),
        "rows of X that were left out": (LARGE_PANELS, "for (int k = «first + t»; k <", "t"),
        "no barrier before S is used": (PIVOTS, "«sync_block();»  // S is there", ""),
        "no barrier after the pivots": (PIVOTS, "«sync_block();»  // N is there", ""),
        "no barrier before rows are reduced": (PIVOTS, "«sync_block();»  // M and X of this block", ""),
        "no barrier before S of a block is used": (PIVOTS, "«sync_warp();»  // S_mm is there", ""),
        "no barrier before columns are used": (PIVOTS, "«sync_warp();»  // columns are there", ""),
        "no barrier before rows are used": (PIVOTS, "«sync_warp();»  // rows are there", ""),
        "nothing above the diagonal": (PIVOTS, "c[q] = «before > q» ?", "before != q"),
        "another row is taken out": (PIVOTS, "columns + 16 * (group % 4) + «4 * q»)", "4 * (q ^ 1)"),
        "rows are not as they were": (PIVOTS, "multiply_add(«-c[k]», below[k][q], c[q])", "T(0)"),
        "S stays where N belongs": (PIVOTS, "«half != group / 2» ? done", "true"),
        "the last pivot only": (PIVOTS, "atomic_max(status, «(kPanel - at) * 4» + judged)", "at * 4"),
        "pivots of one block are judged": (PIVOTS, "last >= 0 && «last < blocks * kBlock»)", "last < kBlock"),
        "a block is reduced twice": (PIVOTS, "«e <= m ? e - 1 : e»), i", "e"),
        "signs are not looked at": (PIVOTS, "return «-d[k]» * b[", "T(-1)"),
        "S is not taken away": (PIVOTS, "(«j == m» ? T(0)", "false"),
        "no barrier before panels are coupled": (LARGE_PANELS, "«sync_block();»  // S and X^T D V", ""),
    },
    probe_plain_large_inverses: {
        "no barrier before another S": (LARGE_PANELS, "«sync_block();»  // nobody needs S", ""),
        "no barrier before a piece is used": (LARGE_PRODUCT, "«sync_block();»  // this piece is there", ""),
        "copies not waited for": (LARGE_PRODUCT, "«copy_async_wait<1>();»", "copy_async_wait<2>();"),
        "the next piece over one in use": (LARGE_PRODUCT, "kDepth, «(piece + 2) % P::kStages»)", "piece % P::kStages"),
        "one row too many": (LARGE_PRODUCT, "«int(y) < count - k - e * down» ?", "int(y) <= count - k - e * down"),
        "one column too many": (LARGE_PRODUCT, "left = «columns - int(column)»,", "columns - int(column) + 1"),
        "rows in another slot": (LARGE_PRODUCT, "return («j / 4 % 8» +", "j % 8"),
        "unaligned rows are taken for words": (LARGE_INVERSES, "«words» ? multiply_kernel", "true"),
        "unaligned rows are written as words": (LARGE_INVERSES, "«words» ? update_kernel", "true"),
        "the middle row of tiles twice": (LARGE_TILES, "apart = «2 * i != rows - 1»;", "true"),
        "the last rows are left out": (LARGE_INVERSES, "smaller(w.length, «g.d - first»)", "(g.d - first) / 4 * 4"),
    },
}
