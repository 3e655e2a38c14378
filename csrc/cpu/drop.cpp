#include "drop.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void drop(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address seed, uint32_t t, int64_t m0, Address out,
          int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::drop<T>({at<const T>(x), rows, columns, x_stride}, dropout(seed, t), m0, at<T>(out), threads);
  });
}

}  // namespace lorafast::entries
