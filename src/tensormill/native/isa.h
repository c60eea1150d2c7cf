// The instruction set that kernels use, chosen at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#include "parallel.h"

#if defined(__linux__) && TENSORMILL_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tensormill {

// In ascending order: each can run the code of those before it. kAvx2 has FMA and F16C; kAvx512 has F, BW, DQ and VL;
// kVbmi, kVnni add those; kAmx has BF16 and tiles of bfloat16.
enum Isa : int { kPortable, kAvx2, kAvx512, kVbmi, kVnni, kAmx };

inline const char *isa_name(Isa isa) {
  constexpr const char *names[] = {"portable", "avx2", "avx512", "vbmi", "vnni", "amx"};
  return names[isa];
}

// Linux gives a process the tile registers when it asks for them.
inline bool has_amx_bf16() {
#if defined(__linux__) && TENSORMILL_X86
  static const bool yes = [] {
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool present = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return present && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return yes;
#else
  return false;
#endif
}

// The best there is, but not above TENSORMILL_CPU_ISA=portable|avx2|avx512|vbmi|vnni, which is there for tests.
inline Isa instruction_set() {
  static const Isa chosen = [] {
    Isa best = kPortable;
    if (has_avx2()) best = kAvx2;
    if (best == kAvx2 && has_avx512()) best = kAvx512;
    if (best == kAvx512 && has_avx512_vbmi()) best = kVbmi;
    if (best == kVbmi && has_avx512_vnni()) best = kVnni;
    if (best == kVnni && has_amx_bf16()) best = kAmx;
    const char *asked = std::getenv("TENSORMILL_CPU_ISA");
    if (asked == nullptr) return best;
    for (const Isa isa : {kPortable, kAvx2, kAvx512, kVbmi, kVnni})
      if (std::strcmp(asked, isa_name(isa)) == 0) return std::min(best, isa);
    return best;
  }();
  return chosen;
}

// For Python.
inline const char *instruction_set_name() { return isa_name(instruction_set()); }

// The copy of a kernel's header for the best instruction set: the namespaces avx512, avx2 and portable of the caller.
#if TENSORMILL_X86
#define TENSORMILL_BEST_COPY(CALL)                                            \
  (::tensormill::instruction_set() >= ::tensormill::kAvx512 ? avx512::CALL   \
   : ::tensormill::instruction_set() >= ::tensormill::kAvx2 ? avx2::CALL     \
                                                             : portable::CALL)
#else
#define TENSORMILL_BEST_COPY(CALL) portable::CALL
#endif

}  // namespace tensormill
