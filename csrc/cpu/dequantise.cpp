#include "dequantise.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void dequantise_4bit(int type, Address packed, Address absmax, Address code, int64_t blocksize,
                     int64_t first, int64_t count, Address out, int threads) {
  const FourBits from = {pointer<const uint8_t>(packed), pointer<const float>(absmax),
                         pointer<const float>(code), blocksize};
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::dequantise_4bit<T>(from, first, count, pointer<T>(out), threads);
  });
}

}  // namespace lorafast::entries
