#include "grad_output.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void grad_output(int type, Address dy, int64_t M, int64_t N, int64_t dy_stride, int64_t R, Address F, int F_type, int64_t F_R,
                 int64_t F_l, float s, Address gain, Address scale, Address u, Address mixed, int64_t mixed_stride, int64_t live,
                 Address P, Address d_bias, Address kept, int64_t kept_stride, Address dot, int threads) {
  of_type(type, [&](auto one) {
    using T = decltype(one);
    Asked<T> asked;
    if (u) {
      asked.F = factor(F, F_type, R, N, F_R, F_l);
      asked.into_u = {s, at<float>(gain), at<float>(scale)};
      asked.u = {at<T>(u), M, R, R};
    }
    if (live) {
      asked.mixed = {at<const T>(mixed) + (R - live), M, live, mixed_stride};
      asked.into_P = {s, at<float>(gain), nullptr};
      asked.P = {at<float>(P) + (R - live), N, live, R};
    }
    asked.d_bias = at<float>(d_bias);
    if (dot) {
      asked.kept = {at<const T>(kept), M, N, kept_stride};
      asked.dot = at<float>(dot);
    }
    lorafast::grad_output<T>({at<const T>(dy), M, N, dy_stride}, asked, threads);
  });
}

}  // namespace lorafast::entries
