/* EdgekitLogMel: sound -> log-mel levels in dB, what LogMelFrontEnd of edgekit/audio.py computes, to 1e-3 dB.
 *
 *   (sound) -> (levels): all frames of a stretch of sound, which is mirrored at its ends
 *   (sound, state) -> (levels, state): the frames of the next samples of a stream; a state of zeros begins one
 *
 * sound: float32 in -1..1, or int16 of which 32768 is 1, or as its scale says; (n,) or (1, n).
 * levels: float32 (1, num_mel_bins, frames, 1). state: float32 (1, 1 + fft_samples / 2): 1, and the last samples.
 * Options: sample_rate_hz, fft_samples, frame_hop_samples, num_mel_bins, low_hz, high_hz; power, floor, range_db,
 * mel_scale and mel_norm where they are not those of edgekit.manifest.LogMel.
 */
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "describe.h"
#include "edgekit_op.h"
#include "fourier.h"

#define MEND "; convert the model again"

/* Frames that are worked out together, at most; fewer where compiled so, to try what a smaller processor does. */
#ifndef EDGEKIT_LOG_MEL_LANES
#define EDGEKIT_LOG_MEL_LANES 16
#endif
typedef struct Filter {
  int32_t first, count; /* of the bins in it */
} Filter;

typedef struct LogMel LogMel;
struct LogMel {
  int rate_hz, fft, hop, mels;
  double low_hz, high_hz;
  bool slaney_scale, slaney_norm, limited;
  float floor, scale, range_db; /* the floor before it is taken to the power; dB of a factor of 2 */
  float *window;
  Fourier fourier; /* of half as many complex numbers where fft is even */
  float *split;
  Filter *filters;
  float *weights;
  int lanes;
  bool (*levels)(const LogMel *op, const float *const *frames, int count, float *levels, size_t row, float *highest);
  void (*from_int16)(const char *from, int count, float scale, float *to);
  void (*raise)(float *levels, size_t count, float to);
  /* What they work in: the stretch of sound of some frames, where it is not as the tensor has it, and a vector for each
   * number of a spectrum, of the rounds of one that has a chirp, and of a power spectrum. */
  float *stretch;
  void *spectra, *rounds, *powers;
};

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#define LANES 4
#include "log_mel_frames.h"
#if defined(__x86_64__) && EDGEKIT_LOG_MEL_LANES > 4
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#include "log_mel_frames.h"
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif
#define LANES 16
#include "log_mel_frames.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define USE(op, n) \
  ((op)->lanes = n, (op)->levels = levels_##n, (op)->from_int16 = from_int16_##n, (op)->raise = raise_##n)

static void choose_instructions(LogMel *op) {
  USE(op, 4);
#if defined(__x86_64__) && EDGEKIT_LOG_MEL_LANES > 4
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) USE(op, 8);
  if (EDGEKIT_LOG_MEL_LANES > 8 && __builtin_cpu_supports("avx512f")) USE(op, 16);
#endif
}

/* ---- tables ---- */

/* edgekit/mel.py says where the scales come from. */
static double mel_of(const LogMel *op, double hertz) {
  if (!op->slaney_scale) return 2595 * log10(1 + hertz / 700);
  return hertz < 1000 ? hertz / (200.0 / 3) : 1000 / (200.0 / 3) + log(hertz / 1000) / (log(6.4) / 27);
}

static double hertz_of(const LogMel *op, double mel) {
  if (!op->slaney_scale) return 700 * (pow(10, mel / 2595) - 1);
  double knee = 1000 / (200.0 / 3);
  return mel < knee ? mel * (200.0 / 3) : 1000 * exp(log(6.4) / 27 * (mel - knee));
}

static double corner(const LogMel *op, int number) {
  double low = mel_of(op, op->low_hz), high = mel_of(op, op->high_hz);
  return hertz_of(op, number > op->mels ? high : low + number * ((high - low) / (op->mels + 1)));
}

/* The triangle's weights that are not zero, one after the other; NULL to count them alone. */
static Filter make_filter(const LogMel *op, int mel, float *weights) {
  double left = corner(op, mel), centre = corner(op, mel + 1), right = corner(op, mel + 2);
  double bin_hz = (double)op->rate_hz / op->fft, height = op->slaney_norm ? 2 / (right - left) : 1;
  Filter filter = {0};
  for (int k = (int)(left / bin_hz); k <= op->fft / 2 && k * bin_hz < right; k++) {
    double up = (k * bin_hz - left) / (centre - left), down = (right - k * bin_hz) / (right - centre);
    float weight = (float)((up < down ? up : down) * height);
    if (!(weight > 0)) continue;
    if (!filter.count) filter.first = k;
    if (weights) weights[filter.count] = weight;
    filter.count++;
  }
  return filter;
}

static bool make_filters(LogMel *op) {
  size_t count = 0;
  for (int m = 0; m < op->mels; m++) count += (size_t)make_filter(op, m, NULL).count;
  op->filters = take((size_t)op->mels, sizeof *op->filters);
  op->weights = take(count, sizeof *op->weights);
  if (!op->filters || !op->weights) return false;
  float *weights = op->weights;
  for (int m = 0; m < op->mels; weights += op->filters[m++].count) op->filters[m] = make_filter(op, m, weights);
  return true;
}

static bool make_tables(LogMel *op) {
  choose_instructions(op);
  bool even = op->fft % 2 == 0;
  if (!make_fourier(&op->fourier, even ? op->fft / 2 : op->fft)) return false;
  size_t fft = (size_t)op->fft, step = (size_t)(op->hop < op->fft ? op->hop : op->fft), lanes = (size_t)op->lanes;
  size_t vector = sizeof(float) * lanes;
  op->window = take(fft, sizeof *op->window);
  op->split = take(fft / 4 + 1, 2 * sizeof *op->split);
  op->stretch = take(lanes * step + fft, sizeof *op->stretch);
  op->spectra = take((size_t)op->fourier.size * 2, vector);
  op->rounds = take((size_t)op->fourier.round.size * 4, vector);
  op->powers = take(fft / 2 + 1, vector);
  if (!op->window || !op->split || !op->stretch || !op->spectra || !op->rounds || !op->powers) return false;
  /* In float32, as the numpy front end has it. Halved, as two spectra are added to tell even samples from odd ones. */
  for (int i = 0; i < op->fft; i++) op->window[i] = (float)(0.5 - 0.5 * cos(2 * PI * i / op->fft)) * (even ? 0.5f : 1);
  for (int k = 1; k <= op->fft / 4; k++) root_of_unity(k, op->fft, op->split + 2 * (k - 1));
  return make_filters(op);
}

static void free_node(EdgekitNode *node) {
  LogMel *op = node->state;
  if (!op) return;
  void *taken[] = {op->window, op->split, op->filters, op->weights, op->stretch, op->spectra, op->rounds, op->powers};
  for (size_t i = 0; i < sizeof taken / sizeof *taken; i++) free(taken[i]);
  free_fourier(&op->fourier);
  free(op);
  node->state = NULL;
}

/* ---- options ---- */

static int refuse(EdgekitNode *node, const char *key, const char *expected) {
  const EdgekitOption *option = edgekit_option(node, key);
  if (!option) return node->fail(node, "%s: expected %s, got none" MEND, key, expected);
  if (option->kind == EDGEKIT_INTEGER)
    return node->fail(node, "%s: expected %s, got %lld" MEND, key, expected, (long long)option->integer);
  if (option->kind == EDGEKIT_REAL) return node->fail(node, "%s: expected %s, got %g" MEND, key, expected, option->real);
  return node->fail(node, "%s: expected %s, got \"%.60s\"" MEND, key, expected, option->text);
}

static int read_whole(EdgekitNode *node, const char *key, int low, int high, int *to) {
  char expected[64];
  snprintf(expected, sizeof expected, "a whole number of %d to %d", low, high);
  int64_t given = edgekit_integer(node, key, INT64_MIN);
  if (given < low || given > high) return refuse(node, key, expected);
  *to = (int)given;
  return EDGEKIT_OK;
}

/* A number above `above`, or at it. One that is absent is `otherwise`. */
static int read_real(EdgekitNode *node, const char *key, double above, const char *expected, double otherwise, double *to) {
  *to = edgekit_option(node, key) ? edgekit_real(node, key, NAN) : otherwise;
  return *to >= above && *to <= FLT_MAX ? EDGEKIT_OK : refuse(node, key, expected);
}

static int read_name(EdgekitNode *node, const char *key, const char *one, const char *other, bool *is_one) {
  char expected[64];
  snprintf(expected, sizeof expected, "%s or %s", one, other);
  const char *given = edgekit_option(node, key) ? edgekit_text(node, key, "") : one;
  *is_one = !strcmp(given, one);
  return *is_one || !strcmp(given, other) ? EDGEKIT_OK : refuse(node, key, expected);
}

static int read_options(EdgekitNode *node, LogMel *op) {
  double power, floor, range_db;
  if (read_whole(node, "sample_rate_hz", 1000, 384000, &op->rate_hz) || read_whole(node, "fft_samples", 2, 65536, &op->fft) ||
      read_whole(node, "frame_hop_samples", 1, 65536, &op->hop) || read_whole(node, "num_mel_bins", 1, 1024, &op->mels) ||
      read_real(node, "low_hz", 0, "0 Hz or more", NAN, &op->low_hz) ||
      read_real(node, "high_hz", 0, "a frequency above low_hz", NAN, &op->high_hz) ||
      read_real(node, "power", DBL_MIN, "a number above 0", 1, &power) ||
      read_real(node, "floor", DBL_MIN, "a number above 0", 1e-10, &floor) ||
      read_real(node, "range_db", 0, "0 dB or more", 0, &range_db) ||
      read_name(node, "mel_scale", "slaney", "htk", &op->slaney_scale) ||
      read_name(node, "mel_norm", "slaney", "none", &op->slaney_norm))
    return EDGEKIT_ERROR;
  if (!(op->low_hz < op->high_hz && op->high_hz <= op->rate_hz / 2.0))
    return node->fail(node, "mel filters: expected low_hz < high_hz <= %g, half the sample rate, got %g and %g" MEND,
                      op->rate_hz / 2.0, op->low_hz, op->high_hz);
  for (int m = 0; m <= op->mels; m++)
    if (!(corner(op, m + 1) - corner(op, m) >= FLT_MIN))
      return node->fail(node, "mel filters: expected low_hz and high_hz far enough apart for %d filters, got %g and %g" MEND,
                        op->mels, op->low_hz, op->high_hz);
  /* log(x ^ power) as power * log(x), which does not overflow */
  op->limited = edgekit_option(node, "range_db");
  op->range_db = (float)range_db;
  op->floor = (float)fmin(pow(floor, 1 / power), 2.0 * FLT_MAX);
  op->scale = (float)(10 * log10(2.0) * power);
  if (!(op->floor >= FLT_MIN && op->floor <= FLT_MAX && op->scale <= FLT_MAX / 256))
    return node->fail(node, "floor and power: expected floor ^ (1 / power) of %g to %g, got %g and %g" MEND, (double)FLT_MIN,
                      (double)FLT_MAX, floor, power);
  return EDGEKIT_OK;
}

static int init(EdgekitNode *node) {
  LogMel *op = node->state = calloc(1, sizeof *op);
  if (!op) return node->fail(node, "out of memory");
  if (read_options(node, op)) return EDGEKIT_ERROR;
  return make_tables(op) ? EDGEKIT_OK : node->fail(node, "out of memory for fft_samples %d", op->fft);
}

/* ---- tensors ---- */

static int check_stream(EdgekitNode *node, const LogMel *op, int64_t samples) {
  if (samples % op->hop)
    return node->fail(node, "input 0, the sound of a stream: expected a multiple of frame_hop_samples, %d, got %lld samples",
                      op->hop, (long long)samples);
  if (op->fft > 2 * op->hop || op->fft >= 2 * samples)
    return node->fail(node,
                      "fft_samples of a stream: expected at most twice frame_hop_samples, %d, and less than twice the samples of "
                      "input 0, %lld, got %d" MEND,
                      op->hop, (long long)samples, op->fft);
  if (op->limited)
    return node->fail(node, "range_db of a stream: expected none, as it does not know its highest level, got %g" MEND,
                      (double)op->range_db);
  const EdgekitTensor *state = &node->inputs[1];
  char got[EDGEKIT_DESCRIPTION];
  if (state->type != EDGEKIT_FLOAT32 || state->rank != 2 || state->dims[0] != 1 || state->dims[1] != 1 + op->fft / 2)
    return node->fail(node, "input 1, the state: expected float32 of shape (1, %d), got %s", 1 + op->fft / 2,
                      edgekit_describe(state, got));
  return EDGEKIT_OK;
}

static int prepare(EdgekitNode *node) {
  const LogMel *op = node->state;
  bool stream = node->input_count == 2;
  if (node->input_count < 1 || node->input_count > 2 || node->output_count != node->input_count)
    return node->fail(node, "expected 1 input and 1 output, or of a stream 2 and 2, got %d and %d", (int)node->input_count,
                      (int)node->output_count);
  const EdgekitTensor *sound = &node->inputs[0];
  char got[EDGEKIT_DESCRIPTION];
  bool fits = sound->type == EDGEKIT_FLOAT32 || (sound->type == EDGEKIT_INT16 && !sound->zero_point);
  fits = fits && (sound->rank == 1 || (sound->rank == 2 && sound->dims[0] == 1)) && sound->dims[sound->rank - 1] > 0;
  if (!fits)
    return node->fail(node, "input 0, the sound: expected float32 or int16 (zero point 0) of shape (n,) or (1, n), got %s",
                      edgekit_describe(sound, got));
  int64_t samples = sound->dims[sound->rank - 1], frames = stream ? samples / op->hop : 1 + samples / op->hop;
  if (stream && check_stream(node, op, samples)) return EDGEKIT_ERROR;
  if (frames > INT32_MAX) return node->fail(node, "input 0, the sound: expected fewer samples, got %lld", (long long)samples);
  for (int i = 0; i < node->output_count; i++)
    if (node->outputs[i].type != EDGEKIT_FLOAT32)
      return node->fail(node, "output %d: expected float32, got %s", i, edgekit_describe(&node->outputs[i], got));
  const int32_t levels[] = {1, op->mels, (int32_t)frames, 1}, state[] = {1, 1 + op->fft / 2};
  return node->resize(node, 0, 4, levels) || (stream && node->resize(node, 1, 2, state)) ? EDGEKIT_ERROR : EDGEKIT_OK;
}

/* ---- work ---- */

typedef struct Sound {
  const char *data;
  bool is_int16;
  float scale;
  int64_t count;
  const char *earlier; /* the fft / 2 samples before, as float, or NULL at the beginning, which is mirrored */
} Sound;

/* `count` samples from number `from` on, as float. */
static void copy_samples(const LogMel *op, const Sound *sound, int64_t from, int count, float *to) {
  if (from >= 0 && from + count <= sound->count) {
    if (sound->is_int16) op->from_int16(sound->data + 2 * from, count, sound->scale, to);
    else memcpy(to, sound->data + 4 * from, sizeof *to * (size_t)count);
    return;
  }
  int64_t period = 2 * (sound->count - 1);
  for (int i = 0; i < count;) {
    int64_t at = from + i;
    if (at >= 0 && at < sound->count) {
      int whole = sound->count - at < count - i ? (int)(sound->count - at) : count - i;
      copy_samples(op, sound, at, whole, to + i);
      i += whole;
    } else if (at < 0 && sound->earlier) {
      memcpy(to + i++, sound->earlier + 4 * (op->fft / 2 + at), sizeof *to);
    } else {
      at = period ? (at % period + period) % period : 0;
      copy_samples(op, sound, at < sound->count ? at : period - at, 1, to + i++);
    }
  }
}

/* Where frames number `first` on begin: in the tensor itself, or in a copy where it will not do. */
static void find_frames(const LogMel *op, const Sound *sound, int64_t first, int count, const float **frames) {
  int64_t from = first * op->hop - op->fft / 2, past = from + (int64_t)(count - 1) * op->hop + op->fft;
  const float *start = op->stretch;
  int step = op->hop < op->fft ? op->hop : op->fft;
  if (!sound->is_int16 && (uintptr_t)sound->data % sizeof *start == 0 && from >= 0 && past <= sound->count) {
    start = (const float *)(const void *)sound->data + from;
    step = op->hop;
  } else if (op->hop < op->fft) {
    copy_samples(op, sound, from, (int)(past - from), op->stretch);
  } else {
    for (int i = 0; i < count; i++)
      copy_samples(op, sound, from + (int64_t)i * op->hop, op->fft, op->stretch + (ptrdiff_t)i * step);
  }
  /* Lanes to spare take the last frame. */
  for (int lane = 0; lane < op->lanes; lane++) frames[lane] = start + (ptrdiff_t)(lane < count ? lane : count - 1) * step;
}

static int invoke(EdgekitNode *node) {
  LogMel *op = node->state;
  const EdgekitTensor *given = &node->inputs[0];
  Sound sound = {given->data, given->type == EDGEKIT_INT16, given->scale > 0 ? given->scale : 1 / 32768.0f,
                 given->dims[given->rank - 1], NULL};
  int64_t frames = node->input_count == 2 ? sound.count / op->hop : 1 + sound.count / op->hop;
  if (node->input_count == 2) {
    float begun;
    memcpy(&begun, node->inputs[1].data, sizeof begun);
    if (begun != 0) sound.earlier = (const char *)node->inputs[1].data + sizeof begun;
  }
  float *levels = node->outputs[0].data, highest = -FLT_MAX;
  for (int64_t first = 0; first < frames; first += op->lanes) {
    const float *starts[EDGEKIT_LOG_MEL_LANES];
    int count = frames - first < op->lanes ? (int)(frames - first) : op->lanes;
    find_frames(op, &sound, first, count, starts);
    if (!op->levels(op, starts, count, levels + first, (size_t)frames, &highest))
      return node->fail(node, "sound: expected finite samples in -1..1, got NaN, infinity or larger ones; check what made it");
  }
  if (op->limited) op->raise(levels, (size_t)frames * (size_t)op->mels, highest - op->range_db);
  if (node->input_count == 2) {
    float *state = node->outputs[1].data;
    state[0] = 1;
    copy_samples(op, &sound, sound.count - op->fft / 2, op->fft / 2, state + 1);
  }
  return EDGEKIT_OK;
}

const EdgekitOp edgekit_log_mel = {
    .name = "EdgekitLogMel", .version = 1, .init = init, .prepare = prepare, .invoke = invoke, .free = free_node};
