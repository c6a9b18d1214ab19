// Dot-product attention and its gradients; the logits of a block of rows never leave the caches.
//
// What is computed is what encoder/dot_product.py computes: a forward pass that keeps the logarithm
// of each row's total, and a gradient that computes the probabilities again from it. Segments mask,
// and dropout draws the masks of encoder/dropout.py where they are used.

#include <cmath>

#include "tiles.h"

namespace minilm_jax {
namespace {

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32, 3>;
using Numbers = ffi::Buffer<ffi::S32, 2>;
using RandomWords = ffi::Buffer<ffi::U32, 2>;
using Result = ffi::ResultBuffer<ffi::F32, 3>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Problem {
  int64_t batch, length, heads, width;  // of one head
  float rate;                           // share of the probabilities that is dropped
  uint32_t dropped_below;               // the same, of 32 random bits
  float scale;

  Problem(const Array& query, int64_t heads, double rate)
      : batch(query.dimensions()[0]),
        length(query.dimensions()[1]),
        heads(heads),
        width(query.dimensions()[2] / heads),
        rate(static_cast<float>(rate)),
        dropped_below(static_cast<uint32_t>(std::nearbyint(rate * 4294967296.0))),
        scale(1 / std::sqrt(static_cast<float>(width))) {}

  int64_t panels() const { return RoundUp(length, kPanel) / kPanel; }
  int64_t features() const { return RoundUp(width, kRows); }
  int64_t columns() const { return RoundUp(width, kLanes / 2); }
};

// One head of one row of the batch.
struct Place {
  const Problem& problem;
  int64_t row, head;

  Head Of(const Array& array) const { return Of(array.typed_data()); }
  Head Of(Result& array) const { return Of(array->typed_data()); }
  Head Of(const float* array) const {
    return Head(array, problem.length, problem.heads, problem.width, row, head);
  }
  int64_t line(int64_t token) const {
    return (row * problem.heads + head) * problem.length + token;
  }
};

// The elements of the head's probabilities that dropout keeps: `dropout.kept`.
class Kept {
 public:
  Kept(const Place& place, const RandomWords& words) : problem_(place.problem) {
    const uint32_t* own = words.typed_data() + 2 * place.row;
    step_ = own[1] | 1;
    const int64_t first = place.head * problem_.length * problem_.length;
    start_ = own[0] + static_cast<uint32_t>(first) * step_;
    for (int64_t i = 0; i < kLanes; ++i) lanes_[i] = static_cast<uint32_t>(i) * step_;
  }

  // Of the elements (token, key), (token, key + 1), ...
  Ints operator()(int64_t token, int64_t key) const {
    Words bits = lanes_ + (start_ + static_cast<uint32_t>(token * problem_.length + key) * step_);
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6Bu;
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35u;
    bits = bits ^ (bits >> 16);
    return bits >= problem_.dropped_below - Words{};
  }

 private:
  const Problem& problem_;
  uint32_t start_, step_;
  Words lanes_;
};

void ForwardHead(const Place& place, const Array& query, const Array& key, const Array& value,
                 const Numbers& numbers, const RandomWords& words, Result& mixed,
                 Result& logsumexp) {
  const Problem& problem = place.problem;
  const int64_t length = problem.length, filled = problem.panels() * kPanel;
  const int64_t features = problem.features(), columns = problem.columns();
  const int64_t block = BlockOfRows(length, 1);
  Scratch scratch;
  float* const keys = scratch.Take(filled * features);
  float* const values = scratch.Take(filled * columns);
  float* const queries = scratch.Take(block * features);
  float* const sums = scratch.Take(block * columns);
  float* const logits = scratch.Take(block * filled);
  float* const factors = scratch.Take(block);
  const Segments segments(numbers.typed_data() + place.row * length, length, scratch);
  const Kept kept(place, words);
  const Head out = place.Of(mixed);
  PackPanels(place.Of(key), nullptr, length, features, keys);
  PackRows(place.Of(value), nullptr, 0, length, 1, filled, columns, values);

  for (int64_t first = 0; first < length; first += block) {
    const int64_t count = std::min(block, length - first), rows = RoundUp(count, kRows);
    const auto [begin, end] = segments.Panels(first, count);
    PackRows(place.Of(query), nullptr, first, count, problem.scale, rows, features, queries);
    for (int64_t p = begin; p < end; ++p)
      Logits(queries, keys + p * features * kPanel, rows, features, logits + p * rows * kPanel);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + i;
      const auto each = [&, begin = begin, end = end](auto&& function) {
        for (int64_t p = begin; p < end; ++p)
          for (int64_t v = 0; v < kPanel; v += kLanes)
            function(logits + (p * rows + i) * kPanel + v, p * kPanel + v);
      };
      const auto seen = [&](const float* x, int64_t at) {
        return segments.Seen(token, at) ? Load(x) : Fill(-kInfinity);
      };
      Floats peaks = Fill(-kInfinity);
      each([&](float* x, int64_t at) { peaks = Max(peaks, seen(x, at)); });
      const float peak = Peak(peaks);
      Floats totals{};
      each([&](float* x, int64_t at) {
        Floats weight = Exp(seen(x, at) - peak);
        totals += weight;
        if (problem.dropped_below) weight = kept(token, at) ? weight : Floats{};
        Store(x, weight);
      });
      // Normalising after the product divides `width` numbers instead of `length`.
      const float total = Sum(totals);
      logsumexp->typed_data()[place.line(token)] = peak + std::log(total);
      factors[i] = 1 / (total * (1 - problem.rate));
    }
    Zero(sums, rows * columns);
    for (int64_t p = begin; p < end; ++p)
      AddToRows(logits + p * rows * kPanel, values + p * kPanel * columns, rows, columns, sums);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < problem.width; ++d)
        out[first + i][d] = sums[i * columns + d] * factors[i];
  }
}

void BackwardHead(const Place& place, const Array& cotangent, const Array& query, const Array& key,
                  const Array& value, const Array& mixed, const Array& logsumexp,
                  const Numbers& numbers, const RandomWords& words, Result& of_query,
                  Result& of_key, Result& of_value) {
  const Problem& problem = place.problem;
  const int64_t length = problem.length, filled = problem.panels() * kPanel;
  const int64_t features = problem.features(), columns = problem.columns();
  const int64_t block = BlockOfRows(length, 2);
  Scratch scratch;
  float* const keys = scratch.Take(filled * features);
  float* const values = scratch.Take(filled * features);
  float* const of_keys = scratch.Take(filled * features);
  float* const of_values = scratch.Take(filled * features);
  float* const by_key = scratch.Take(filled * columns);
  float* const queries = scratch.Take(block * features);
  float* const cotangents = scratch.Take(block * features);
  float* const sums = scratch.Take(block * columns);
  float* const weights = scratch.Take(block * filled);  // logits, then probabilities kept
  float* const slopes = scratch.Take(block * filled);   // of the weights, then of the logits
  const Segments segments(numbers.typed_data() + place.row * length, length, scratch);
  const Kept kept(place, words);
  const Head out = place.Of(of_query), mixed_head = place.Of(mixed);
  PackPanels(place.Of(key), nullptr, length, features, keys);
  PackPanels(place.Of(value), nullptr, length, features, values);
  PackRows(place.Of(key), nullptr, 0, length, problem.scale, filled, columns, by_key);
  Zero(of_keys, filled * features);
  Zero(of_values, filled * features);

  for (int64_t first = 0; first < length; first += block) {
    const int64_t count = std::min(block, length - first), rows = RoundUp(count, kRows);
    const auto [begin, end] = segments.Panels(first, count);
    PackRows(place.Of(query), nullptr, first, count, problem.scale, rows, features, queries);
    PackRows(place.Of(cotangent), nullptr, first, count, 1, rows, features, cotangents);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t panel = p * features * kPanel, at = p * rows * kPanel;
      Logits(queries, keys + panel, rows, features, weights + at);
      Logits(cotangents, values + panel, rows, features, slopes + at);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const auto each = [&, begin = begin, end = end](auto&& function) {
        for (int64_t p = begin; p < end; ++p)
          for (int64_t v = 0; v < kPanel; v += kLanes) {
            const int64_t at = (p * rows + i) * kPanel + v;
            function(weights + at, slopes + at, p * kPanel + v);
          }
      };
      if (i >= count) {
        each([](float* weight, float* slope, int64_t) {
          Store(weight, Floats{}), Store(slope, Floats{});
        });
        continue;
      }
      const int64_t token = first + i;
      const float own_logsumexp = logsumexp.typed_data()[place.line(token)];
      // The sum of p_l * slope_l over keys, of the softmax's gradient, from what is at hand.
      Floats products{};
      for (int64_t d = 0; d < problem.width; d += kLanes)
        products += LoadSome(cotangents + i * features + d, problem.width - d) *
                    LoadSome(mixed_head[token] + d, problem.width - d);
      const float delta = Sum(products);
      each([&](float* weight, float* slope, int64_t at) {
        const Floats zero{};
        const Floats p = segments.Seen(token, at) ? Exp(Load(weight) - own_logsumexp) : zero;
        const Floats raised = Fill(1 / (1 - problem.rate));
        const Floats factor = problem.dropped_below ? (kept(token, at) ? raised : zero) : Fill(1);
        Store(weight, p * factor);
        Store(slope, p * (Load(slope) * factor - delta));
      });
    }
    Zero(sums, rows * columns);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t panel = p * features * kPanel, at = p * rows * kPanel;
      AddToRows(slopes + at, by_key + p * kPanel * columns, rows, columns, sums);
      AddToPanel(queries, slopes + at, rows, features, of_keys + panel);
      AddToPanel(cotangents, weights + at, rows, features, of_values + panel);
    }
    for (int64_t i = 0; i < count; ++i)
      std::copy(sums + i * columns, sums + i * columns + problem.width, out[first + i]);
  }
  UnpackPanels(of_keys, length, features, place.Of(of_key));
  UnpackPanels(of_values, length, features, place.Of(of_value));
}

ffi::Error Forward(ffi::ThreadPool pool, Array query, Array key, Array value, Numbers segments,
                   RandomWords words, Result mixed, Result logsumexp, int64_t heads, double rate) {
  const Problem problem(query, heads, rate);
  return ForEach(pool, problem.batch * heads, [&](int64_t i) {
    const Place place{problem, i / heads, i % heads};
    ForwardHead(place, query, key, value, segments, words, mixed, logsumexp);
  });
}

ffi::Error Backward(ffi::ThreadPool pool, Array cotangent, Array query, Array key, Array value,
                    Array mixed, Array logsumexp, Numbers segments, RandomWords words,
                    Result of_query, Result of_key, Result of_value, int64_t heads, double rate) {
  const Problem problem(query, heads, rate);
  return ForEach(pool, problem.batch * heads, [&](int64_t i) {
    const Place place{problem, i / heads, i % heads};
    BackwardHead(place, cotangent, query, key, value, mixed, logsumexp, segments, words, of_query,
                 of_key, of_value);
  });
}

}  // namespace

// query, key, value [B, L, H * K], segments [B, L], words [B, 2]
//   -> mixed [B, L, H * K], logsumexp [B, H, L]
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttentionForward, Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Numbers>()
                                  .Arg<RandomWords>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("heads")
                                  .Attr<double>("rate"));

// cotangent, query, key, value, mixed [B, L, H * K], logsumexp [B, H, L], segments [B, L],
// words [B, 2] -> gradients of query, key and value
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttentionBackward, Backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Numbers>()
                                  .Arg<RandomWords>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<int64_t>("heads")
                                  .Attr<double>("rate"));

}  // namespace minilm_jax
