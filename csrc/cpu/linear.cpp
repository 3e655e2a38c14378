#include "linear.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

bool linear(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address weight, int64_t N,
            int64_t weight_stride, Address h, int64_t h_stride, int64_t R, Address F, int F_type,
            int64_t F_R, int64_t F_l, float s, Address scale, Address gain, Address bias,
            Address inner, int threads, Address out) {
  return with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    const Matrix<const T> low_rank{pointer<const T>(h), M, R, h_stride};
    const Factor up = factor(F, F_type, R, N, F_R, F_l);
    const ColumnScale column_scale{s, nullptr, pointer<float>(scale)};
    if (R && !adds(static_cast<Type>(type), low_rank, up, column_scale)) return false;
    lorafast::linear<T>({pointer<const T>(x), M, K, x_stride},
                        {pointer<const T>(weight), N, K, weight_stride}, low_rank, up, column_scale,
                        {pointer<float>(gain), pointer<float>(bias), {pointer<T>(inner), M, N, N}},
                        {pointer<T>(out), M, N, N}, threads);
    return true;
  });
}

}  // namespace lorafast::entries
