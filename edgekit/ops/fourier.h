/* What a discrete Fourier transform of any size takes: its passes and their tables, made in double precision. The passes
 * themselves are in log_mel_frames.h. */
#ifndef EDGEKIT_FOURIER_H
#define EDGEKIT_FOURIER_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#define PI 3.14159265358979323846
/* Primes above it are not worth a pass of their own: its time grows with their square. */
#define MAX_RADIX 61
#define MAX_PASSES 17

/* Of so many complex numbers, in passes that combine as many parts of the spectrum as each radix says. */
typedef struct Plan {
  int size, passes, radix[MAX_PASSES];
  float *turns[MAX_PASSES], *roots[MAX_PASSES]; /* (cos, sin): of each part of a pass, and of the radix */
  int32_t *places;                              /* where each number of the result is left */
} Plan;

/* Of so many complex numbers, with a large prime factor or not. */
typedef struct Fourier {
  int size;
  Plan plan;                     /* without passes where there is a chirp, */
  float *chirp, *chirp_spectrum; /* with which a transform is a convolution */
  Plan round;                    /* that goes there and back through one of a power of two */
} Fourier;

/* Aligned for vectors; NULL where memory is short. */
static void *take(size_t count, size_t size) {
  size_t bytes = count * size; /* both are bounded by the options: no overflow */
  return aligned_alloc(64, (bytes + 64) / 64 * 64);
}

static void root_of_unity(double numerator, double denominator, float *to) {
  double angle = -2 * PI * numerator / denominator;
  to[0] = (float)cos(angle);
  to[1] = (float)sin(angle);
}

/* The passes that a transform of `size` takes; false where a prime factor is too large. */
static bool find_passes(Plan *plan, int size) {
  *plan = (Plan){.size = size};
  for (int radix = 3; radix <= MAX_RADIX; radix += 2)
    for (; size % radix == 0; size /= radix) plan->radix[plan->passes++] = radix;
  int fours = 0;
  for (; size % 4 == 0; size /= 4) fours++;
  for (; size % 2 == 0; size /= 2) plan->radix[plan->passes++] = 2;
  while (fours-- > 0) plan->radix[plan->passes++] = 4;
  return size == 1;
}

static bool make_plan(Plan *plan) {
  plan->places = take((size_t)plan->size, sizeof *plan->places);
  if (!plan->places) return false;
  for (int pass = 0, parts = 1; pass < plan->passes; parts *= plan->radix[pass++]) {
    int radix = plan->radix[pass];
    float *turn = plan->turns[pass] = take((size_t)parts * (size_t)(radix - 1), 2 * sizeof *turn);
    float *root = plan->roots[pass] = take((size_t)radix, 2 * sizeof *root);
    if (!turn || !root) return false;
    for (int m = 0; m < radix; m++) root_of_unity(m, radix, root + 2 * m);
    for (int part = 0; part < parts; part++) {
      int frequency = 0; /* the lowest of the part's, which the passes before left: the digits of `part`, in reverse */
      for (int before = 0, weight = parts, unit = 1; before < pass; unit *= plan->radix[before++]) {
        weight /= plan->radix[before];
        frequency += part / weight % plan->radix[before] * unit;
      }
      for (int m = 1; m < radix; m++, turn += 2) root_of_unity((double)m * frequency, (double)parts * radix, turn);
    }
  }
  for (int k = 0; k < plan->size; k++) {
    int place = 0, rest = k, part = plan->size;
    for (int pass = 0; pass < plan->passes; rest /= plan->radix[pass++])
      place += rest % plan->radix[pass] * (part /= plan->radix[pass]);
    plan->places[k] = plan->passes ? place : k;
  }
  return true;
}

static void free_plan(Plan *plan) {
  for (int pass = 0; pass < plan->passes; pass++) {
    free(plan->turns[pass]);
    free(plan->roots[pass]);
  }
  free(plan->places);
}

/* The spectrum of `size` complex numbers, a power of two, in place. */
static void transform_double(double *z, int size) {
  for (int length = size; length > 1; length /= 2)
    for (int k = 0; k < length / 2; k++) {
      double angle = -2 * PI * k / length, c = cos(angle), s = sin(angle);
      for (int start = k; start < size; start += length) {
        double *a = z + 2 * start, *b = a + length, re = a[0] - b[0], im = a[1] - b[1];
        a[0] += b[0];
        a[1] += b[1];
        b[0] = re * c - im * s;
        b[1] = re * s + im * c;
      }
    }
  for (int i = 0, j = 0; i < size; i++) {
    if (i < j)
      for (int part = 0; part < 2; part++) {
        double other = z[2 * i + part];
        z[2 * i + part] = z[2 * j + part];
        z[2 * j + part] = other;
      }
    int bit = size / 2;
    for (; j & bit; bit /= 2) j &= ~bit;
    j |= bit;
  }
}

static bool make_chirp(Fourier *to) {
  int size = 1;
  while (size < 2 * to->size - 1) size *= 2;
  find_passes(&to->round, size);
  if (!make_plan(&to->round)) return false;
  to->chirp = take((size_t)to->size, 2 * sizeof *to->chirp);
  to->chirp_spectrum = take((size_t)size, 2 * sizeof *to->chirp_spectrum);
  double *response = calloc((size_t)size, 2 * sizeof *response);
  if (!to->chirp || !to->chirp_spectrum || !response) {
    free(response);
    return false;
  }
  for (int k = 0; k < to->size; k++) {
    int64_t turn = (int64_t)k * k % (2 * (int64_t)to->size);
    double angle = PI * (double)turn / to->size;
    to->chirp[2 * k] = (float)cos(angle);
    to->chirp[2 * k + 1] = (float)-sin(angle);
    int back = k ? size - k : 0;
    response[2 * k] = response[2 * back] = cos(angle) / size;
    response[2 * k + 1] = response[2 * back + 1] = sin(angle) / size;
  }
  transform_double(response, size);
  for (int i = 0; i < 2 * size; i++) to->chirp_spectrum[i] = (float)response[i];
  free(response);
  return true;
}

static bool make_fourier(Fourier *to, int size) {
  *to = (Fourier){.size = size};
  bool split = find_passes(&to->plan, size);
  if (!split) to->plan.passes = 0;
  return make_plan(&to->plan) && (split || make_chirp(to));
}

static void free_fourier(Fourier *of) {
  free_plan(&of->plan);
  free_plan(&of->round);
  free(of->chirp);
  free(of->chirp_spectrum);
}

#endif
