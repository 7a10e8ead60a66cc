// OpenMP, or its absence.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mtz::cpu::MTZ_ISA {

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Threads that so many vector instructions are worth: waking one costs as much as some ten thousand of them, and much more
// where the other cores are busy.
inline int worth(int threads, double instructions) {
    const double most = 1 + instructions / 16384;
    return most < threads ? int(most) : threads;
}

}  // namespace mtz::cpu::MTZ_ISA
