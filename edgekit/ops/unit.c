#include "unit.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "flexbuffer.h"

enum { ALIGNMENT = 64 }; /* as the interpreter's own memory */

/* The interpreter goes on in the same line, with which of its nodes failed. */
static int fail(EdgekitNode *node, const char *format, ...) {
  Unit *unit = (Unit *)node;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (node->index < 0)
    unit->context->ReportError(unit->context, "custom operator %s: %s; ", unit->op->name, text);
  else
    unit->context->ReportError(unit->context, "custom operator %s (node %d): %s; ", unit->op->name, (int)node->index, text);
  return EDGEKIT_ERROR;
}

/* Bytes of an element; 0 for a type that operators are not given. */
static size_t element_bytes(int32_t type) {
  switch (type) {
    case EDGEKIT_BOOL: case EDGEKIT_INT8: case EDGEKIT_UINT8: return 1;
    case EDGEKIT_INT16: return 2;
    case EDGEKIT_FLOAT32: case EDGEKIT_INT32: return 4;
    case EDGEKIT_FLOAT64: case EDGEKIT_INT64: return 8;
    default: return 0;
  }
}

/* Whether a tensor of this shape has a size, which is then in `bytes`. */
static bool size_of(int32_t type, int rank, const int32_t *dims, size_t *bytes) {
  *bytes = element_bytes(type);
  for (int i = 0; i < rank; i++)
    if (dims[i] < 0 || __builtin_mul_overflow(*bytes, (size_t)dims[i], bytes) || *bytes > INT32_MAX) return false;
  return *bytes || !rank || element_bytes(type);
}

static int resize(EdgekitNode *node, int output, int rank, const int32_t *dims) {
  Unit *unit = (Unit *)node;
  size_t bytes;
  if (output < 0 || output >= node->output_count) return fail(node, "output %d: the node has %d", output, (int)node->output_count);
  if (rank < 0 || rank > EDGEKIT_MAX_RANK)
    return fail(node, "output %d: expected a rank up to %d, got %d", output, EDGEKIT_MAX_RANK, rank);
  if (!size_of(EDGEKIT_FLOAT64, rank, dims, &bytes)) return fail(node, "output %d: no tensor is of that shape", output);
  unit->shapes[output].rank = rank;
  if (rank) memcpy(unit->shapes[output].dims, dims, (size_t)rank * sizeof *dims);
  return EDGEKIT_OK;
}

Unit *edgekit_new_unit(TfLiteContext *context, const EdgekitOp *op, int index, const char *blob, size_t blob_bytes) {
  Unit *unit = calloc(1, sizeof *unit);
  if (!unit) return NULL;
  unit->op = op;
  unit->context = context;
  unit->blob = calloc(blob_bytes + 1, 1);
  if (!unit->blob) {
    free(unit);
    return NULL;
  }
  if (blob_bytes) memcpy(unit->blob, blob, blob_bytes);
  EdgekitNode *node = &unit->node;
  node->blob = unit->blob;
  node->blob_bytes = blob_bytes;
  node->options = unit->options = edgekit_read_options(unit->blob, blob_bytes, &node->option_count);
  node->index = index;
  node->version = (int32_t)edgekit_integer(node, "version", 1);
  node->user = op->user;
  node->resize = resize;
  node->fail = fail;
  if (node->version > op->version) {
    fail(node, "the model asks for version %d, the kernel knows up to %d; get a newer one", (int)node->version, (int)op->version);
    unit->broken = true;
  } else if (op->init && op->init(node)) {
    unit->broken = true;
  }
  return unit;
}

void edgekit_delete_unit(TfLiteContext *context, Unit *unit) {
  if (!unit) return;
  unit->context = context;
  if (unit->op->free) unit->op->free(&unit->node);
  free(unit->node.inputs);
  free(unit->tensors);
  free(unit->shapes);
  free(unit->bytes);
  free(unit->options);
  free(unit->blob);
  free(unit);
}

int edgekit_connect_unit(TfLiteContext *context, Unit *unit, const TfLiteNode *node, Locals *locals) {
  int inputs = node->inputs ? node->inputs->size : 0, outputs = node->outputs ? node->outputs->size : 0;
  size_t count = (size_t)inputs + (size_t)outputs;
  unit->context = context;
  unit->locals = locals;
  if (!unit->tensors) {
    unit->tensors = calloc(count + 1, sizeof *unit->tensors);
    unit->shapes = calloc((size_t)outputs + 1, sizeof *unit->shapes);
    unit->bytes = calloc(count + 1, sizeof *unit->bytes);
    unit->node.inputs = calloc(count + 1, sizeof *unit->node.inputs);
    if (!unit->tensors || !unit->shapes || !unit->bytes || !unit->node.inputs) return fail(&unit->node, "out of memory");
    unit->node.outputs = unit->node.inputs + inputs;
    unit->node.input_count = inputs;
    unit->node.output_count = outputs;
  }
  for (int i = 0; i < inputs; i++) unit->tensors[i] = node->inputs->data[i];
  for (int i = 0; i < outputs; i++) unit->tensors[inputs + i] = node->outputs->data[i];
  return EDGEKIT_OK;
}

static Local *find_local(const Unit *unit, int tensor) {
  for (int i = 0; unit->locals && i < unit->locals->count; i++)
    if (unit->locals->of[i].tensor == tensor) return &unit->locals->of[i];
  return NULL;
}

/* `whole`: the tensor must be as large as its shape says, which an output is when it was given its shape. */
static int bind(Unit *unit, int which, bool whole, bool preparing) {
  TfLiteContext *context = unit->context;
  EdgekitTensor *bound = &unit->node.inputs[which];
  int index = unit->tensors[which], inputs = unit->node.input_count;
  const char *kind = which < inputs ? "input" : "output";
  int position = which < inputs ? which : which - inputs;
  if (index == -1 && which < inputs) {
    memset(bound, 0, sizeof *bound);
    return EDGEKIT_OK;
  }
  if (index < 0 || (size_t)index >= context->tensors_size) return fail(&unit->node, "%s %d: no such tensor", kind, position);
  Local *local = find_local(unit, index);
  if (local) {
    *bound = local->bound;
    return EDGEKIT_OK;
  }
  const TfLiteTensor *tensor = &context->tensors[index];
  *bound = (EdgekitTensor){
      .type = tensor->type,
      .rank = tensor->dims ? tensor->dims->size : 0,
      .dims = tensor->dims ? tensor->dims->data : NULL,
      .bytes = tensor->bytes,
      .scale = tensor->params.scale,
      .zero_point = tensor->params.zero_point,
      .constant = tensor->allocation_type == kTfLiteMmapRo || tensor->allocation_type == kTfLitePersistentRo,
  };
  if (!preparing || bound->constant) bound->data = tensor->data;
  size_t bytes;
  if (!element_bytes(bound->type)) return fail(&unit->node, "%s %d: its type, number %d, is not supported", kind, position, (int)bound->type);
  /* What an operator is told of the shape must not lead it out of the memory. */
  if (whole && (!size_of(bound->type, bound->rank, bound->dims, &bytes) || bytes != bound->bytes))
    return fail(&unit->node, "%s %d: its shape and its size do not fit each other", kind, position);
  return EDGEKIT_OK;
}

static bool has_shape(const EdgekitTensor *tensor, const Shape *shape) {
  return tensor->rank == shape->rank && (!shape->rank || !memcmp(tensor->dims, shape->dims, (size_t)shape->rank * sizeof *shape->dims));
}

/* The interpreter's tensor of an output takes the shape that the operator set. */
static int give_shape(Unit *unit, int output) {
  TfLiteContext *context = unit->context;
  const Shape *shape = &unit->shapes[output];
  TfLiteTensor *tensor = &context->tensors[unit->tensors[unit->node.input_count + output]];
  bool same = tensor->dims && tensor->dims->size == shape->rank;
  for (int i = 0; same && i < shape->rank; i++) same = tensor->dims->data[i] == shape->dims[i];
  if (same) return EDGEKIT_OK;
  TfLiteIntArray *dims = malloc(sizeof *dims + (size_t)shape->rank * sizeof dims->data[0]);
  if (!dims) return fail(&unit->node, "out of memory");
  dims->size = shape->rank;
  if (shape->rank) memcpy(dims->data, shape->dims, (size_t)shape->rank * sizeof *shape->dims);
  if (context->ResizeTensor(context, tensor, dims) != kTfLiteOk) return fail(&unit->node, "output %d cannot be resized", output);
  return EDGEKIT_OK;
}

static int give_memory(Unit *unit, Local *local, int output) {
  const TfLiteTensor *tensor = &unit->context->tensors[local->tensor];
  size_t bytes;
  local->shape = unit->shapes[output];
  if (!size_of(tensor->type, local->shape.rank, local->shape.dims, &bytes))
    return fail(&unit->node, "output %d: no tensor is of that shape", output);
  free(local->memory);
  local->memory = aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT);
  local->bound = (EdgekitTensor){
      .type = tensor->type,
      .rank = local->shape.rank,
      .dims = local->shape.dims,
      .data = local->memory,
      .bytes = bytes,
      .scale = tensor->params.scale,
      .zero_point = tensor->params.zero_point,
  };
  return local->memory ? EDGEKIT_OK : fail(&unit->node, "out of memory");
}

int edgekit_prepare_unit(TfLiteContext *context, Unit *unit) {
  EdgekitNode *node = &unit->node;
  int count = node->input_count + node->output_count;
  unit->context = context;
  if (unit->broken) return EDGEKIT_ERROR; /* which was told */
  for (int i = 0; i < count; i++) {
    if (bind(unit, i, i < node->input_count, true)) return EDGEKIT_ERROR;
    if (i < node->input_count && find_local(unit, unit->tensors[i])) node->inputs[i].data = NULL;
    unit->bytes[i] = node->inputs[i].bytes;
  }
  for (int i = 0; i < node->output_count; i++) {
    const TfLiteTensor *tensor = &context->tensors[unit->tensors[node->input_count + i]];
    if (!element_bytes(tensor->type)) return fail(node, "output %d: its type, number %d, is not supported", i, tensor->type);
    if (resize(node, i, tensor->dims ? tensor->dims->size : 0, tensor->dims ? tensor->dims->data : NULL)) return EDGEKIT_ERROR;
  }
  if (unit->op->prepare(node)) return EDGEKIT_ERROR;
  for (int i = 0; i < node->output_count; i++) {
    Local *local = find_local(unit, unit->tensors[node->input_count + i]);
    if (local ? give_memory(unit, local, i) : give_shape(unit, i)) return EDGEKIT_ERROR;
  }
  for (int i = 0; i < count; i++) {
    if (bind(unit, i, true, true)) return EDGEKIT_ERROR;
    if (i >= node->input_count ? !has_shape(&node->inputs[i], &unit->shapes[i - node->input_count])
                               : node->inputs[i].bytes != unit->bytes[i])
      return fail(node, "an output is the same tensor as an input or another output");
    unit->bytes[i] = node->inputs[i].bytes;
  }
  return EDGEKIT_OK;
}

int edgekit_invoke_unit(TfLiteContext *context, Unit *unit) {
  EdgekitNode *node = &unit->node;
  unit->context = context;
  for (int i = 0; i < node->input_count + node->output_count; i++) {
    if (bind(unit, i, true, false)) return EDGEKIT_ERROR;
    bool missing = !node->inputs[i].data && node->inputs[i].bytes;
    if (missing || node->inputs[i].bytes != unit->bytes[i])
      return fail(node, "%s %d %s", i < node->input_count ? "input" : "output",
                  i < node->input_count ? i : i - node->input_count,
                  missing ? "has no data" : "is not as large as it was prepared");
  }
  return unit->op->invoke(node) ? EDGEKIT_ERROR : EDGEKIT_OK;
}
