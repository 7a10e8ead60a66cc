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

}  // namespace mtz::cpu::MTZ_ISA
