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
