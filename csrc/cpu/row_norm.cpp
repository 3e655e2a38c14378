#include "row_norm.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

bool row_norm(int type, Address weight, int64_t N, int64_t K, int64_t weight_stride, int64_t R,
              Address A, int A_type, int64_t A_R, int64_t A_l, Address B, int B_type, int64_t B_R,
              int64_t B_l, float s, bool by_row, Address out, int threads) {
  const Factor A_factor = factor(A, A_type, R, K, A_R, A_l),
               B_factor = factor(B, B_type, R, N, B_R, B_l);
  if (!has_nonzero(A_factor) || !has_nonzero(B_factor)) return false;
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::row_norm<T>({pointer<const T>(weight), N, K, weight_stride}, A_factor, B_factor, s,
                          by_row, pointer<float>(out), threads);
  });
  return true;
}

}  // namespace lorafast::entries
