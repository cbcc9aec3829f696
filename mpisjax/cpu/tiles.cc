#include "tiles.h"

#include <algorithm>
#include <cstring>

namespace mpisjax {

namespace {

// A tile of `pixels` pixels times `vectors` vectors; see tiles.h. A step that the compiler knows saves
// registers. `known` is that step, or 0: then the step is the last argument.
template <int vectors, int pixels, int known>
void tile(const float* in, const std::vector<Tap>& taps, int64_t in_channels, int64_t weight_step, float* out,
          int64_t out_step, int64_t any_step) {
  const int64_t step = known ? known : any_step;
  Vec sums[pixels][vectors] = {};
  for (const Tap& tap : taps) {
    const float* x = in + tap.offset;
    const float* w = tap.weights;
    for (int64_t c = 0; c < in_channels; ++c, ++x, w += weight_step) {
      Vec weights[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) weights[v] = load(w + v * kLanes);
#pragma GCC unroll 14
      for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[p][v] += x[p * step] * weights[v];
      }
    }
  }
#pragma GCC unroll 14
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(out + p * out_step + v * kLanes, sums[p][v]);
  }
}

template <int vectors, int pixels>
Tile tile_of_step(int64_t step) {
  switch (step) {
    case 16: return tile<vectors, pixels, 16>;
    case 32: return tile<vectors, pixels, 32>;
    case 48: return tile<vectors, pixels, 48>;
    case 64: return tile<vectors, pixels, 64>;
    case 96: return tile<vectors, pixels, 96>;
    case 128: return tile<vectors, pixels, 128>;
    case 256: return tile<vectors, pixels, 256>;
    case 512: return tile<vectors, pixels, 512>;
    default: return tile<vectors, pixels, 0>;
  }
}

template <int vectors>
Tile tile_of(int pixels, int64_t step) {
  switch (pixels) {
    case 14:
      if constexpr (vectors < kMaxVectors)
        return tile_of_step<vectors, 14>(step);
      else
        return nullptr;
    case 8: return tile_of_step<vectors, 8>(step);
    case 7: return tile_of_step<vectors, 7>(step);
    case 4: return tile_of_step<vectors, 4>(step);
    default: return tile_of_step<vectors, 1>(step);
  }
}

}  // namespace

Tile find_tile(int vectors, int pixels, int64_t step) {
  switch (vectors) {
    case 1: return tile_of<1>(pixels, step);
    case 2: return tile_of<2>(pixels, step);
#if defined(__AVX512F__)
    case 3: return tile_of<3>(pixels, step);
#endif
    default: return nullptr;
  }
}

int vectors_at_a_time(int64_t left) {
  // Four are done as two and two: three and one would be slower.
  return left == kMaxVectors + 1 ? (kMaxVectors + 1) / 2 : std::min<int64_t>(left, kMaxVectors);
}

int pixels_at_a_time(int64_t count, int vectors) {
#if !defined(__AVX512F__)
  if (vectors == kMaxVectors) return count >= 4 ? 4 : 1;  // there are sixteen registers
#endif
  if (count % 14 == 0 && vectors < kMaxVectors) return 14;
  if (count % 7 == 0) return 7;
  return count >= 8 ? 8 : count >= 4 ? 4 : 1;
}

const float* by_blocks(const float* from, int64_t rows, int64_t out_channels, float* to) {
  float* at = to;
  for (int64_t first = 0; first < out_channels;) {
    const int64_t width = vectors_at_a_time((out_channels - first) / kLanes) * kLanes;
    if (width == out_channels) return from;
    for (int64_t row = 0; row < rows; ++row, at += width) {
      std::memcpy(at, from + row * out_channels + first, sizeof(float) * width);
    }
    first += width;
  }
  return to;
}

void pad_channels(const float* from, int64_t rows, int64_t channels, int64_t padded, float* to) {
  if (channels == padded) {
    std::memcpy(to, from, sizeof(float) * rows * padded);
    return;
  }
  for (int64_t row = 0; row < rows; ++row, from += channels, to += padded) {
    std::memcpy(to, from, sizeof(float) * channels);
    std::memset(to + channels, 0, sizeof(float) * (padded - channels));
  }
}

void crop_channels(const float* from, int64_t rows, int64_t padded, int64_t channels, float* to) {
  for (int64_t row = 0; row < rows; ++row, from += padded, to += channels) {
    std::memcpy(to, from, sizeof(float) * channels);
  }
}

Scratch::Scratch(ScratchSlot slot, size_t size) {
  struct Kept {
    std::unique_ptr<float[]> data;
    size_t size = 0;
  };
  thread_local Kept all[3];
  if (size > kKeptScratch) {
    own_.reset(new float[size]);
    data_ = own_.get();
    return;
  }
  Kept& kept = all[static_cast<int>(slot)];
  if (kept.size < size) {
    kept = {};  // gives the old one back before a larger one is asked for
    kept.data.reset(new float[size]);
    kept.size = size;
  }
  data_ = kept.data.get();
}

}  // namespace mpisjax
