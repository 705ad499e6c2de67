/* Tensors in words, for what an operator says of those that do not fit. */
#ifndef EDGEKIT_DESCRIBE_H
#define EDGEKIT_DESCRIBE_H

#include <stdio.h>

#include "edgekit_op.h"

enum { EDGEKIT_DESCRIPTION = 160 };

/* "float32 of shape (1, 96)", cut short where the shape is long. */
static inline const char *edgekit_describe(const EdgekitTensor *tensor, char text[EDGEKIT_DESCRIPTION]) {
  static const char *const names[] = {"none", "float32", "int32", "uint8", "int64", "text", "bool", "int16", "complex64", "int8",
                                      "float16", "float64"};
  int known = tensor->type >= 0 && tensor->type < (int)(sizeof names / sizeof *names);
  int at = snprintf(text, EDGEKIT_DESCRIPTION, "%s of shape (", known ? names[tensor->type] : "another type");
  for (int32_t i = 0; i < tensor->rank && at < EDGEKIT_DESCRIPTION - 20; i++)
    at += snprintf(text + at, (size_t)(EDGEKIT_DESCRIPTION - at), "%s%d", i ? ", " : "", (int)tensor->dims[i]);
  snprintf(text + at, (size_t)(EDGEKIT_DESCRIPTION - at), tensor->rank == 1 ? ",)" : ")");
  return text;
}

#endif
