/* A node of a graph with the operator that works for it. */
#ifndef EDGEKIT_UNIT_H
#define EDGEKIT_UNIT_H

#include "edgekit_op.h"
#include "tflite.h"

enum { EDGEKIT_MAX_RANK = 8 };

typedef struct Shape {
  int32_t rank, dims[EDGEKIT_MAX_RANK];
} Shape;

/* A tensor between two nodes of one delegated piece: the interpreter gives it no memory. */
typedef struct Local {
  int tensor;
  Shape shape;
  EdgekitTensor bound;
  void *memory;
} Local;

typedef struct Locals {
  Local *of;
  int count;
} Locals;

typedef struct Unit {
  EdgekitNode node; /* first, so that a node leads to its unit */
  const EdgekitOp *op;
  TfLiteContext *context; /* of the call that goes on */
  Locals *locals;
  int *tensors;  /* those of the inputs, then of the outputs */
  Shape *shapes; /* of the outputs */
  size_t *bytes; /* of the inputs, then of the outputs, as prepared */
  uint8_t *blob;
  EdgekitOption *options;
  bool broken;
} Unit;

/* NULL where memory is short. The options are copied. */
Unit *edgekit_new_unit(TfLiteContext *context, const EdgekitOp *op, int index, const char *blob, size_t blob_bytes);
void edgekit_delete_unit(TfLiteContext *context, Unit *unit);
/* Binds the unit to the tensors of `node`; those in `locals`, NULL for none, have memory of their own. */
int edgekit_connect_unit(TfLiteContext *context, Unit *unit, const TfLiteNode *node, Locals *locals);
int edgekit_prepare_unit(TfLiteContext *context, Unit *unit);
int edgekit_invoke_unit(TfLiteContext *context, Unit *unit);

#endif
