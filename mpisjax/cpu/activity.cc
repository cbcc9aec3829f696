#include "activity.h"

#include <algorithm>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mpisjax {

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));

// Measured: with a larger part of active places, tiles are as fast. With one vector, finding a place costs
// more than adding it.
#if defined(__AVX512F__)
constexpr double kDensest = 0.55, kDensestByOne = 0.3;
#else
constexpr double kDensest = 0.3, kDensestByOne = 0.2;
#endif

// How many sums are kept side by side, so that none waits for another.
constexpr int chains_of(int vectors) { return vectors == 1 ? 4 : 2; }

template <int vectors>
void sparse_row(const Activity& activity, int64_t row, const SparseRow& one, int64_t count, float* out,
                int64_t out_step) {
  constexpr int chains = chains_of(vectors);
  constexpr int64_t width = vectors * kLanes;
  // Local copies: the store of a vector below may change what a reference leads to, for all the compiler knows.
  const auto [first, stride, covered, in_channels, weights, add] = one;
  const int64_t columns = activity.columns;
  const int32_t* const places = activity.places.data();
  const float* const values = activity.values.data();
  const int32_t* const starts = activity.starts.data() + row * (columns + 1);
  int64_t from = first;
  for (int64_t x = 0; x < count; ++x, from += stride, out += out_step) {
    const int64_t low = std::min(std::max<int64_t>(from, 0), columns);
    const int64_t high = std::min(std::max<int64_t>(from + covered, low), columns);
    const int32_t* place = places + starts[low];
    const int32_t* const end = places + starts[high];
    const float* value = values + starts[low];
    // A place counts from column 0 of the row, and the weights from the first pixel that this output covers.
    const int64_t skipped = from * in_channels;
    Vec sums[chains][vectors] = {};
    if (add) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[0][v] = load(out + v * kLanes);
    }
    // The last round may have places left over: they add zero times the first place's weights. A branch here
    // would be mispredicted, since the number of places varies at random.
    for (; place < end; place += chains, value += chains) {
#pragma GCC unroll 4
      for (int n = 0; n < chains; ++n) {
        const bool there = n == 0 || place + n < end;
        const float* w = weights + ((there ? place[n] : place[0]) - skipped) * width;
        const float by = there ? value[n] : 0;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[n][v] += by * load(w + v * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Vec sum = sums[0][v];
#pragma GCC unroll 4
      for (int n = 1; n < chains; ++n) sum += sums[n][v];
      store(out + v * kLanes, sum);
    }
  }
}

}  // namespace

int64_t active(const float* values, int64_t count) {
  Ints silent = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t n = 0; n < whole; n += kLanes) silent += load(values + n) == Vec{};  // -1 where equal
  int64_t sum = count;
  for (int64_t n = whole; n < count; ++n) sum -= values[n] == 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += silent[lane];
  return sum;
}

bool worthwhile(int64_t active, int64_t count, int64_t out_channels) {
  return active < (out_channels <= kLanes ? kDensestByOne : kDensest) * count;
}

void Activity::list(const float* image, int64_t rows, int64_t columns, int64_t channels,
                    int64_t padded_channels) {
  this->columns = columns;
  const size_t room = rows * columns * channels + kLanes;  // whole vectors are written at the end of the list
  if (places.size() < room) places.resize(room), values.resize(room);
  starts.resize(rows * (columns + 1));
  int32_t count = 0;
  int32_t* start = starts.data();
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t x = 0; x < columns; ++x, image += channels) {
      *start++ = count;
      for (int64_t c = 0; c < channels; c += kLanes) {
        const int64_t at = x * padded_channels + c;
        const int lanes = std::min<int64_t>(kLanes, channels - c);
#if defined(__AVX512F__)
        const __m512 value = _mm512_maskz_loadu_ps((1u << lanes) - 1, image + c);
        const __mmask16 found = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512i place = _mm512_add_epi32(
            _mm512_set1_epi32(at), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        _mm512_storeu_ps(values.data() + count, _mm512_maskz_compress_ps(found, value));
        _mm512_storeu_si512(places.data() + count, _mm512_maskz_compress_epi32(found, place));
        count += __builtin_popcount(found);
#else
        for (int lane = 0; lane < lanes; ++lane) {  // no branch here, either
          values[count] = image[c + lane];
          places[count] = at + lane;
          count += image[c + lane] != 0;
        }
#endif
      }
    }
    *start++ = count;
  }
}

void Activity::give_back() {
  if (values.capacity() > kKeptScratch) *this = Activity{};
}

void add_sparse_row(const Activity& activity, int64_t row, const SparseRow& one, int vectors, int64_t count,
                    float* out, int64_t out_step) {
  const auto run = vectors == 1 ? sparse_row<1> : vectors == 2 ? sparse_row<2> : sparse_row<kMaxVectors>;
  run(activity, row, one, count, out, out_step);
}

}  // namespace mpisjax
