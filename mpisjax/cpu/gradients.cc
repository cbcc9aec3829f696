// The gradient of a convolution with respect to its kernel, called by XLA:CPU: 8 input channels times 48 output channels
// are held in registers while it walks over an image's pixels; images, padded as for the convolution, one after another.

#include <cstdint>
#include <cstring>
#include <vector>

#include "axes.h"
#include "share.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace mpisjax;
namespace ffi = xla::ffi;

constexpr int kRows = kLanes == 16 ? 8 : 4;  // input channels at a time

// Adds to `vectors` vectors of output channels by kRows input channels of one tap's gradient what one image gives.
template <int vectors>
void outer(const float* x, const float* g, int64_t height, int64_t width, int64_t x_row, int64_t x_step,
           int64_t g_step, float* gradient, int64_t out_channels) {
  Vec sums[kRows][vectors] = {};
  for (int64_t i = 0; i < height; ++i, x += x_row) {
    const float* at = x;
    for (int64_t j = 0; j < width; ++j, at += x_step, g += g_step) {
      Vec other[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) other[v] = load(g + v * kLanes);
#pragma GCC unroll 14
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] += at[r] * other[v];
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = gradient + r * out_channels + v * kLanes;
      store(to, load(to) + sums[r][v]);  // an image's sum first, then the batch's: less is rounded away
    }
  }
}

// Adds what samples `begin` to `end` give to a gradient [taps, in, out] whose channels are `laid_out`.
void kernel_gradient(const float* x, const float* g, int64_t begin, int64_t end, const Axis& rows, const Axis& columns,
                     int64_t x_channels, int64_t g_channels, float* gradient) {
  const int64_t in_channels = laid_out(x_channels), out_channels = laid_out(g_channels);
  const int64_t pixels = rows.out * columns.out, in_pixels = rows.in * columns.in;
  float* padded = scratch(0, rows.padded * columns.padded * in_channels);
  float* kept = scratch(1, pixels * out_channels);
  float* wide = g_channels == out_channels ? nullptr : scratch(2, pixels * out_channels);
  for (int64_t b = begin; b < end; ++b) {
    pad(x + b * in_pixels * x_channels, rows, columns, x_channels, in_channels, padded);
    const float* of_image = g + b * pixels * g_channels;
    if (wide) widen(of_image, pixels, g_channels, out_channels, wide);
    const float* from = by_blocks(wide ? wide : of_image, pixels, out_channels, kept);
    for (int64_t first = 0; first < out_channels;) {
      const int vectors = vectors_at_a_time((out_channels - first) / kLanes);
      const auto run = vectors == 1 ? outer<1> : vectors == 2 ? outer<2> : outer<kMaxVectors>;
      for (int64_t i = 0; i < rows.taps; ++i) {
        for (int64_t j = 0; j < columns.taps; ++j) {
          const int64_t row = i - rows.low + rows.before, column = j - columns.low + columns.before;
          const float* at = padded + (row * columns.padded + column) * in_channels;
          float* to = gradient + (i * columns.taps + j) * in_channels * out_channels + first;
          for (int64_t c = 0; c < x_channels; c += kRows) {
            run(at + c, from, rows.out, columns.out, rows.stride * columns.padded * in_channels,
                columns.stride * in_channels, vectors * kLanes, to + c * out_channels, out_channels);
          }
        }
      }
      first += vectors * kLanes;
      from += pixels * vectors * kLanes;
    }
  }
}

// `numbers`: a version, threads, stride, rows and columns of zeros before.
ffi::Error KernelGradient(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> g,
                          ffi::Buffer<ffi::S32> numbers, ffi::ResultBuffer<ffi::F32> w) {
  const int32_t* number = numbers.typed_data();
  const int64_t threads = number[1], stride = number[2], top = number[3], left = number[4];
  const auto in = x.dimensions(), out = g.dimensions(), kernel = w->dimensions();
  const Axis rows(in[1], out[1], kernel[0], stride, 1, top);
  const Axis columns(in[2], out[2], kernel[1], stride, 1, left);
  const int64_t in_channels = laid_out(in[3]), out_channels = laid_out(out[3]);
  const bool even = in[3] == in_channels && out[3] == out_channels;
  const int64_t taps = kernel[0] * kernel[1], size = taps * in_channels * out_channels;
  const int64_t parts = parts_of(in[0], threads);
  std::vector<float> others(size * (even ? parts - 1 : parts));
  float* sum = even ? w->typed_data() : others.data() + (parts - 1) * size;
  std::memset(sum, 0, sizeof(float) * size);
  share(pool, threads, in[0], [&](int64_t part, int64_t begin, int64_t end) {
    float* to = part ? others.data() + (part - 1) * size : sum;
    kernel_gradient(x.typed_data(), g.typed_data(), begin, end, rows, columns, in[3], out[3], to);
  });
  for (int64_t part = 1; part < parts; ++part) {  // in order: the sum is always the same
    for (int64_t i = 0; i < size; ++i) sum[i] += others[(part - 1) * size + i];
  }
  for (int64_t tap = 0; !even && tap < taps; ++tap) {
    narrow(sum + tap * in_channels * out_channels, in[3], out_channels, out[3],
           w->typed_data() + tap * in[3] * out[3]);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MpisjaxKernelGradient, KernelGradient, bound());
