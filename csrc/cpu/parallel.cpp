#include "parallel.h"

namespace adaqn::cpu {
namespace {

Isa supported_isa() {
#if defined(__x86_64__) && !defined(ADAQN_ONE_ISA)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::baseline;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? Isa::avx512 : Isa::avx2;
#else
  return Isa::baseline;
#endif
}

Isa allowed_isa() {
  const char* word = std::getenv("ADAQN_ISA");
  if (word == nullptr) return Isa::avx512;
  if (std::string_view(word) == "baseline") return Isa::baseline;
  if (std::string_view(word) == "avx2") return Isa::avx2;
  return Isa::avx512;  // adaqn_cuda/native.py loads no library under any other word
}

}  // namespace

Isa machine_isa() {
  static const Isa isa = std::min(supported_isa(), allowed_isa());
  return isa;
}

}  // namespace adaqn::cpu
