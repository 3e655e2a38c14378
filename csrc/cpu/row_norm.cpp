#include "row_norm.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

bool row_norm(int type, Address weight, int64_t N, int64_t K, int64_t weight_stride, int64_t R, Address A, int A_type, int64_t A_R,
              int64_t A_l, Address B, int B_type, int64_t B_R, int64_t B_l, float s, bool by_row, Address out, int threads) {
  const Factor down = factor(A, A_type, R, K, A_R, A_l), up = factor(B, B_type, R, N, B_R, B_l);
  if (!any(down) || !any(up)) return false;
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::row_norm<T>({at<const T>(weight), N, K, weight_stride}, down, up, s, by_row, at<float>(out), threads);
  });
  return true;
}

}  // namespace lorafast::entries
