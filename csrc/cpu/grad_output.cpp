#include "grad_output.h"

#include "grouped.h"
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

void grouped_grad_output(int type, Address dy, int64_t N, int64_t dy_stride, int64_t R, Address F,
                         int F_type, int64_t F_e, int64_t F_R, int64_t F_l, float s, Address gain,
                         Address scale, Address u, Address h_core, int64_t h_core_stride,
                         int64_t live, Address P, Address d_bias, Address kept, int64_t kept_stride,
                         Address dot, Address offsets, int64_t experts, int threads) {
  const Groups groups(offsets, experts, 0);
  const int64_t size = size_of(type), fp32 = sizeof(float),
                u_size = static_cast<Type>(type) == Type::fp16 ? fp32 : size;
  for_experts(groups, threads, [&](int64_t e, int team) {
    const int64_t m = groups.first(e);
    grad_output(type, at(dy, m * dy_stride, size), groups.count(e), N, dy_stride, R,
                at(F, e * F_e, size_of(F_type)), F_type, F_R, F_l, s, at(gain, e * N, fp32),
                at(scale, e * N, fp32), at(u, m * R, u_size), at(h_core, m * h_core_stride, size),
                h_core_stride, live, at(P, e * N * R, fp32), at(d_bias, e * N, fp32),
                at(kept, m * kept_stride, size), kept_stride, at(dot, e * N, fp32), team);
  });
}

}  // namespace lorafast::entries
