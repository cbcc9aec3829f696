// The routine that both kinds of convolution spend their time in; see convolutions.cc.

#ifndef MPISJAX_NATIVE_TILES_H_
#define MPISJAX_NATIVE_TILES_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mpisjax {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxVectors = 3;  // of output channels, in registers at a time
#else
constexpr int kLanes = 8;
constexpr int kMaxVectors = 2;
#endif
constexpr int kChannels = 16;  // inside, channels are laid out in multiples of it

// So many channels, and the zeros behind them.
inline int64_t laid_out(int64_t channels) { return (channels + kChannels - 1) / kChannels * kChannels; }

// Of any alignment.
typedef float Vec __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

struct Tap {
  int64_t offset;        // from an output pixel's place in the input, in floats
  const float* weights;  // [in, out]
};

// Computes some pixels times some vectors of output channels: from the first input pixel, the taps, the number of input
// channels and the distance between their weights, to the first output pixel, each next one of which is so many floats
// further, and `step` floats further in the input.
using Tile = void (*)(const float*, const std::vector<Tap>&, int64_t, int64_t, float*, int64_t, int64_t step);

// For so many vectors (1 to kMaxVectors), pixels (see below), and the step that it will be called with.
Tile find_tile(int vectors, int pixels, int64_t step);

// How many of the channels' vectors left to do, and of `count` pixels in a row, to do at a time.
int vectors_at_a_time(int64_t left);
int pixels_at_a_time(int64_t count, int vectors);

// Kernels [taps, in, out], or anything with so many rows of output channels, one block of channels after another:
// [block, taps, in, vectors_at_a_time * kLanes]. Long rows, of which a tile reads a part, share few places in the
// first-level cache. Gives `from` itself where there is one block, else `to`, filled.
const float* by_blocks(const float* from, int64_t rows, int64_t out_channels, float* to);

// Rows of `channels` floats as rows of `wide`, zeros behind them, and back.
void widen(const float* from, int64_t rows, int64_t channels, int64_t wide, float* to);
void narrow(const float* from, int64_t rows, int64_t wide, int64_t channels, float* to);

// Memory of this thread, for one of a few purposes; a next call gives the same.
constexpr int kPurposes = 3;
float* scratch(int purpose, size_t size);

}  // namespace mpisjax

#endif  // MPISJAX_NATIVE_TILES_H_
