// Rows of a matrix into panels: panel r / P holds, for every k, the P numbers of rows r ... r + P - 1 side by side.
#pragma once

#include "cpu/isa/tile.h"

namespace mtz::cpu::MTZ_ISA {

inline Index ceil_div(Index a, Index b) {
    return (a + b - 1) / b;
}

inline Index smaller(Index a, Index b) {
    return a < b ? a : b;
}

// One panel from any P rows: row(r) points to the first of `count` numbers, or is null for a row of zeros.
template <class In, class T, class Row>
inline void pack_panel_of(Row&& row, Index column_stride, Index count, T* panel) {
    constexpr Index P = kPanel<T>, lanes = Simd<T>::kLanes;
    Index k = 0;
    bool whole = column_stride == 1 && std::is_same_v<In, T>;
    for (Index r = 0; r < P; ++r) whole = whole && row(r) != nullptr;
    if constexpr (std::is_same_v<In, T>)
        if (whole)
            for (; k + lanes <= count; k += lanes)
                for (Index r = 0; r < P; r += lanes) {
                    Vector<T> block[lanes];
#pragma GCC unroll 16
                    for (Index i = 0; i < lanes; ++i) block[i] = load(row(r + i) + k);
                    transpose<T>(block);
#pragma GCC unroll 16
                    for (Index i = 0; i < lanes; ++i) store(panel + (k + i) * P + r, block[i]);
                }
    for (; k < count; ++k)
        for (Index r = 0; r < P; ++r) {
            const In* from = row(r);
            panel[k * P + r] = from != nullptr ? T(from[k * column_stride]) : T(0);
        }
}

// One panel: `rows` <= P rows of `count` numbers -> [count, P]; rows that are missing become zero.
template <class In, class T>
inline void pack_panel(const In* source, Index row_stride, Index column_stride, Index rows, Index count, T* panel) {
    pack_panel_of<In>([=](Index r) { return r < rows ? source + r * row_stride : nullptr; }, column_stride, count,
                      panel);
}

// `rows` rows -> ceil(rows / P) panels of [count, P].
template <class In, class T>
inline void pack_rows(const In* source, Index row_stride, Index column_stride, Index rows, Index count, T* panels) {
    constexpr Index P = kPanel<T>;
    for (Index r = 0; r < rows; r += P)
        pack_panel(source + r * row_stride, row_stride, column_stride, smaller(P, rows - r), count, panels + r * count);
}

}  // namespace mtz::cpu::MTZ_ISA
