// The routine that both kinds of convolution spend their time in (see convolutions.cc), and how its arrays
// are laid out.

#ifndef MPISJAX_CPU_TILES_H_
#define MPISJAX_CPU_TILES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace mpisjax {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxVectors = 3;  // vectors of output channels that registers hold at a time
#else
constexpr int kLanes = 8;
constexpr int kMaxVectors = 2;
#endif
constexpr int kChannels = 16;  // working copies have a multiple of this many channels

// `channels`, rounded up to a multiple of kChannels. The channels that are added hold zeros.
inline int64_t round_up_channels(int64_t channels) {
  return (channels + kChannels - 1) / kChannels * kChannels;
}

// A vector, and a vector that lies at any address of floats.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float FloatsAsVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const FloatsAsVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<FloatsAsVec*>(to) = value; }

struct Tap {
  int64_t offset;        // in floats, from an output pixel's place in the input
  const float* weights;  // [in, out]
};

// Computes a tile: some pixels of a row, times some vectors of output channels. Its arguments are:
//   in:           the first pixel's place in the input
//   taps:         what each pixel is the sum over
//   in_channels:  how many input channels there are
//   weight_step:  floats from one input channel's weights to the next one's
//   out:          the first output pixel
//   out_step:     floats from one output pixel to the next
//   step:         floats from one pixel's place in the input to the next
using Tile = void (*)(const float* in, const std::vector<Tap>& taps, int64_t in_channels, int64_t weight_step,
                      float* out, int64_t out_step, int64_t step);

// The routine for 1 to kMaxVectors vectors, a number of pixels (see below), and the step that it will be
// called with.
Tile find_tile(int vectors, int pixels, int64_t step);

// How many vectors to do at a time of the `left` ones, and how many pixels of a row of `count`.
int vectors_at_a_time(int64_t left);
int pixels_at_a_time(int64_t count, int vectors);

// Lays out `rows` rows of output channels as blocks, one after another: [block, row, vectors_at_a_time *
// kLanes]. A tile reads one block. In long rows those parts would share few places of the first-level cache.
// Returns `from` itself where there is one block, else `to`, which is then filled.
const float* by_blocks(const float* from, int64_t rows, int64_t out_channels, float* to);

// Copies rows of `channels` floats to rows of `padded` floats with zeros at their end, and back.
void pad_channels(const float* from, int64_t rows, int64_t channels, int64_t padded, float* to);
void crop_channels(const float* from, int64_t rows, int64_t padded, int64_t channels, float* to);

// What a thread's working memory is for. Each has memory of its own.
enum class ScratchSlot { kImage, kKernel, kOutput };

// Working memory, of undefined content. Small ones stay with their thread for the next call, since new memory
// costs page faults. Large ones are given back when the object goes. A thread may hold one object of each
// slot at a time.
class Scratch {
 public:
  Scratch(ScratchSlot slot, size_t size);
  float* data() { return data_; }

 private:
  std::unique_ptr<float[]> own_;
  float* data_;
};

// Floats of each slot that stay with a thread: 4 MiB.
constexpr size_t kKeptScratch = size_t{1} << 20;

}  // namespace mpisjax

#endif  // MPISJAX_CPU_TILES_H_
