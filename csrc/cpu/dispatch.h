// Which instruction set the kernels of cpu/isa run with. They are compiled once for each; the choice is made at run time, so
// that a wheel built here runs on an older CPU.
#pragma once

namespace mtz::cpu {

enum class Isa { generic, avx2, avx512 };

// Best first, as names: those compiled in that this CPU runs.
int available_isas(const char* names[3]);
// The one in use: MTZ_ISA from the environment if set, else the best.
const char* isa();
// Use another one (tests, benchmarks). False if it is not available.
bool use_isa(const char* name);

Isa current_isa();

}  // namespace mtz::cpu

// return NAMESPACE::call, with the namespace of the instruction set in use
#ifdef MTZ_HAS_AVX512
#define MTZ_CASE_AVX512(call) \
    case Isa::avx512:         \
        return avx512::call;
#else
#define MTZ_CASE_AVX512(call)
#endif
#ifdef MTZ_HAS_AVX2
#define MTZ_CASE_AVX2(call) \
    case Isa::avx2:         \
        return avx2::call;
#else
#define MTZ_CASE_AVX2(call)
#endif
#define MTZ_DISPATCH(call)        \
    switch (current_isa()) {      \
        MTZ_CASE_AVX512(call)     \
        MTZ_CASE_AVX2(call)       \
        default:                  \
            return generic::call; \
    }
