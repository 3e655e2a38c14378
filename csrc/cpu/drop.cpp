#include "drop.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void drop(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address seed,
          uint32_t threshold, int64_t m0, Address out, int threads) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::drop<T>({pointer<const T>(x), rows, columns, x_stride}, dropout(seed, threshold), m0,
                      pointer<T>(out), threads);
  });
}

void drop_mask(int64_t rows, int64_t columns, Address seed, uint32_t threshold, Address out) {
  lorafast::drop_mask(rows, columns, dropout(seed, threshold), pointer<uint8_t>(out));
}

}  // namespace lorafast::entries
