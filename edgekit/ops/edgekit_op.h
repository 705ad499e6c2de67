/* A custom operator of TFLite, in C: what it is given, what it gives, and how EdgeKit finds it.
 *
 * Write three functions, name them in EDGEKIT_OPS, and compile the file with `edgekit ops build`; docs/operators.md
 * takes you through it. The functions are called by the thread that runs the interpreter, one at a time for a node.
 */
#ifndef EDGEKIT_OP_H
#define EDGEKIT_OP_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A library compiled for another number is refused. */
#define EDGEKIT_OP_ABI 1

enum { EDGEKIT_OK = 0, EDGEKIT_ERROR = 1 };

/* Types of tensors, numbered as TfLiteType in TensorFlow Lite's common.h. */
enum {
  EDGEKIT_NONE = 0, /* an optional input that is absent */
  EDGEKIT_FLOAT32 = 1,
  EDGEKIT_INT32 = 2,
  EDGEKIT_UINT8 = 3,
  EDGEKIT_INT64 = 4,
  EDGEKIT_BOOL = 6,
  EDGEKIT_INT16 = 7,
  EDGEKIT_INT8 = 9,
  EDGEKIT_FLOAT64 = 11
};

typedef struct EdgekitTensor {
  int32_t type;
  int32_t rank;
  const int32_t *dims;
  void *data; /* while preparing there is none, but for a constant */
  size_t bytes;
  float scale; /* real = (q - zero_point) * scale; 0 for a tensor that is not quantized */
  int32_t zero_point;
  int32_t constant; /* 1: the model holds its data */
} EdgekitTensor;

enum { EDGEKIT_INTEGER = 1, EDGEKIT_REAL = 2, EDGEKIT_TEXT = 3 };

/* One of the operator's options in the model: whole numbers and truth values, other numbers, or text. */
typedef struct EdgekitOption {
  const char *key;
  int32_t kind;
  int64_t integer;
  double real;
  const char *text;
} EdgekitOption;

/* A node of the graph. `state` is the operator's own, NULL at first; `user` is that of its EdgekitOp. */
typedef struct EdgekitNode EdgekitNode;
struct EdgekitNode {
  EdgekitTensor *inputs, *outputs;
  int32_t input_count, output_count;
  const EdgekitOption *options;
  int32_t option_count;
  const void *blob; /* the options as they are in the model, whatever they are */
  size_t blob_bytes;
  void *state, *user;
  int32_t index;   /* of the node in the graph */
  int32_t version; /* that the model asks for: its option "version", 1 without */
  /* Sets the shape of an output while preparing; one that is not set keeps the shape it has in the model. */
  int (*resize)(EdgekitNode *node, int output, int rank, const int32_t *dims);
  /* Says what is wrong, as printf; gives EDGEKIT_ERROR, to be returned. */
  int (*fail)(EdgekitNode *node, const char *format, ...);
};

typedef struct EdgekitOp {
  const char *name;
  int32_t version; /* the newest that it knows: it is given the nodes of this and of older ones */
  int (*init)(EdgekitNode *node);    /* once: reads the options; may be NULL. There are no tensors yet */
  int (*prepare)(EdgekitNode *node); /* before the first call and whenever a shape changes: checks inputs, sets shapes */
  int (*invoke)(EdgekitNode *node);  /* works */
  void (*free)(EdgekitNode *node);   /* once, also after an init that failed: releases `state`; may be NULL */
  void *user;
} EdgekitOp;

typedef struct EdgekitLibrary {
  int32_t abi;
  int32_t op_count;
  const EdgekitOp *const *ops;
} EdgekitLibrary;

#if defined(__GNUC__)
#define EDGEKIT_EXPORT __attribute__((visibility("default")))
#else
#define EDGEKIT_EXPORT
#endif

/* EDGEKIT_OPS(&mish, &swish) exports operators: constants of type EdgekitOp. */
#define EDGEKIT_OPS(...)                                                                              \
  EDGEKIT_EXPORT const EdgekitLibrary *edgekit_library(void) {                                        \
    static const EdgekitOp *const ops[] = {__VA_ARGS__};                                              \
    static const EdgekitLibrary library = {EDGEKIT_OP_ABI, (int32_t)(sizeof ops / sizeof *ops), ops}; \
    return &library;                                                                                  \
  }

/* The option `key`, NULL where the model does not have it. */
static inline const EdgekitOption *edgekit_option(const EdgekitNode *node, const char *key) {
  for (int32_t i = 0; i < node->option_count; i++)
    if (!strcmp(node->options[i].key, key)) return &node->options[i];
  return NULL;
}

static inline int64_t edgekit_integer(const EdgekitNode *node, const char *key, int64_t otherwise) {
  const EdgekitOption *option = edgekit_option(node, key);
  return option && option->kind == EDGEKIT_INTEGER ? option->integer : otherwise;
}

/* A whole number will do too. */
static inline double edgekit_real(const EdgekitNode *node, const char *key, double otherwise) {
  const EdgekitOption *option = edgekit_option(node, key);
  if (!option || option->kind == EDGEKIT_TEXT) return otherwise;
  return option->kind == EDGEKIT_REAL ? option->real : (double)option->integer;
}

static inline const char *edgekit_text(const EdgekitNode *node, const char *key, const char *otherwise) {
  const EdgekitOption *option = edgekit_option(node, key);
  return option && option->kind == EDGEKIT_TEXT ? option->text : otherwise;
}

/* Number of elements. */
static inline size_t edgekit_size(const EdgekitTensor *tensor) {
  size_t size = 1;
  for (int32_t i = 0; i < tensor->rank; i++) size *= (size_t)tensor->dims[i];
  return size;
}

#ifdef __cplusplus
}
#endif

#endif
