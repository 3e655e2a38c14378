#include "scale.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void scale(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address gain,
           bool by_row, Address out, int threads) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::scale<T>({pointer<const T>(x), rows, columns, x_stride}, pointer<float>(gain), by_row,
                       pointer<T>(out), threads);
  });
}

}  // namespace lorafast::entries
