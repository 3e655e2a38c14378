#include "grad_output.h"

#include "entry.h"
#include "kernels.h"

namespace lorafast::entries {

void grad_output(int type, Address dy, int64_t M, int64_t N, int64_t dy_stride, int64_t R,
                 Address F, int F_type, int64_t F_R, int64_t F_l, float s, Address gain,
                 Address scale, Address u, Address h_core, int64_t h_core_stride, int64_t live,
                 Address P, Address d_bias, Address kept, int64_t kept_stride, Address dot,
                 int threads) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    GradOutputRequest<T> request;
    if (u) {
      request.F = factor(F, F_type, R, N, F_R, F_l);
      request.u_scale = {s, pointer<float>(gain), pointer<float>(scale)};
      request.u = {pointer<LowRankGrad<T>>(u), M, R, R};
    }
    if (live) {
      request.h_core = {pointer<const T>(h_core) + (R - live), M, live, h_core_stride};
      request.P_scale = {s, pointer<float>(gain), nullptr};
      request.P = {pointer<float>(P) + (R - live), N, live, R};
    }
    request.d_bias = pointer<float>(d_bias);
    if (dot) {
      request.kept = {pointer<const T>(kept), M, N, kept_stride};
      request.dot = pointer<float>(dot);
    }
    lorafast::grad_output<T>({pointer<const T>(dy), M, N, dy_stride}, request, threads);
  });
}

}  // namespace lorafast::entries
