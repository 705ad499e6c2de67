/* Reads the options of a custom operator, which the TensorFlow converter writes as a flexbuffer map.
 *
 * After https://flatbuffers.dev/flatbuffers_internals (FlexBuffers). A model may come from anywhere: every position is
 * checked, and what does not fit is left out.
 */
#include "flexbuffer.h"

#include <stdlib.h>

enum { INT = 1, UINT = 2, FLOAT = 3, KEY = 4, STRING = 5, INDIRECT_INT = 6, INDIRECT_FLOAT = 8, MAP = 9, BOOL = 26 };

typedef struct Span {
  const uint8_t *bytes;
  size_t length;
} Span;

static bool inside(Span all, size_t at, size_t size) { return at <= all.length && size <= all.length - at; }

static bool read_unsigned(Span all, size_t at, size_t width, uint64_t *value) {
  *value = 0;
  if (width > 8 || !inside(all, at, width)) return false;
  for (size_t i = 0; i < width; i++) *value |= (uint64_t)all.bytes[at + i] << 8 * i;
  return true;
}

static bool read_signed(Span all, size_t at, size_t width, int64_t *value) {
  uint64_t bits;
  if (!read_unsigned(all, at, width, &bits)) return false;
  if (width < 8 && bits >> (8 * width - 1)) bits |= ~(uint64_t)0 << 8 * width;
  memcpy(value, &bits, sizeof *value);
  return true;
}

static bool read_real(Span all, size_t at, size_t width, double *value) {
  float single;
  if (!inside(all, at, width)) return false;
  if (width == sizeof single) {
    memcpy(&single, all.bytes + at, sizeof single);
    *value = single;
    return true;
  }
  if (width != sizeof *value) return false;
  memcpy(value, all.bytes + at, sizeof *value);
  return true;
}

/* Offsets lead backwards from where they stand. */
static bool follow(Span all, size_t at, size_t width, size_t *target) {
  uint64_t offset;
  if (!read_unsigned(all, at, width, &offset) || offset > at) return false;
  *target = at - (size_t)offset;
  return true;
}

/* The value at `at`, in `width` bytes, of a type and, where it lies elsewhere, of another width. */
static bool read_value(Span all, size_t at, size_t width, uint8_t packed_type, EdgekitOption *option) {
  int type = packed_type >> 2;
  if (type >= INDIRECT_INT && type <= INDIRECT_FLOAT) {
    if (!follow(all, at, width, &at)) return false;
    type -= INDIRECT_INT - INT;
    width = (size_t)1 << (packed_type & 3);
  }
  if (type == INT || type == UINT || type == BOOL) {
    uint64_t bits = 0;
    option->kind = EDGEKIT_INTEGER;
    if (type == INT) return read_signed(all, at, width, &option->integer);
    if (!read_unsigned(all, at, width, &bits) || bits > INT64_MAX) return false;
    option->integer = (int64_t)bits;
    return true;
  }
  if (type == FLOAT) {
    option->kind = EDGEKIT_REAL;
    return read_real(all, at, width, &option->real);
  }
  if ((type == KEY || type == STRING) && follow(all, at, width, &at) && at < all.length) {
    option->kind = EDGEKIT_TEXT;
    option->text = (const char *)all.bytes + at;
    return true;
  }
  return false;
}

EdgekitOption *edgekit_read_options(const uint8_t *bytes, size_t length, int32_t *count) {
  Span all = {bytes, length};
  size_t map, keys;
  uint64_t size, key_width;
  *count = 0;
  /* At the end: the root, its type, its width. */
  if (length < 3 || bytes[length - 2] >> 2 != MAP) return NULL;
  size_t root_width = bytes[length - 1], width = (size_t)1 << (bytes[length - 2] & 3);
  if (root_width > length - 2 || !follow(all, length - 2 - root_width, root_width, &map)) return NULL;
  /* Before a map: where its keys are, their width, and how many. After its values there is the type of each. */
  if (map < 3 * width || !follow(all, map - 3 * width, width, &keys) ||
      !read_unsigned(all, map - 2 * width, width, &key_width) || !read_unsigned(all, map - width, width, &size))
    return NULL;
  if (size == 0 || size > length || !inside(all, map, (size_t)size * (width + 1))) return NULL;
  if (key_width == 0 || key_width > 8 || !inside(all, keys, (size_t)(size * key_width))) return NULL;
  EdgekitOption *options = calloc((size_t)size, sizeof *options);
  if (!options) return NULL;
  for (size_t i = 0; i < size; i++) {
    EdgekitOption option = {0};
    size_t key;
    if (!follow(all, keys + i * (size_t)key_width, (size_t)key_width, &key) || key >= length) continue;
    option.key = (const char *)bytes + key;
    if (read_value(all, map + i * width, width, bytes[map + (size_t)size * width + i], &option))
      options[(*count)++] = option;
  }
  if (!*count) {
    free(options);
    return NULL;
  }
  return options;
}
