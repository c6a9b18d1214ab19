// The relation loss and its gradients; the logits of a block of rows never leave the caches.
//
// What is computed is what distill/relations_blocked.py computes: both models' logits and
// softmaxes, the divergence, and p_S - p_T times either side for the gradients.

#include <cmath>

#include "tiles.h"

namespace minilm_jax {
namespace {

namespace ffi = xla::ffi;
using Array = ffi::Buffer<ffi::F32, 3>;
using Numbers = ffi::Buffer<ffi::S32, 2>;
using Lines = ffi::Buffer<ffi::F32, 2>;

constexpr float kMasked = -1e30f;  // finite: 0 * (-inf - (-inf)) is not a number

struct Side {
  const float *a, *b;
};

struct Arrays {
  Side teacher, student;
  const int32_t* segments;
  const float* weights;
  float* per_head;     // [B, R]
  float *of_a, *of_b;  // [B, L, Ds], or null where no gradients are wanted
};

struct Problem {
  int64_t batch, length, heads;
  int64_t teacher_width, student_width;  // of one head
};

void OneHead(const Problem& problem, const Arrays& arrays, int64_t row, int64_t head) {
  const int64_t length = problem.length;
  const auto of = [&](const float* array, int64_t width) {
    return Head(array, length, problem.heads, width, row, head);
  };
  const auto of_teacher = [&](const float* array) { return of(array, problem.teacher_width); };
  const auto of_student = [&](const float* array) { return of(array, problem.student_width); };
  const bool gradients = arrays.of_a != nullptr;
  const float* weights = arrays.weights + row * length;
  const int64_t teacher_features = RoundUp(problem.teacher_width, kRows);
  const int64_t features = RoundUp(problem.student_width, kRows);
  const int64_t columns = RoundUp(problem.student_width, kLanes / 2);
  const float teacher_scale = 1 / std::sqrt(static_cast<float>(problem.teacher_width));
  const float scale = 1 / std::sqrt(static_cast<float>(problem.student_width));
  const int64_t filled = RoundUp(length, kPanel);
  const int64_t block = BlockOfRows(length, 2);

  Scratch scratch;
  float* const teacher_keys = scratch.Take(filled * teacher_features);
  float* const keys = scratch.Take(filled * features);
  float* const of_keys = scratch.Take(filled * features);
  float* const by_key = scratch.Take(filled * columns);
  float* const teacher_rows = scratch.Take(block * teacher_features);
  float* const student_rows = scratch.Take(block * features);
  float* const of_rows = scratch.Take(block * columns);
  float* const teacher_logits = scratch.Take(block * filled);
  float* const logits = scratch.Take(block * filled);  // then their slopes
  const Segments segments(arrays.segments + row * length, length, scratch);
  // What stands in the padding, a NaN too, must reach neither loss nor gradient.
  PackPanels(of_teacher(arrays.teacher.b), &segments, length, teacher_features, teacher_keys);
  PackPanels(of_student(arrays.student.b), &segments, length, features, keys);
  if (gradients) {
    PackRows(of_student(arrays.student.b), &segments, 0, length, scale, filled, columns, by_key);
    Zero(of_keys, filled * features);
  }

  double loss = 0;
  for (int64_t first = 0; first < length; first += block) {
    const int64_t count = std::min(block, length - first), rows = RoundUp(count, kRows);
    const auto [begin, end] = segments.Panels(first, count);
    PackRows(of_teacher(arrays.teacher.a), &segments, first, count, teacher_scale, rows,
             teacher_features, teacher_rows);
    PackRows(of_student(arrays.student.a), &segments, first, count, scale, rows, features,
             student_rows);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t at = p * rows * kPanel;
      Logits(teacher_rows, teacher_keys + p * teacher_features * kPanel, rows, teacher_features,
             teacher_logits + at);
      Logits(student_rows, keys + p * features * kPanel, rows, features, logits + at);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t token = first + i;
      const auto each = [&, begin = begin, end = end](auto&& function) {
        for (int64_t p = begin; p < end; ++p)
          for (int64_t v = 0; v < kPanel; v += kLanes) {
            const int64_t at = (p * rows + i) * kPanel + v;
            function(teacher_logits + at, logits + at, p * kPanel + v);
          }
      };
      if (i >= count || segments.IsPadding(token)) {
        each([](float*, float* y, int64_t) { Store(y, Floats{}); });
        continue;
      }
      const auto seen = [&](const float* logits, int64_t at) {
        return segments.Seen(token, at) ? Load(logits) : Fill(kMasked);
      };
      Floats teacher_peaks = Fill(kMasked), peaks = Fill(kMasked);
      each([&](float* x, float* y, int64_t at) {
        teacher_peaks = Max(teacher_peaks, seen(x, at)), peaks = Max(peaks, seen(y, at));
      });
      const float teacher_peak = Peak(teacher_peaks), peak = Peak(peaks);
      Floats teacher_sums{}, sums{}, crosses{};
      each([&](float* x, float* y, int64_t at) {
        const Floats teacher = seen(x, at) - teacher_peak, student = seen(y, at) - peak;
        const Floats teacher_exp = Exp(teacher), student_exp = Exp(student);
        teacher_sums += teacher_exp, sums += student_exp;
        crosses += teacher_exp * (teacher - student);
        Store(x, teacher_exp), Store(y, student_exp);
      });
      // The sum of p_T (log p_T - log p_S), its logarithms of the sums taken out.
      const float teacher_sum = Sum(teacher_sums), sum = Sum(sums);
      loss += weights[token] * (Sum(crosses) / teacher_sum - std::log(teacher_sum) + std::log(sum));
      const float of_teacher_exp = weights[token] / teacher_sum, of_exp = weights[token] / sum;
      each([&](float* x, float* y, int64_t) {
        Store(y, Load(y) * of_exp - Load(x) * of_teacher_exp);
      });
    }
    if (!gradients) continue;
    Zero(of_rows, rows * columns);
    for (int64_t p = begin; p < end; ++p) {
      const float* slopes = logits + p * rows * kPanel;
      AddToRows(slopes, by_key + p * kPanel * columns, rows, columns, of_rows);
      AddToPanel(student_rows, slopes, rows, features, of_keys + p * features * kPanel);
    }
    for (int64_t i = 0; i < count; ++i)
      std::copy(of_rows + i * columns, of_rows + i * columns + problem.student_width,
                of_student(arrays.of_a)[first + i]);
  }
  arrays.per_head[row * problem.heads + head] = static_cast<float>(loss);
  if (gradients) UnpackPanels(of_keys, length, features, of_student(arrays.of_b));
}

ffi::Error Run(ffi::ThreadPool& pool, const Array& teacher_a, const Array& teacher_b,
               const Array& student_a, const Array& student_b, const Numbers& segments,
               const Lines& weights, Lines& per_head, float* of_a, float* of_b) {
  const auto shape = segments.dimensions();
  const int64_t heads = per_head.dimensions()[1];
  const Problem problem{shape[0], shape[1], heads, teacher_a.dimensions()[2] / heads,
                        student_a.dimensions()[2] / heads};
  const Arrays arrays{{teacher_a.typed_data(), teacher_b.typed_data()},
                      {student_a.typed_data(), student_b.typed_data()},
                      segments.typed_data(),
                      weights.typed_data(),
                      per_head.typed_data(),
                      of_a,
                      of_b};
  return ForEach(pool, problem.batch * heads,
                 [&](int64_t i) { OneHead(problem, arrays, i / heads, i % heads); });
}

ffi::Error Loss(ffi::ThreadPool pool, Array teacher_a, Array teacher_b, Array student_a,
                Array student_b, Numbers segments, Lines weights, ffi::Result<Lines> per_head) {
  return Run(pool, teacher_a, teacher_b, student_a, student_b, segments, weights, *per_head,
             nullptr, nullptr);
}

ffi::Error LossAndGradients(ffi::ThreadPool pool, Array teacher_a, Array teacher_b, Array student_a,
                            Array student_b, Numbers segments, Lines weights,
                            ffi::Result<Lines> per_head, ffi::Result<Array> of_a,
                            ffi::Result<Array> of_b) {
  return Run(pool, teacher_a, teacher_b, student_a, student_b, segments, weights, *per_head,
             of_a->typed_data(), of_b->typed_data());
}

}  // namespace

// teacher a, b [B, L, Dt], student a, b [B, L, Ds], segments, weights [B, L] -> loss [B, R]
XLA_FFI_DEFINE_HANDLER_SYMBOL(RelationLoss, Loss,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Numbers>()
                                  .Arg<Lines>()
                                  .Ret<Lines>());

// The same -> loss [B, R] and the gradients of each head's own loss for the student's a and b
XLA_FFI_DEFINE_HANDLER_SYMBOL(RelationLossAndGradients, LossAndGradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Numbers>()
                                  .Arg<Lines>()
                                  .Ret<Lines>()
                                  .Ret<Array>()
                                  .Ret<Array>());

}  // namespace minilm_jax
