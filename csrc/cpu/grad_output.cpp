#include "grad_output.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void grad_output(int type, Address dy, int64_t M, int64_t N, int64_t stride, Address F, int F_type, int64_t R, int64_t F_R,
                 int64_t F_N, float s, Address gain, Address scale, Address u, Address mixed, int64_t P_rank, int64_t mixed_stride,
                 Address P, int64_t P_stride, Address d_bias, Address kept, int64_t kept_stride, Address dot, Address work,
                 int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    Asked<T> asked;
    if (u) {
      asked.F = factor(F, F_type, R, N, F_R, F_N);
      asked.into_u = {s, at<float>(gain), at<float>(scale)};
      asked.u = {at<T>(u), M, R, R};
    }
    if (P) {
      asked.mixed = {at<const T>(mixed), M, P_rank, mixed_stride};
      asked.into_P = {s, at<float>(gain), nullptr};
      asked.P = {at<float>(P), N, P_rank, P_stride};
    }
    asked.d_bias = at<float>(d_bias);
    if (dot) {
      asked.kept = {at<const T>(kept), M, N, kept_stride};
      asked.dot = at<float>(dot);
    }
    lorafast::grad_output<T>({at<const T>(dy), M, N, stride}, asked, at<float>(work), threads);
  });
}

int64_t grad_output_workspace(int type, int64_t M, int64_t N, int64_t R, int64_t sums) {
  return of_type(type, [&](auto one) {
    using T = decltype(one);
    return GradOutputWork<T>(M, N, R, sums).floats();
  });
}

}  // namespace lorafast::entries
