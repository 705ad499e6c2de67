/* The levels of some frames of sound at once, each frame in its own lane of the vectors: all of them go the same way
 * through the transform. log_mel.c includes this once for each instruction set, with its LANES. */

#define JOIN_(name, lanes) name##_##lanes
#define JOIN(name, lanes) JOIN_(name, lanes)
#define NAME(name) JOIN(name, LANES)
#define V NAME(Reals)
#define I NAME(Bits)
#define INLINE static inline __attribute__((always_inline))

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

/* Four samples from `at` on of the frames row, row + 4 ..., each in 128 bits of its own; the larger of two; and the masks
 * that interleave two vectors within each 128 bits, by one and by two elements. */
#if LANES == 16
#define MASK(a, b, c, d) \
  a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
INLINE V NAME(four)(const float *const *frames, int row, int at) {
  __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(frames[row] + at));
  four = _mm512_insertf32x4(four, _mm_loadu_ps(frames[row + 4] + at), 1);
  four = _mm512_insertf32x4(four, _mm_loadu_ps(frames[row + 8] + at), 2);
  return (V)_mm512_insertf32x4(four, _mm_loadu_ps(frames[row + 12] + at), 3);
}
INLINE V NAME(larger)(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
#elif LANES == 8
#define MASK(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
INLINE V NAME(four)(const float *const *frames, int row, int at) {
  __m256 four = _mm256_castps128_ps256(_mm_loadu_ps(frames[row] + at));
  return (V)_mm256_insertf128_ps(four, _mm_loadu_ps(frames[row + 4] + at), 1);
}
INLINE V NAME(larger)(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
#else
#define MASK(a, b, c, d) a, b, c, d
INLINE V NAME(four)(const float *const *frames, int row, int at) {
  V four;
  memcpy(&four, frames[row] + at, sizeof four);
  return four;
}
INLINE V NAME(larger)(V a, V b) {
#if defined(__x86_64__)
  return (V)_mm_max_ps((__m128)a, (__m128)b);
#else
  I take = a > b;
  return (V)(((I)a & take) | ((I)b & ~take));
#endif
}
#endif

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif
#define LOW(a, b) SHUFFLE(a, b, MASK(0, LANES, 1, LANES + 1))
#define HIGH(a, b) SHUFFLE(a, b, MASK(2, LANES + 2, 3, LANES + 3))
#define LOW_PAIR(a, b) SHUFFLE(a, b, MASK(0, 1, LANES, LANES + 1))
#define HIGH_PAIR(a, b) SHUFFLE(a, b, MASK(2, 3, LANES + 2, LANES + 3))

/* The windowed samples of the frames into `to`, `step` vectors apart. */
INLINE void NAME(load)(const float *const *frames, const float *window, int samples, V *to, int step) {
  int i = 0;
  for (; i + 4 <= samples; i += 4) {
    V a = NAME(four)(frames, 0, i), b = NAME(four)(frames, 1, i), c = NAME(four)(frames, 2, i), d = NAME(four)(frames, 3, i);
    V ab = LOW(a, b), cd = LOW(c, d), ab_high = HIGH(a, b), cd_high = HIGH(c, d);
    to[(i + 0) * step] = LOW_PAIR(ab, cd) * window[i];
    to[(i + 1) * step] = HIGH_PAIR(ab, cd) * window[i + 1];
    to[(i + 2) * step] = LOW_PAIR(ab_high, cd_high) * window[i + 2];
    to[(i + 3) * step] = HIGH_PAIR(ab_high, cd_high) * window[i + 3];
  }
  for (; i < samples; i++)
    for (int lane = 0; lane < LANES; lane++) to[i * step][lane] = frames[lane][i] * window[i];
}

/* (re, im) turned by one of the tables' (cos, sin). */
INLINE void NAME(turn)(V *to, V re, V im, const float *by) {
  to[0] = re * by[0] - im * by[1];
  to[1] = re * by[1] + im * by[0];
}

/* sum = a + b turned, less = a - b turned, each a complex number; six instructions where there is a fused one. */
INLINE void NAME(cross)(V *sum, V *less, V a_re, V a_im, V b_re, V b_im, const float *by) {
#if LANES == 4 && defined(__x86_64__)
  V turned[2];
  NAME(turn)(turned, b_re, b_im, by);
  sum[0] = a_re + turned[0];
  sum[1] = a_im + turned[1];
  less[0] = a_re - turned[0];
  less[1] = a_im - turned[1];
#else
  V sum_re = a_re + b_re * by[0] - b_im * by[1], sum_im = a_im + b_re * by[1] + b_im * by[0];
  sum[0] = sum_re;
  sum[1] = sum_im;
  less[0] = 2 * a_re - sum_re;
  less[1] = 2 * a_im - sum_im;
#endif
}

/* Four parts of a spectrum, one after the other, of which each number k of the four is combined with the other three.
 * The first of a pass, and so the whole first pass, has nothing to turn. */
INLINE void NAME(fours)(V *a, int part) {
  V *b = a + 2 * part, *c = b + 2 * part, *d = c + 2 * part;
  for (int k = 0; k < part; k++, a += 2, b += 2, c += 2, d += 2) {
    V sum_re = a[0] + c[0], sum_im = a[1] + c[1], less_re = a[0] - c[0], less_im = a[1] - c[1];
    V other_re = b[0] + d[0], other_im = b[1] + d[1], turned_re = b[1] - d[1], turned_im = d[0] - b[0];
    a[0] = sum_re + other_re;
    a[1] = sum_im + other_im;
    b[0] = less_re + turned_re;
    b[1] = less_im + turned_im;
    c[0] = sum_re - other_re;
    c[1] = sum_im - other_im;
    d[0] = less_re - turned_re;
    d[1] = less_im - turned_im;
  }
}

INLINE void NAME(fours_turned)(V *a, int part, const float *by) {
  V *b = a + 2 * part, *c = b + 2 * part, *d = c + 2 * part;
  for (int k = 0; k < part; k++, a += 2, b += 2, c += 2, d += 2) {
    V even[2], even_less[2], odd[2], odd_less[2];
    NAME(cross)(even, even_less, a[0], a[1], c[0], c[1], by + 2);
    NAME(cross)(odd, odd_less, b[0], b[1], d[0], d[1], by + 2);
    NAME(cross)(a, c, even[0], even[1], odd[0], odd[1], by);
    NAME(cross)(b, d, even_less[0], even_less[1], odd_less[1], -odd_less[0], by);
  }
}

INLINE void NAME(twos)(V *a, int part, const float *by) {
  V *b = a + 2 * part;
  for (int k = 0; k < part; k++, a += 2, b += 2) NAME(cross)(a, b, a[0], a[1], b[0], b[1], by);
}

/* Of an odd radix, with the (cos, sin) of its roots of unity. */
INLINE void NAME(odds)(V *first, int part, int radix, const float *by, const float *roots) {
  int half = radix / 2;
  V sums[MAX_RADIX], less[MAX_RADIX];
  for (int k = 0; k < part; k++, first += 2) {
    V re = first[0], im = first[1], whole_re = re, whole_im = im;
    for (int j = 1; j <= half; j++) {
      const V *from = first + 2 * part * j, *mirrored = first + 2 * part * (radix - j);
      V a[2], b[2];
      NAME(turn)(a, from[0], from[1], by + 2 * (j - 1));
      NAME(turn)(b, mirrored[0], mirrored[1], by + 2 * (radix - j - 1));
      whole_re += sums[2 * j - 2] = a[0] + b[0];
      whole_im += sums[2 * j - 1] = a[1] + b[1];
      less[2 * j - 2] = b[1] - a[1];
      less[2 * j - 1] = a[0] - b[0];
    }
    first[0] = whole_re;
    first[1] = whole_im;
    for (int m = 1; m <= half; m++) {
      V even_re = re, even_im = im, odd_re = {0}, odd_im = {0};
      for (int j = 0, at = m; j < half; j++, at = at + m < radix ? at + m : at + m - radix) {
        even_re += sums[2 * j] * roots[2 * at];
        even_im += sums[2 * j + 1] * roots[2 * at];
        odd_re += less[2 * j] * roots[2 * at + 1];
        odd_im += less[2 * j + 1] * roots[2 * at + 1];
      }
      V *to = first + 2 * part * m, *mirrored = first + 2 * part * (radix - m);
      to[0] = even_re + odd_re;
      to[1] = even_im + odd_im;
      mirrored[0] = even_re - odd_re;
      mirrored[1] = even_im - odd_im;
    }
  }
}

/* In place, decimation in time; number k of the result is left at place plan->places[k]. */
static void NAME(transform)(const Plan *plan, V *z) {
  V *end = z + 2 * plan->size;
  for (int pass = 0, part = plan->size; pass < plan->passes; pass++) {
    int radix = plan->radix[pass], whole = 2 * part;
    const float *by = plan->turns[pass], *roots = plan->roots[pass];
    part /= radix;
    if (radix == 4) {
      NAME(fours)(z, part);
      if (part > 1) {
        for (V *at = z + whole; at < end; at += whole) NAME(fours_turned)(at, part, by += 6);
      } else {
        for (V *at = z + 8; at < end; at += 8) NAME(fours_turned)(at, 1, by += 6);
      }
    } else if (radix == 2) {
      for (V *at = z; at < end; at += whole, by += 2) NAME(twos)(at, part, by);
    } else if (radix == 3) {
      for (V *at = z; at < end; at += whole, by += 4) NAME(odds)(at, part, 3, by, roots);
    } else if (radix == 5) {
      for (V *at = z; at < end; at += whole, by += 8) NAME(odds)(at, part, 5, by, roots);
    } else {
      for (V *at = z; at < end; at += whole, by += 2 * (radix - 1)) NAME(odds)(at, part, radix, by, roots);
    }
  }
}

/* Of a size with a large prime factor: as a convolution (Bluestein 1970), through transforms of a power of two. */
static void NAME(transform_any)(const Fourier *of, V *z, V *rounds) {
  const Plan *plan = &of->round;
  V *a = rounds, *b = a + 2 * plan->size;
  for (int k = 0; k < of->size; k++) NAME(turn)(a + 2 * k, z[2 * k], z[2 * k + 1], of->chirp + 2 * k);
  memset(a + 2 * of->size, 0, sizeof *a * 2 * (size_t)(plan->size - of->size));
  NAME(transform)(plan, a);
  for (int k = 0; k < plan->size; k++) {
    const V *from = a + 2 * plan->places[k];
    NAME(turn)(b + 2 * k, from[0], from[1], of->chirp_spectrum + 2 * k);
    b[2 * k + 1] = -b[2 * k + 1];
  }
  NAME(transform)(plan, b);
  for (int k = 0; k < of->size; k++) {
    const V *from = b + 2 * plan->places[k];
    NAME(turn)(z + 2 * k, from[0], -from[1], of->chirp + 2 * k);
  }
}

/* |spectrum|^2 of the frames, 1 + fft / 2 vectors. */
INLINE void NAME(powers)(const LogMel *op, const V *z, V *powers) {
  const int32_t *places = op->fourier.plan.places, size = op->fourier.size;
  if (op->fft % 2) {
    for (int k = 0; k <= op->fft / 2; k++) {
      const V *at = z + 2 * places[k];
      powers[k] = at[0] * at[0] + at[1] * at[1];
    }
    return;
  }
  /* The even samples were transformed as real parts, the odd ones as imaginary parts, of half the window. */
  V low = z[0] + z[1], high = z[0] - z[1];
  powers[0] = 4 * low * low;
  powers[size] = 4 * high * high;
  const float *by = op->split;
  for (int k = 1, last = size / 2; k <= last; k++, by += 2) {
    const V *a = z + 2 * places[k], *b = z + 2 * places[size - k];
    V sum[2], less[2];
    NAME(cross)(sum, less, a[0] + b[0], a[1] - b[1], a[1] + b[1], b[0] - a[0], by);
    powers[k] = sum[0] * sum[0] + sum[1] * sum[1];
    powers[size - k] = less[0] * less[0] + less[1] * less[1];
  }
}

/* Binary logarithm of numbers that are neither subnormal nor negative. The polynomial, of log2(1 + x) / x between
 * sqrt(1/2) - 1 and sqrt(2) - 1, is off by 5e-8 at most. */
INLINE V NAME(log2)(V x) {
  const int32_t root_half = 0x3f3504f3;
  I bits = (I)x - root_half, exponent = bits >> 23;
  V y = (V)((bits & 0x7fffff) + root_half) - 1.0f;
  V p = y * -0.145744443f + 0.236890361f;
  p = p * y - 0.250069052f;
  p = p * y + 0.286707461f;
  p = p * y - 0.360087216f;
  p = p * y + 0.480939448f;
  p = p * y - 0.721357167f;
  p = p * y + 1.44269478f;
  return p * y + __builtin_convertvector(exponent, V);
}

/* Levels of the frames that begin at frames[0..LANES - 1], of which the first `count` go to `levels`, a column each in
 * rows `row` apart. False where one is not finite. */
static bool NAME(levels)(const LogMel *op, const float *const *frames, int count, float *levels, size_t row, float *highest) {
  V *z = op->spectra, *powers = op->powers;
  if (op->fft % 2) {
    NAME(load)(frames, op->window, op->fft, z, 2);
    for (int k = 0; k < op->fft; k++) z[2 * k + 1] = (V){0};
  } else {
    NAME(load)(frames, op->window, op->fft, z, 1);
  }
  if (op->fourier.chirp) NAME(transform_any)(&op->fourier, z, op->rounds);
  else NAME(transform)(&op->fourier.plan, z);
  NAME(powers)(op, z, powers);
  /* Infinity and NaN times 0 are NaN. NaN among the samples is in every power, if not in every filter. */
  V check = powers[0] * 0.0f, floor = (V){0} + op->floor, top = (V){0} - FLT_MAX;
  const float *weight = op->weights;
  for (int m = 0; m < op->mels; m++, levels += row) {
    const V *power = powers + op->filters[m].first;
    V sum = {0};
    for (int k = op->filters[m].count; k > 0; k--) sum += *power++ * *weight++;
    check += sum * 0.0f;
    V level = NAME(log2)(NAME(larger)(sum, floor)) * op->scale;
    top = NAME(larger)(level, top);
    if (count == LANES) {
      memcpy(levels, &level, sizeof level);
    } else {
      for (int lane = 0; lane < count; lane++) levels[lane] = level[lane];
    }
  }
  bool finite = true;
  for (int lane = 0; lane < LANES; lane++) {
    finite &= check[lane] == 0;
    if (top[lane] > *highest) *highest = top[lane];
  }
  return finite;
}

static void NAME(from_int16)(const char *from, int count, float scale, float *to) {
  for (int i = 0; i < count; i++) {
    int16_t sample; /* a constant's need not be aligned */
    memcpy(&sample, from + sizeof sample * (size_t)i, sizeof sample);
    to[i] = (float)sample * scale;
  }
}

static void NAME(raise)(float *levels, size_t count, float to) {
  for (size_t i = 0; i < count; i++) levels[i] = levels[i] > to ? levels[i] : to;
}

#undef JOIN_
#undef JOIN
#undef NAME
#undef V
#undef I
#undef INLINE
#undef MASK
#undef SHUFFLE
#undef LOW
#undef HIGH
#undef LOW_PAIR
#undef HIGH_PAIR
#undef LANES
