// Convolutions of float32 activity [batch, height, width, channels], called by XLA:CPU.
//
// The convolutions of a spiking stream are small: 16 to 64 channels, 7 to 28 pixels a side, often strided. A library's
// way, a matrix product of patches, spends more time on making the patches than on the product. Here an image is copied
// once, with its padding, and then read in place: a tile of 8 pixels times 48 channels, or 14 times 32, is held in
// registers while every tap and input channel is added to it (tiles.cc).
//
// What varies is which input pixels an output pixel meets, so that one routine serves a convolution, a strided one, and
// the transposed one, whose outputs of one phase meet every second tap. An image of which little is active goes by the
// list of that instead (activity.cc). The gradient with respect to the kernel holds
// 8 input channels times 48 output channels in registers and walks over the pixels. Channels in other than multiples of 16
// are laid out as the next one (`laid_out`), in the copies; only outputs are copied once more for it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "activity.h"
#include "share.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace mpisjax;
namespace ffi = xla::ffi;

constexpr int kRows = kLanes == 16 ? 8 : 4;  // input channels at a time, in the kernel's gradient

// The taps of one direction that outputs of one phase meet, and where: (tap, offset in input pixels).
struct Meeting {
  int64_t tap, offset;
};

std::vector<Meeting> meetings(int64_t taps, int64_t dilation, int64_t phase, int64_t low) {
  std::vector<Meeting> found;
  for (int64_t k = 0; k < taps; ++k) {
    int64_t reach = phase + k - low;
    if (((reach % dilation) + dilation) % dilation == 0) found.push_back({k, reach / dilation});
  }
  return found;
}

// One direction: sizes, and how an output's coordinate becomes an input's.
struct Axis {
  int64_t in, out, taps, stride, dilation, low;
  int64_t before, padded;  // zeros before, and the size with all zeros

  Axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t dilation, int64_t low)
      : in(in), out(out), taps(taps), stride(stride), dilation(dilation), low(low), before(0), padded(in) {
    int64_t end = in;
    for (int64_t phase = 0; phase < dilation; ++phase) {
      int64_t last = count(phase) - 1;
      if (last < 0) continue;
      for (const Meeting& one : meetings(taps, dilation, phase, low)) {
        before = std::max(before, -one.offset);
        end = std::max(end, last * stride + one.offset + 1);
      }
    }
    padded = before + end;
  }

  // Outputs of a phase.
  int64_t count(int64_t phase) const { return phase < out ? (out - phase + dilation - 1) / dilation : 0; }
};

// An image [rows, columns, channels] with zeros around it, and behind its channels up to `wide`.
void pad(const float* image, const Axis& rows, const Axis& columns, int64_t channels, int64_t wide, float* padded) {
  const int64_t row = columns.padded * wide, before = columns.before * wide, width = columns.in * wide;
  std::memset(padded, 0, sizeof(float) * rows.before * row);
  for (int64_t y = 0; y < rows.in; ++y) {
    float* to = padded + (rows.before + y) * row;
    std::memset(to, 0, sizeof(float) * before);
    widen(image + y * columns.in * channels, columns.in, channels, wide, to + before);
    std::memset(to + before + width, 0, sizeof(float) * (row - before - width));
  }
  std::memset(padded + (rows.before + rows.in) * row, 0, sizeof(float) * (rows.padded - rows.before - rows.in) * row);
}

// A kernel [taps, in, out] as its channels are laid out.
const float* wide_kernel(const float* kernel, int64_t taps, int64_t in_channels, int64_t out_channels, float* to) {
  const int64_t in = laid_out(in_channels), out = laid_out(out_channels), used = in_channels * out;
  for (int64_t tap = 0; tap < taps; ++tap) {
    widen(kernel + tap * in_channels * out_channels, in_channels, out_channels, out, to + tap * in * out);
    std::memset(to + tap * in * out + used, 0, sizeof(float) * (in * out - used));
  }
  return to;
}

// Kernels [rows, columns, in, out] as outputs of one phase meet them, `by_blocks`: [block, phase, row, column of that
// phase, in, channels of the block]. With one phase nothing moves.
const float* by_phases(const float* kernel, const Axis& rows, const Axis& columns, int64_t in_channels,
                       int64_t out_channels, float* moved, float* to) {
  const int64_t size = in_channels * out_channels;
  if (columns.dilation > 1) {
    float* at = moved;
    for (int64_t phase = 0; phase < columns.dilation; ++phase) {
      const std::vector<Meeting> met = meetings(columns.taps, columns.dilation, phase, columns.low);
      for (int64_t y = 0; y < rows.taps; ++y) {
        for (const Meeting& x : met) {
          std::memcpy(at, kernel + (y * columns.taps + x.tap) * size, sizeof(float) * size);
          at += size;
        }
      }
    }
    kernel = moved;
  }
  return by_blocks(kernel, rows.taps * columns.taps * in_channels, out_channels, to);
}

// A convolution of one image, and which way it goes.
struct Image {
  int64_t channels;          // of those that are laid out, the others being zero
  const float* padded;       // by tiles
  const Activity* activity;  // or, where that is null, by what is active
};

// The outputs of one phase, `vectors` vectors of their channels; the phase's part of the kernel.
void convolve_phase(const Image& image, const Axis& rows, const Axis& columns, int64_t row_phase, int64_t column_phase,
                    int64_t in_channels, int64_t out_channels, int vectors, const float* weights, float* out) {
  const std::vector<Meeting> down = meetings(rows.taps, rows.dilation, row_phase, rows.low);
  const std::vector<Meeting> across = meetings(columns.taps, columns.dilation, column_phase, columns.low);
  const int64_t height = rows.count(row_phase), width = columns.count(column_phase), channels = vectors * kLanes;
  if (height <= 0 || width <= 0) return;
  const int64_t taps = across.size(), out_step = columns.dilation * out_channels;
  const int64_t out_row = rows.dilation * columns.out * out_channels;
  out += (row_phase * columns.out + column_phase) * out_channels;
  if (image.activity && taps && !down.empty()) {
    for (const Meeting& y : down) {
      const float* row_weights = weights + y.tap * taps * in_channels * channels;
      Sweep one{across[0].offset, columns.stride, taps, in_channels, row_weights, &y != &down[0]};
      for (int64_t n = 0; n < height; ++n) {
        const int64_t row = n * rows.stride + y.offset;
        const bool outside = row < 0 || row >= rows.in;
        if (outside && one.add) continue;
        Sweep none = one;
        none.taps = 0;
        sweep(*image.activity, outside ? 0 : row, outside ? none : one, vectors, width, out + n * out_row, out_step);
      }
    }
    return;
  }
  std::vector<Tap> all;
  for (const Meeting& y : down) {
    for (int64_t x = 0; x < taps; ++x) {
      const int64_t offset = (rows.before + y.offset) * columns.padded + columns.before + across[x].offset;
      all.push_back({offset * in_channels, weights + (y.tap * taps + x) * in_channels * channels});
    }
  }
  const int64_t step = columns.stride * in_channels;
  const int pixels = pixels_at_a_time(width, vectors);
  const Tile run = find_tile(vectors, pixels, step);
  for (int64_t n = 0; n < height; ++n) {
    const float* in = image.padded + n * rows.stride * columns.padded * in_channels;
    for (int64_t x = 0; x < width; x += pixels) {
      const int64_t at = std::min(x, width - pixels);  // the last tile may do some pixels again
      run(in + at * step, all, image.channels, channels, out + n * out_row + at * out_step, out_step, step);
    }
  }
}

void convolve(const Image& image, const Axis& rows, const Axis& columns, int64_t in_channels, int64_t out_channels,
              const float* weights, float* out) {
  for (int64_t first = 0; first < out_channels;) {
    const int vectors = vectors_at_a_time((out_channels - first) / kLanes);
    for (int64_t j = 0; j < columns.dilation; ++j) {
      for (int64_t i = 0; i < rows.dilation; ++i) {
        convolve_phase(image, rows, columns, i, j, in_channels, out_channels, vectors, weights, out + first);
      }
      const int64_t taps = meetings(columns.taps, columns.dilation, j, columns.low).size();
      weights += rows.taps * taps * in_channels * vectors * kLanes;
    }
    first += vectors * kLanes;
  }
}

// `numbers`: a version, threads, stride, dilation, rows and columns of zeros before.
ffi::Error Convolve(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> w,
                    ffi::Buffer<ffi::S32> numbers, ffi::ResultBuffer<ffi::F32> y) {
  const int32_t* number = numbers.typed_data();
  const int64_t threads = number[1], stride = number[2], dilation = number[3], top = number[4], left = number[5];
  const auto in = x.dimensions(), kernel = w.dimensions(), out = y->dimensions();
  const Axis rows(in[1], out[1], kernel[0], stride, dilation, top);
  const Axis columns(in[2], out[2], kernel[1], stride, dilation, left);
  const int64_t in_channels = laid_out(in[3]), out_channels = laid_out(out[3]);
  const bool even = in[3] == in_channels && out[3] == out_channels;
  const int64_t taps = kernel[0] * kernel[1], size = taps * in_channels * out_channels;
  const int64_t pixels = in[1] * in[2], out_pixels = out[1] * out[2];
  float* kept = scratch(1, (even ? 2 : 3) * size);
  const float* laid = w.typed_data();
  if (!even) laid = wide_kernel(laid, taps, in[3], out[3], kept + 2 * size);
  const float* weights = by_phases(laid, rows, columns, in_channels, out_channels, kept, kept + size);
  share(pool, threads, in[0], [&](int64_t, int64_t begin, int64_t end) {
    thread_local Activity activity;
    float* padded = scratch(0, rows.padded * columns.padded * in_channels);
    float* wide = out[3] == out_channels ? nullptr : scratch(2, out_pixels * out_channels);
    for (int64_t b = begin; b < end; ++b) {
      const float* from = x.typed_data() + b * pixels * in[3];
      float* to = y->typed_data() + b * out_pixels * out[3];
      const int64_t count = active(from, pixels * in[3]);
      if (count == 0) {  // as all feedback is before the first step
        std::memset(to, 0, sizeof(float) * out_pixels * out[3]);
        continue;
      }
      const bool sparse = worthwhile(count, pixels * in[3], out_channels);
      if (sparse) {
        activity.list(from, in[1], in[2], in[3], in_channels);
      } else {
        pad(from, rows, columns, in[3], in_channels, padded);
      }
      convolve({in[3], padded, sparse ? &activity : nullptr}, rows, columns, in_channels, out_channels, weights,
               wide ? wide : to);
      if (wide) narrow(wide, out_pixels, out_channels, out[3], to);
    }
  });
  return ffi::Error::Success();
}

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(MpisjaxConvolve, Convolve, bound());

XLA_FFI_DEFINE_HANDLER_SYMBOL(MpisjaxKernelGradient, KernelGradient, bound());
