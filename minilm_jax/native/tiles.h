// What the kernels share: vectors, tiles of rows x keys, segments, and work for all threads.
//
// The unit of work is one head of one row of the batch. Its keys stand in panels of `kPanel`, each
// [features, kPanel], so that every product of logits runs along whole vectors; its rows are met in
// blocks whose logits, [panels, rows, kPanel], stay within a core's second cache level. What is
// beyond the last token is filled up and seen by no row.

#ifndef MINILM_JAX_NATIVE_TILES_H_
#define MINILM_JAX_NATIVE_TILES_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace minilm_jax {

#if defined(__AVX512F__)
inline constexpr int64_t kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
inline constexpr int64_t kLanes = 8, kVectors = 2;
#else
inline constexpr int64_t kLanes = 4, kVectors = 4;
#endif
inline constexpr int64_t kPanel = kLanes * kVectors;  // keys
inline constexpr int64_t kRows = 4;                   // of one tile

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <typename Vector = Floats>
inline Vector Load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector>
inline void Store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

inline Floats Fill(float x) { return x - Floats{}; }

inline Floats Max(Floats x, Floats y) { return x > y ? x : y; }

inline constexpr std::make_index_sequence<kLanes> kLane;

// The numbered elements of two vectors, one after the other.
template <int32_t... numbers>
inline Floats Pick(Floats x, Floats y) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, numbers...);
#else
  return __builtin_shuffle(x, y, Ints{numbers...});
#endif
}

template <int32_t by, size_t... i>
inline Floats Rotate(Floats x, std::index_sequence<i...>) {
  return Pick<static_cast<int32_t>((i + by) % kLanes)...>(x, x);
}

// All elements joined, in the order of a tree.
template <typename Join>
inline float Fold(Floats x, Join&& join) {
  if constexpr (kLanes >= 16) x = join(x, Rotate<8>(x, kLane));
  if constexpr (kLanes >= 8) x = join(x, Rotate<4>(x, kLane));
  x = join(x, Rotate<2>(x, kLane));
  x = join(x, Rotate<1>(x, kLane));
  return x[0];
}

inline float Sum(Floats x) {
  return Fold(x, [](Floats x, Floats y) { return x + y; });
}

inline float Peak(Floats x) { return Fold(x, Max); }

// exp(x) for x <= 0, within a unit in the last place (1.2 where a core has no fused multiply-add);
// 0 below the smallest normal number, and NaN of NaN.
inline Floats Exp(Floats x) {
  // What is added to 1.5 * 2^23 is rounded; with the bias of the exponent it is a power's bits.
  const Floats shift = Fill(12582912.0f + 127.0f);
  const Floats shifted = x * 1.44269504f + shift;
  const Floats whole = shifted - shift;
  const Floats rest = x - whole * 0.693145752f - whole * 1.42860677e-6f;  // ln 2 in two parts
  Floats y = Fill(1.38144672e-3f);  // minimax on [-ln 2 / 2, ln 2 / 2]: 3.1e-9
  y = y * rest + 8.36878084e-3f;
  y = y * rest + 4.16683927e-2f;
  y = y * rest + 1.66665196e-1f;
  y = y * rest + 4.9999994e-1f;
  y = y * rest + 1.0f;
  y = y * rest + 1.0f;
  const Ints power = Load<Ints>(&shifted) << 23;
  return x < Fill(-87.33f) ? Floats{} : y * Load(&power);
}

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory for one head's work. It stays with the thread for the next head: taken anew each time, it
// would be paid for page by page.
class Scratch {
 public:
  // Returns room for `size` numbers on whole cache lines, not initialised, until the next Scratch
  // of this thread.
  template <typename Number = float>
  Number* Take(int64_t size) {
    return static_cast<Number*>(TakeBytes(RoundUp(size * sizeof(Number) + 1, 64)));
  }

 private:
  void* TakeBytes(int64_t size) {
    struct Room {
      std::unique_ptr<void, decltype(&std::free)> data{nullptr, &std::free};
      int64_t size = 0;
    };
    static thread_local std::vector<Room> rooms;
    if (next_ == rooms.size()) rooms.emplace_back();
    Room& room = rooms[next_++];
    if (room.size < size) {
      room = Room();
      room.data.reset(std::aligned_alloc(64, size));
      if (!room.data) throw std::bad_alloc();
      room.size = size;
    }
    return room.data.get();
  }

  size_t next_ = 0;
};

inline void Zero(float* x, int64_t size) { std::memset(x, 0, size * sizeof(float)); }

// One head of one row of an array [B, L, heads * width].
struct Head {
  float* data;
  int64_t stride;  // from token to token
  int64_t width;

  Head(const float* array, int64_t length, int64_t heads, int64_t width, int64_t row, int64_t head)
      : data(const_cast<float*>(array) + (row * length * heads + head) * width),
        stride(heads * width),
        width(width) {}
  float* operator[](int64_t token) const { return data + token * stride; }
};

// Which keys the tokens of a row see: those of their own number.
class Segments {
 public:
  Segments(const int32_t* segments, int64_t length, Scratch& scratch)
      : length_(length),
        filled_(RoundUp(length, kPanel)),
        numbers_(scratch.Take<int32_t>(filled_)) {
    std::copy(segments, segments + length, numbers_);
    // No token has the lowest number.
    std::fill(numbers_ + length, numbers_ + filled_, std::numeric_limits<int32_t>::min());
  }

  bool IsPadding(int64_t token) const { return numbers_[token] <= 0; }

  // Which of the keys key, key + 1, ... the token sees.
  Ints Seen(int64_t token, int64_t key) const {
    return Load<Ints>(numbers_ + key) == numbers_[token] - Ints{};
  }

  // The panels [begin, end) in which all keys are that the tokens first, first + 1, ... see. Of a
  // packed row that is little more than their own documents.
  std::pair<int64_t, int64_t> Panels(int64_t first, int64_t count) const {
    const auto [low, high] = std::minmax_element(numbers_ + first, numbers_ + first + count);
    const int32_t least = *low, most = *high;
    int64_t begin = 0, end = length_;
    while (numbers_[begin] < least || numbers_[begin] > most) ++begin;
    while (numbers_[end - 1] < least || numbers_[end - 1] > most) --end;
    return {begin / kPanel, RoundUp(end, kPanel) / kPanel};
  }

 private:
  int64_t length_, filled_;
  int32_t* numbers_;
};

// Copies tokens first, first + 1, ... of a head to [rows, features], scaled; the rest is zero, and
// so is padding where `valid` is given.
inline void PackRows(Head head, const Segments* valid, int64_t first, int64_t count, float scale,
                     int64_t rows, int64_t features, float* to) {
  Zero(to + count * features, (rows - count) * features);
  for (int64_t i = 0; i < count; ++i, to += features) {
    if (valid && valid->IsPadding(first + i)) {
      Zero(to, features);
      continue;
    }
    const float* from = head[first + i];
    int64_t d = 0;
    for (; d + kLanes <= head.width; d += kLanes) Store(to + d, Load(from + d) * scale);
    for (; d < head.width; ++d) to[d] = from[d] * scale;
    for (; d < features; ++d) to[d] = 0;
  }
}

// The first or the second half of two vectors, element by element in turn.
template <int32_t first, size_t... i>
inline Floats Interleave(Floats x, Floats y, std::index_sequence<i...>) {
  return Pick<static_cast<int32_t>(first + i / 2 + i % 2 * kLanes)...>(x, y);
}

// Transposes a square of kLanes vectors: each round puts a bit of the row into the column.
inline void Transpose(Floats (&square)[kLanes]) {
  for (int64_t round = 1; round < kLanes; round *= 2) {
    Floats mixed[kLanes];
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = Interleave<0>(square[i], square[i + kLanes / 2], kLane);
      mixed[2 * i + 1] = Interleave<kLanes / 2>(square[i], square[i + kLanes / 2], kLane);
    }
    std::copy(mixed, mixed + kLanes, square);
  }
}

// The first numbers of a vector, as many as there are.
inline Floats LoadSome(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  Floats x{};
  for (int64_t i = 0; i < count; ++i) x[i] = from[i];
  return x;
}

inline void StoreSome(float* to, Floats x, int64_t count) {
  if (count >= kLanes) return Store(to, x);
  for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}

// Transposes a head to panels [panels, features, kPanel]; the rest is zero, and so is padding where
// `valid` is given.
inline void PackPanels(Head head, const Segments* valid, int64_t length, int64_t features,
                       float* to) {
  for (int64_t token = 0; token < RoundUp(length, kPanel); token += kLanes) {
    float* columns = to + token / kPanel * features * kPanel + token % kPanel;
    for (int64_t d = 0; d < features; d += kLanes) {
      Floats square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const bool filled = token + i < length && !(valid && valid->IsPadding(token + i));
        square[i] = filled ? LoadSome(head[token + i] + d, head.width - d) : Floats{};
      }
      Transpose(square);
      for (int64_t i = 0; i < std::min(kLanes, features - d); ++i)
        Store(columns + (d + i) * kPanel, square[i]);
    }
  }
}

// Transposes panels [panels, features, kPanel] to a head.
inline void UnpackPanels(const float* panels, int64_t length, int64_t features, Head to) {
  for (int64_t token = 0; token < length; token += kLanes) {
    const float* columns = panels + token / kPanel * features * kPanel + token % kPanel;
    for (int64_t d = 0; d < to.width; d += kLanes) {
      Floats square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        square[i] = d + i < to.width ? Load(columns + (d + i) * kPanel) : Floats{};
      Transpose(square);
      for (int64_t i = 0; i < std::min(kLanes, length - token); ++i)
        StoreSome(to[token + i] + d, square[i], to.width - d);
    }
  }
}

// Rows met at a time, so that `arrays` of their logits are 256 KiB or less; 16 at least, because
// each block reads all keys and adds to all their gradients.
inline int64_t BlockOfRows(int64_t length, int64_t arrays) {
  const int64_t rows = 65536 / (RoundUp(length, kPanel) * arrays);
  return std::clamp<int64_t>(rows / kRows * kRows, 16, 64);
}

// to[i, :] (+)= sum over n < count of a[i * a_row + n * a_next] * b[n * b_next, :]: R rows of V
// vectors, `to` with `to_row` from row to row.
template <int64_t R, int64_t V, typename Vector = Floats>
inline void Tile(const float* a, int64_t a_row, int64_t a_next, const float* b, int64_t b_next,
                 int64_t count, bool add, float* to, int64_t to_row) {
  constexpr int64_t lanes = sizeof(Vector) / sizeof(float);
  Vector sums[R][V];
  for (int64_t i = 0; i < R; ++i)
    for (int64_t v = 0; v < V; ++v)
      sums[i][v] = add ? Load<Vector>(to + i * to_row + v * lanes) : Vector{};
  for (int64_t n = 0; n < count; ++n) {
    Vector row[V];
    for (int64_t v = 0; v < V; ++v) row[v] = Load<Vector>(b + n * b_next + v * lanes);
    for (int64_t i = 0; i < R; ++i) {
      const float x = a[i * a_row + n * a_next];
      for (int64_t v = 0; v < V; ++v) sums[i][v] += x * row[v];
    }
  }
  for (int64_t i = 0; i < R; ++i)
    for (int64_t v = 0; v < V; ++v) Store(to + i * to_row + v * lanes, sums[i][v]);
}

// logits [rows, kPanel] of one panel = a [rows, features] . panel [features, kPanel].
inline void Logits(const float* a, const float* panel, int64_t rows, int64_t features,
                   float* logits) {
  for (int64_t i = 0; i < rows; i += kRows)
    Tile<kRows, kVectors>(a + i * features, features, 1, panel, kPanel, features, false,
                          logits + i * kPanel, kPanel);
}

// of_panel [features, kPanel] += a [rows, features]^T . slopes [rows, kPanel].
inline void AddToPanel(const float* a, const float* slopes, int64_t rows, int64_t features,
                       float* of_panel) {
  for (int64_t d = 0; d < features; d += kRows)
    Tile<kRows, kVectors>(a + d, 1, features, slopes, kPanel, rows, true, of_panel + d * kPanel,
                          kPanel);
}

// to [rows, columns] += weights [rows, kPanel] . b [kPanel, columns], of one panel; columns
// are a multiple of half a vector.
inline void AddToRows(const float* weights, const float* b, int64_t rows, int64_t columns,
                      float* to) {
  int64_t d = 0;
  const auto tile = [&](auto rows, auto vectors, auto vector, int64_t i) {
    Tile<rows, vectors, decltype(vector)>(weights + i * kPanel, kPanel, 1, b + d, columns, kPanel,
                                          true, to + i * columns + d, columns);
  };
  // Eight sums at least, or a core waits for each.
  const auto tiles = [&](auto vectors, auto vector) {
    constexpr int64_t few = vectors == 1 ? 2 * kRows : kRows;
    int64_t i = 0;
    for (; i + few <= rows; i += few)
      tile(std::integral_constant<int64_t, few>(), vectors, vector, i);
    for (; i < rows; i += kRows) tile(std::integral_constant<int64_t, kRows>(), vectors, vector, i);
    d += vectors * sizeof vector / sizeof(float);
  };
  while (d + 4 * kLanes <= columns) tiles(std::integral_constant<int64_t, 4>(), Floats());
  if (d + 2 * kLanes <= columns) tiles(std::integral_constant<int64_t, 2>(), Floats());
  if (d + kLanes <= columns) tiles(std::integral_constant<int64_t, 1>(), Floats());
  if (d < columns) tiles(std::integral_constant<int64_t, 1>(), HalfFloats());
}

// Runs work(0) ... work(count - 1) on the threads of the pool; returns when all is done.
//
// The caller takes part, and waits for nothing that was not begun: the pool's threads may all be
// busy, with callers of this function too.
inline xla::ffi::Error ForEach(xla::ffi::ThreadPool& pool, int64_t count,
                               std::function<void(int64_t)> work) {
  struct Shared {
    std::function<void(int64_t)> work;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> no_memory{false};
    std::mutex mutex;
    std::condition_variable all_done;

    void Run() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        try {
          work(i);
        } catch (const std::bad_alloc&) {
          no_memory = true;
        }
        if (done.fetch_add(1) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all_done.notify_all();
        }
      }
    }
  };
  // Shared with helpers that come when all is done, after the caller has returned.
  auto shared = std::make_shared<Shared>();
  shared->work = std::move(work);
  shared->count = count;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Run(); });
  shared->Run();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done.load() == count; });
  if (shared->no_memory)
    return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, "A kernel is out of memory.");
  return xla::ffi::Error::Success();
}

}  // namespace minilm_jax

#endif  // MINILM_JAX_NATIVE_TILES_H_
