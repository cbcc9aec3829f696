// Stride-1 convolutions with fewer multiplications; mpisjax/cpu/winograd.py has the method and the reasons.
// An output is `A [(G g) * (B d)]` in both directions, for 4 x 4 outputs at a time. Here the three stages
// meet in the cache of one core: a few rows of tiles are brought to their points, multiplied, and brought
// back, before the next rows.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "share.h"
#include "tiles.h"
#include "xla/ffi/api/ffi.h"

namespace {

using namespace mpisjax;
namespace ffi = xla::ffi;

constexpr int kOutputs = 4;
constexpr int64_t kCache =
    160 * 1024;  // floats between the stages at a time: half of a usual second-level cache

// The matrix B for n points. The points are 0, pairs of a number and its negative, and infinity. kMiddle has
// the first row of each pair; the second row has the opposite sign in odd columns. The matrix A consists of
// the numbers' powers.
template <int n>
struct Points;

template <>
struct Points<6> {
  static constexpr float kPairs[] = {1, 2};
  static constexpr float kFirst[] = {1, 0, -5 / 4.0, 0, 1 / 4.0, 0};
  static constexpr float kMiddle[][6] = {{0, 2 / 3.0, 2 / 3.0, -1 / 6.0, -1 / 6.0, 0},
                                         {0, -1 / 12.0, -1 / 24.0, 1 / 12.0, 1 / 24.0, 0}};
  static constexpr float kLast[] = {0, 4, 0, -5, 0, 1};
};

template <>
struct Points<8> {
  static constexpr float kPairs[] = {1, 2, 0.5};
  static constexpr float kFirst[] = {1, 0, -21 / 4.0, 0, 21 / 4.0, 0, -1, 0};
  static constexpr float kMiddle[][8] = {
      {0, -2 / 9.0, -2 / 9.0, 17 / 18.0, 17 / 18.0, -2 / 9.0, -2 / 9.0, 0},
      {0, 1 / 180.0, 1 / 360.0, -1 / 36.0, -1 / 72.0, 1 / 45.0, 1 / 90.0, 0},
      {0, 64 / 45.0, 128 / 45.0, -16 / 9.0, -32 / 9.0, 16 / 45.0, 32 / 45.0, 0}};
  static constexpr float kLast[] = {0, -1, 0, 21 / 4.0, 0, -21 / 4.0, 0, 1};
};

// The sum of every other term of weights * d, from `first` on.
template <int n>
inline Vec every_other(const float (&weights)[n], const Vec* d, int first) {
  Vec sum = {};
#pragma GCC unroll 8
  for (int j = first; j < n; j += 2) {
    if (weights[j] != 0) sum += weights[j] * d[j];
  }
  return sum;
}

template <int n>
inline void to_points(const Vec* d, Vec* points) {
  using P = Points<n>;
  points[0] = every_other(P::kFirst, d, 0);
#pragma GCC unroll 4
  for (int p = 0; p < (n - 2) / 2; ++p) {
    const Vec even = every_other(P::kMiddle[p], d, 0), odd = every_other(P::kMiddle[p], d, 1);
    points[2 * p + 1] = even + odd;
    points[2 * p + 2] = even - odd;
  }
  points[n - 1] = every_other(P::kLast, d, 1);
}

template <int n>
inline void from_points(const Vec* points, Vec* out) {
  using P = Points<n>;
  out[0] = points[0];
  out[1] = out[2] = Vec{};
  out[3] = points[n - 1];
#pragma GCC unroll 4
  for (int p = 0; p < (n - 2) / 2; ++p) {
    const float c = P::kPairs[p];
    const Vec sum = points[2 * p + 1] + points[2 * p + 2], difference = points[2 * p + 1] - points[2 * p + 2];
    out[0] += sum;
    out[1] += c * difference;
    out[2] += (c * c) * sum;
    out[3] += (c * c * c) * difference;
  }
}

// An image of a batch, or of outputs: [height, width, channels]. It goes by value: a store of a vector may
// change whatever a reference leads to, so the compiler would read a reference's fields again after each.
struct Shape {
  int64_t height, width, channels;
};

// Brings a tile to its n * n points, for kLanes channels. The tile's outputs begin at (top, left). Points lie
// `apart` floats from one another.
template <int n>
void spread(const float* image, Shape shape, int64_t top, int64_t left, float* points, int64_t apart) {
  constexpr int half = (n - kOutputs + 1) / 2;
  const int64_t y = top - half, x = left - half;
  const bool inside = y >= 0 && x >= 0 && y + n <= shape.height && x + n <= shape.width;
  Vec between[n][n];  // [column, point of rows]
  for (int j = 0; j < n; ++j) {
    Vec column[n];
    const float* from = image + (y * shape.width + x + j) * shape.channels;
    if (inside) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) column[i] = load(from + i * shape.width * shape.channels);
    } else {
      const bool outside = x + j < 0 || x + j >= shape.width;
      for (int i = 0; i < n; ++i) {
        const bool zero = outside || y + i < 0 || y + i >= shape.height;
        column[i] = zero ? Vec{} : load(from + i * shape.width * shape.channels);
      }
    }
    to_points<n>(column, between[j]);
  }
  for (int i = 0; i < n; ++i) {
    Vec row[n], found[n];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) row[j] = between[j][i];
    to_points<n>(row, found);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) store(points + (j * n + i) * apart, found[j]);
  }
}

// Brings points back to the tile's outputs, as far as the image has them.
template <int n>
void gather(const float* points, int64_t apart, float* image, Shape shape, int64_t top, int64_t left) {
  const int64_t rows = std::min<int64_t>(kOutputs, shape.height - top);
  const int64_t columns = std::min<int64_t>(kOutputs, shape.width - left);
  Vec between[n][kOutputs];  // [point of columns, row]
  for (int j = 0; j < n; ++j) {
    Vec column[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) column[i] = load(points + (j * n + i) * apart);
    from_points<n>(column, between[j]);
  }
  for (int i = 0; i < rows; ++i) {
    Vec row[n], found[kOutputs];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) row[j] = between[j][i];
    from_points<n>(row, found);
    for (int j = 0; j < columns; ++j) {
      store(image + ((top + i) * shape.width + left + j) * shape.channels, found[j]);
    }
  }
}

// products[t, out] = spread[t, in] * kernel[in, out] for `count` tiles. The kernel is laid out `by_blocks`.
void multiply(const float* spread, int64_t count, int64_t in_channels, int64_t out_channels,
              const float* kernel, float* products) {
  std::vector<Tap> tap{{0, kernel}};
  for (int64_t first = 0; first < out_channels;) {
    const int vectors = vectors_at_a_time((out_channels - first) / kLanes);
    const int64_t channels = vectors * kLanes;
    const int pixels = pixels_at_a_time(count, vectors);
    const Tile run = find_tile(vectors, pixels, in_channels);
    for (int64_t t = 0; t < count; t += pixels) {
      const int64_t at = std::min(t, count - pixels);  // the last round may compute some tiles again
      run(spread + at * in_channels, tap, in_channels, channels, products + at * out_channels + first,
          out_channels, in_channels);
    }
    first += channels;
    tap[0].weights += in_channels * channels;
  }
}

// Convolves some samples of a batch. `blocks` are the kernels, laid out `by_blocks`.
template <int n>
void filter(const float* x, Shape in, int64_t batch, const float* blocks, float* y, Shape out) {
  const int64_t size = in.channels * out.channels;
  const int64_t across = (in.width + kOutputs - 1) / kOutputs, down = (in.height + kOutputs - 1) / kOutputs;
  // The rows of tiles of all images stand one after another. As many are done at a time as fit into the
  // cache. An image with more rows is divided into equal parts. The kernels of wide layers do not fit, and
  // are read again for each part: then the parts may be as large as those.
  const int64_t room = std::max(kCache, n * n * size / 2);
  const int64_t fit = std::max<int64_t>(1, room / (n * n * across * (in.channels + out.channels)));
  const int64_t all = batch * down;
  const int64_t parts = (down + fit - 1) / fit;  // of each image
  const int64_t rows = parts > 1 ? (down + parts - 1) / parts : std::min(fit / down * down, all);
  Scratch room_of_points(ScratchSlot::kImage, n * n * rows * across * (in.channels + out.channels));
  float* points = room_of_points.data();
  float* products = points + n * n * rows * across * in.channels;
  for (int64_t begin = 0; begin < all;) {
    // A part ends where its image ends, or before.
    const int64_t count = std::min(rows, parts > 1 ? down - begin % down : all - begin),
                  tiles = count * across;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = begin + t / across, image = row / down;
      for (int64_t c = 0; c < in.channels; c += kLanes) {
        spread<n>(x + image * in.height * in.width * in.channels + c, in, row % down * kOutputs,
                  t % across * kOutputs, points + t * in.channels + c, tiles * in.channels);
      }
    }
    for (int p = 0; p < n * n; ++p) {
      multiply(points + p * tiles * in.channels, tiles, in.channels, out.channels, blocks + p * size,
               products + p * tiles * out.channels);
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = begin + t / across, image = row / down;
      for (int64_t c = 0; c < out.channels; c += kLanes) {
        gather<n>(products + t * out.channels + c, tiles * out.channels,
                  y + image * out.height * out.width * out.channels + c, out, row % down * kOutputs,
                  t % across * kOutputs);
      }
    }
    begin += count;
  }
}

// `numbers`: a version, threads.
ffi::Error Filter(ffi::ThreadPool pool, Array x, Array kernels, Numbers numbers, Result y) {
  const char* name = "mpisjax_filter";
  ffi::Error error = check(name, {{has_rank(x, 4) && has_rank(*y, 4), "the images have four axes"},
                                  {has_rank(kernels, 3), "the kernels have three axes"},
                                  {numbers.element_count() == 2, "there are two numbers"}});
  if (error.failure()) return error;
  const int64_t threads = numbers.typed_data()[1];
  const auto dimensions = x.dimensions(), shape = kernels.dimensions(), made = y->dimensions();
  const Shape in{dimensions[1], dimensions[2], dimensions[3]}, out{in.height, in.width, shape[2]};
  error = check(
      name,
      {{dimensions[0] == made[0] && in.height == made[1] && in.width == made[2], "the images differ in size"},
       {in.channels == shape[1], "the input and the kernels differ in channels"},
       {made[3] == shape[2], "the output and the kernels differ in channels"},
       {shape[0] == 36 || shape[0] == 64, "kernels are of 36 or 64 points"},
       {in.channels % kChannels == 0 && out.channels % kChannels == 0, "channels come in multiples of 16"}});
  if (error.failure()) return error;
  if (y->element_count() == 0) return ffi::Error::Success();
  const int64_t size = in.channels * out.channels;
  Scratch kept(ScratchSlot::kKernel, shape[0] * size);
  const float* blocks = kernels.typed_data();
  for (int64_t p = 0; p < shape[0]; ++p) {
    float* to = kept.data() + p * size;
    if (by_blocks(kernels.typed_data() + p * size, in.channels, out.channels, to) == to) blocks = kept.data();
  }
  const auto run = shape[0] == 36 ? filter<6> : filter<8>;
  share(pool, threads, dimensions[0], [&](int64_t begin, int64_t end) {
    const int64_t pixels = in.height * in.width;
    run(x.typed_data() + begin * pixels * in.channels, in, end - begin, blocks,
        y->typed_data() + begin * pixels * out.channels, out);
  });
  return ffi::Error::Success();
}

ffi::Error GuardedFilter(ffi::ThreadPool pool, Array x, Array kernels, Numbers numbers, Result y) {
  return guarded([&] { return Filter(pool, x, kernels, numbers, y); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MpisjaxFilter, GuardedFilter, ffi_signature());
