#include "row_norm.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void row_norm(int type, Address weight, int64_t N, int64_t K, int64_t stride, Address A, int A_type, int64_t R, int64_t A_R,
              int64_t A_K, Address B, int B_type, int64_t, int64_t B_R, int64_t B_N, float s, bool by_row, Address out,
              Address work, int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    lorafast::row_norm<T>({at<const T>(weight), N, K, stride}, factor(A, A_type, R, K, A_R, A_K), factor(B, B_type, R, N, B_R, B_N),
                          s, by_row, at<float>(out), at<float>(work), threads);
  });
}

int64_t row_norm_workspace(int64_t N, int64_t K, int64_t R, bool by_row) { return lorafast::row_norm_workspace(N, K, R, by_row); }

}  // namespace lorafast::entries
