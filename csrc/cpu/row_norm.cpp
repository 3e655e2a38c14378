#include "row_norm.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void row_norm(int type, Address weight, int64_t N, int64_t K, int64_t weight_stride, int64_t R, Address A, int A_type, int64_t A_R,
              int64_t A_l, Address B, int B_type, int64_t B_R, int64_t B_l, float s, bool by_row, Address out, int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::row_norm<T>({at<const T>(weight), N, K, weight_stride}, factor(A, A_type, R, K, A_R, A_l),
                          factor(B, B_type, R, N, B_R, B_l), s, by_row, at<float>(out), threads);
  });
}

}  // namespace lorafast::entries
