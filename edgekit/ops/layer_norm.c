/* EdgekitLayerNorm: (x, gamma, beta) -> (x - mean) / sqrt(variance + epsilon) * gamma + beta over the last axis.
 *
 * x: float32 or int8, (..., channels); the result is of the same shape and type, int8 with its own scale and zero point.
 * gamma, beta: float32 (channels,). Option: epsilon.
 *
 * In int8 this is many small operators in TFLite, most of which nobody hastens, and each rounds to 8 bits again.
 */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "describe.h"
#include "edgekit_op.h"

/* Sums that go on side by side: without leave to reorder additions a compiler has one to wait for. */
#define SUMS 16
/* int8 of a row whose sums of squares are below 2^31 whatever they are. */
#define PIECE 65536

typedef struct LayerNorm {
  float epsilon;
  size_t channels;
  float *gamma, *beta, *row; /* in steps of the output; a row that is not aligned */
} LayerNorm;

static void free_node(EdgekitNode *node) {
  LayerNorm *op = node->state;
  if (op) free(op->gamma);
  free(op);
  node->state = NULL;
}

static int init(EdgekitNode *node) {
  LayerNorm *op = node->state = calloc(1, sizeof *op);
  if (!op) return node->fail(node, "out of memory");
  const EdgekitOption *option = edgekit_option(node, "epsilon");
  double epsilon = edgekit_real(node, "epsilon", NAN);
  op->epsilon = epsilon >= FLT_MIN && epsilon <= FLT_MAX ? (float)epsilon : 0;
  if (op->epsilon > 0) return EDGEKIT_OK;
  if (!option || option->kind == EDGEKIT_TEXT)
    return node->fail(node, "epsilon: expected a number above 0, got %s; convert the model again", option ? "text" : "none");
  return node->fail(node, "epsilon: expected a number above 0, got %g; convert the model again", epsilon);
}

/* Whether an int8 tensor can be told in real numbers. */
static bool is_scaled(const EdgekitTensor *tensor) {
  return tensor->type != EDGEKIT_INT8 || (tensor->scale >= FLT_MIN && tensor->scale <= FLT_MAX);
}

static int prepare(EdgekitNode *node) {
  LayerNorm *op = node->state;
  char got[EDGEKIT_DESCRIPTION];
  if (node->input_count != 3 || node->output_count != 1)
    return node->fail(node, "expected 3 inputs and 1 output, got %d and %d", (int)node->input_count, (int)node->output_count);
  const EdgekitTensor *x = &node->inputs[0], *y = &node->outputs[0];
  if ((x->type != EDGEKIT_FLOAT32 && x->type != EDGEKIT_INT8) || x->rank < 1 || x->dims[x->rank - 1] < 1 || !is_scaled(x))
    return node->fail(node, "input 0: expected float32, or int8 with a scale, of shape (..., channels), got %s%s",
                      edgekit_describe(x, got), is_scaled(x) ? "" : ", no scale");
  if (y->type != x->type || !is_scaled(y))
    return node->fail(node, "output 0: expected the type of input 0, %s with a scale, got %s%s",
                      x->type == EDGEKIT_INT8 ? "int8" : "float32, or int8", edgekit_describe(y, got), is_scaled(y) ? "" : ", no scale");
  for (int i = 1; i < 3; i++) {
    const EdgekitTensor *given = &node->inputs[i];
    if (given->type != EDGEKIT_FLOAT32 || given->rank != 1 || given->dims[0] != x->dims[x->rank - 1])
      return node->fail(node, "input %d, %s: expected float32 of shape (%d,), got %s", i, i == 1 ? "gamma" : "beta",
                        (int)x->dims[x->rank - 1], edgekit_describe(given, got));
  }
  op->channels = (size_t)x->dims[x->rank - 1];
  free(op->gamma);
  op->gamma = op->channels <= SIZE_MAX / 3 / sizeof(float) ? malloc(3 * op->channels * sizeof(float)) : NULL;
  if (!op->gamma) return node->fail(node, "out of memory");
  op->beta = op->gamma + op->channels;
  op->row = op->beta + op->channels;
  return node->resize(node, 0, x->rank, x->dims);
}

/* ---- the work, compiled for several processors ---- */

typedef struct Rows {
  const char *x;
  void *y;
  size_t count, channels;
  const float *gamma, *beta;
  float *row, epsilon, scale;
} Rows;

#define INLINE static inline __attribute__((always_inline))

/* Of x, or of its squared distance from `mean`. */
INLINE float mean_of(const float *x, size_t count, float mean, bool squared) {
  float sums[SUMS] = {0};
  size_t i = 0;
  for (; i + SUMS <= count; i += SUMS)
    for (int k = 0; k < SUMS; k++) sums[k] += squared ? (x[i + (size_t)k] - mean) * (x[i + (size_t)k] - mean) : x[i + (size_t)k];
  double sum = 0;
  for (; i < count; i++) sum += squared ? (x[i] - mean) * (x[i] - mean) : x[i];
  for (int k = 0; k < SUMS; k++) sum += sums[k];
  return (float)(sum / (double)count);
}

INLINE void float_rows(const Rows *rows) {
  size_t n = rows->channels;
  const float *gamma = rows->gamma, *beta = rows->beta;
  float *restrict y = rows->y;
  bool aligned = (uintptr_t)rows->x % sizeof(float) == 0; /* a constant need not be */
  for (size_t r = 0; r < rows->count; r++, y += n) {
    const float *x = (const float *)(const void *)rows->x + (aligned ? r * n : 0);
    if (!aligned) x = memcpy(rows->row, rows->x + r * n * sizeof *x, n * sizeof *x);
    float mean = mean_of(x, n, 0, false), by = 1 / sqrtf(mean_of(x, n, mean, true) + rows->epsilon);
    for (size_t i = 0; i < n; i++) y[i] = (x[i] - mean) * by * gamma[i] + beta[i];
  }
}

INLINE void int8_rows(const Rows *rows) {
  size_t n = rows->channels;
  const int8_t *x = (const int8_t *)rows->x;
  const float *gamma = rows->gamma, *beta = rows->beta;
  float *restrict row = rows->row;
  int8_t *restrict y = rows->y;
  for (size_t r = 0; r < rows->count; r++, x += n, y += n) {
    double sum = 0, squares = 0;
    for (size_t start = 0; start < n; start += PIECE) {
      int32_t part = 0, part_squares = 0, count = n - start < PIECE ? (int32_t)(n - start) : PIECE;
      for (int32_t i = 0; i < count; i++) {
        part += x[start + (size_t)i];
        part_squares += x[start + (size_t)i] * x[start + (size_t)i];
      }
      sum += part;
      squares += part_squares;
    }
    double mean = sum / (double)n, variance = squares / (double)n - mean * mean;
    float less = (float)mean, by = rows->scale / sqrtf(rows->scale * rows->scale * (float)fmax(variance, 0) + rows->epsilon);
    for (size_t i = 0; i < n; i++) row[i] = ((float)x[i] - less) * by * gamma[i] + beta[i];
    /* One limit at a time: gcc makes vectors of a loop with one comparison. NaN becomes -128. */
    for (size_t i = 0; i < n; i++) row[i] = row[i] > -128 ? row[i] : -128;
    for (size_t i = 0; i < n; i++) row[i] = row[i] < 127 ? row[i] : 127;
    for (size_t i = 0; i < n; i++) y[i] = (int8_t)((int32_t)(row[i] + 128.5f) - 128); /* rounded */
  }
}

static void float_plain(const Rows *rows) { float_rows(rows); }
static void int8_plain(const Rows *rows) { int8_rows(rows); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void float_avx2(const Rows *rows) { float_rows(rows); }
__attribute__((target("avx2,fma"))) static void int8_avx2(const Rows *rows) { int8_rows(rows); }
static bool has_avx2(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
#define float_avx2 float_plain
#define int8_avx2 int8_plain
static bool has_avx2(void) { return false; }
#endif

static int invoke(EdgekitNode *node) {
  LayerNorm *op = node->state;
  const EdgekitTensor *x = &node->inputs[0], *y = &node->outputs[0];
  bool is_int8 = x->type == EDGEKIT_INT8, avx2 = has_avx2();
  memcpy(op->gamma, node->inputs[1].data, op->channels * sizeof *op->gamma);
  memcpy(op->beta, node->inputs[2].data, op->channels * sizeof *op->beta);
  for (size_t i = 0; is_int8 && i < op->channels; i++) {
    op->gamma[i] /= y->scale;
    op->beta[i] = op->beta[i] / y->scale + (float)y->zero_point;
  }
  Rows rows = {x->data, y->data, edgekit_size(x) / op->channels, op->channels, op->gamma, op->beta, op->row, op->epsilon, x->scale};
  if (is_int8) (avx2 ? int8_avx2 : int8_plain)(&rows);
  else (avx2 ? float_avx2 : float_plain)(&rows);
  return EDGEKIT_OK;
}

const EdgekitOp edgekit_layer_norm = {
    .name = "EdgekitLayerNorm", .version = 1, .init = init, .prepare = prepare, .invoke = invoke, .free = free_node};
