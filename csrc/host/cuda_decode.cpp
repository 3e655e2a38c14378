#include "cuda_decode.h"

#include "cuda_kernels.h"

namespace lorafast::host::cuda {
namespace {

using at::Tensor;

// As lorafast/engine/cuda_decode.py has them.
constexpr int64_t TOKENS = 16, RANKS = 64, ROWS = 32, COLUMNS = 512;
constexpr int PARTS = 4;

}  // namespace

bool decode_serves(const Tensor& x2, const Tensor& weight, const Up& up) {
  const auto type = x2.scalar_type();
  return x2.size(0) > 0 && x2.size(0) <= TOKENS && up.B.size(1) <= RANKS && weight.numel() > 0 &&
         (type == at::kBFloat16 || type == at::kHalf) && weight.scalar_type() == type &&
         up.h.scalar_type() == type && is_aligned(x2) && is_aligned(weight);
}

void decode(const Device& device, const Tensor& y2, const Tensor& x2, const Tensor& weight,
            const Up& up, const Gain& gain, const Tensor& given_bias, const Tensor& inner) {
  const int64_t M = x2.size(0), K = x2.size(1), N = weight.size(0);
  const auto type = x2.scalar_type();
  const Tensor none, B = small(up.B), row_scale = small(up.scale);
  const auto [m, norm] = gain_operands(gain);
  const Tensor bias = small(given_bias);
  const int64_t blocks = ceil_div(N, ROWS);
  // A block keeps as much on its way as two of the other kernels.
  const auto [count, steps] = split(device, 2 * blocks, ceil_div(K, COLUMNS));
  const bool parts = count > 1;
  const Tensor sums = parts ? empty(x2, {count, M, N}, at::kFloat) : y2;
  const Tensor own_m = parts ? none : m, own_norm = parts ? none : norm,
               own_bias = parts ? none : bias;
  device.launch(form_of(Stem::decode, type, tiles_of(M), parts * PARTS), {blocks, count, 1}, weight,
                x2, up.h, B, none, row_scale, own_m, own_norm, own_bias, sums, parts ? none : inner,
                M, N, weight.stride(0), x2.stride(0), up.h.stride(0), up.h.stride(1), B.stride(0),
                B.stride(1), i32(K), i32(B.size(1)), i32(steps * COLUMNS / 32), number_of(B), 0,
                number_of(row_scale), number_of(own_m), number_of(own_bias),
                static_cast<float>(up.scaling));
  if (parts) {
    device.launch(form_of(Stem::decode_finish, type), {ceil_div(M * N, 256), 1, 1}, sums, m, norm,
                  bias, y2, inner, M, N, i32(count), number_of(m), number_of(bias));
  }
}

}  // namespace lorafast::host::cuda
