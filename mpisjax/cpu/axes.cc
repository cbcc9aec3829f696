#include "axes.h"

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace mpisjax {

std::vector<TapOffset> tap_offsets(int64_t taps, int64_t dilation, int64_t phase, int64_t low) {
  std::vector<TapOffset> found;
  for (int64_t k = 0; k < taps; ++k) {
    int64_t reach = phase + k - low;
    if (((reach % dilation) + dilation) % dilation == 0) found.push_back({k, reach / dilation});
  }
  return found;
}

Axis::Axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t dilation, int64_t low)
    : in(in), out(out), taps(taps), stride(stride), dilation(dilation), low(low), before(0), padded(in) {
  int64_t end = in;
  for (int64_t phase = 0; phase < dilation; ++phase) {
    int64_t last = count(phase) - 1;
    if (last < 0) continue;
    for (const TapOffset& one : tap_offsets(taps, dilation, phase, low)) {
      before = std::max(before, -one.offset);
      end = std::max(end, last * stride + one.offset + 1);
    }
  }
  padded = before + end;
}

void pad(const float* image, const Axis& rows, const Axis& columns, int64_t channels, int64_t padded_channels,
         float* to) {
  const int64_t row = columns.padded * padded_channels;
  const int64_t before = columns.before * padded_channels, width = columns.in * padded_channels;
  std::memset(to, 0, sizeof(float) * rows.before * row);
  for (int64_t y = 0; y < rows.in; ++y) {
    float* at = to + (rows.before + y) * row;
    std::memset(at, 0, sizeof(float) * before);
    pad_channels(image + y * columns.in * channels, columns.in, channels, padded_channels, at + before);
    std::memset(at + before + width, 0, sizeof(float) * (row - before - width));
  }
  std::memset(to + (rows.before + rows.in) * row, 0,
              sizeof(float) * (rows.padded - rows.before - rows.in) * row);
}

}  // namespace mpisjax
