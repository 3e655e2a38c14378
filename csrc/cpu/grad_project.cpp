#include "grad_project.h"

#include "grouped.h"
#include "kernels.h"

namespace lorafast::entries {
namespace {

void grad_project_rows(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address v,
                       int64_t R, int64_t v_stride, const Dropout& drop, Address out, int threads) {
  with_activation_type(type, [&](auto element) {
    using T = decltype(element);
    lorafast::grad_project<T>({pointer<const T>(x), M, K, x_stride},
                              {pointer<const LowRankGrad<T>>(v), M, R, v_stride}, drop,
                              {pointer<float>(out), R, K, K}, threads);
  });
}

}  // namespace

void grad_project(int type, Address x, int64_t M, int64_t K, int64_t x_stride, Address v, int64_t R,
                  int64_t v_stride, Address seed, uint32_t threshold, Address out, int threads) {
  grad_project_rows(type, x, M, K, x_stride, v, R, v_stride, dropout(seed, threshold), out,
                    threads);
}

void grouped_grad_project(int type, Address x, int64_t K, int64_t x_stride, Address v, int64_t R,
                          int64_t v_stride, Address seed, uint32_t threshold, Address out,
                          Address offsets, int64_t experts, Address rows, int threads) {
  const Groups groups(offsets, experts, rows);
  const Dropout drop = dropout(seed, threshold);
  const int64_t size = size_of(type), fp32 = sizeof(float),
                v_size = static_cast<Type>(type) == Type::fp16 ? fp32 : size;
  for_experts(groups, threads, [&](int64_t e, int team) {
    const int64_t m = groups.first(e);
    grad_project_rows(type, at(x, m * x_stride, size), groups.count(e), K, x_stride,
                      at(v, m * v_stride, v_size), R, v_stride, groups.of(drop, e),
                      at(out, e * R * K, fp32), team);
  });
}

}  // namespace lorafast::entries
