#ifndef EDGEKIT_FLEXBUFFER_H
#define EDGEKIT_FLEXBUFFER_H

#include <stdbool.h>

#include "edgekit_op.h"

/* The numbers and texts of the flexbuffer map in `bytes`, which is followed by a zero byte, as a new array that points
 * into it; NULL, and 0 in `count`, where it is no such map. */
EdgekitOption *edgekit_read_options(const uint8_t *bytes, size_t length, int32_t *count);

#endif
