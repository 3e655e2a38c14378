#include "scale.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void scale(int type, Address x, int64_t rows, int64_t columns, int64_t x_stride, Address gain, bool by_row, Address out,
           int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::scale<T>({at<const T>(x), rows, columns, x_stride}, at<float>(gain), by_row, at<T>(out), threads);
  });
}

}  // namespace lorafast::entries
