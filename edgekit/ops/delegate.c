/* Custom operators for TFLite, as an external delegate: `tflite_plugin_create_delegate` makes one that claims the custom
 * nodes of a graph that it has an operator for, and leaves all others alone.
 *
 * The wheels for Python have no way to register an operator (https://github.com/google-ai-edge/LiteRT/issues/7996), but
 * all load external delegates; so do benchmark_model (--external_delegate_path) and C++ programs. Options:
 *
 *   ops     path of a library made with edgekit_op.h; other keys that begin with "ops" name more of them
 *   kernel  address of an EdgekitOp in this process, in hexadecimal; likewise
 *
 * The operators shipped are always there. Of two of the same name the one given last counts.
 */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "unit.h"

extern const EdgekitOp edgekit_log_mel, edgekit_layer_norm;

/* ---- the operators that a delegate has ---- */

/* Kept by the delegate and by every piece that it was given, whichever goes last. */
typedef struct Registry {
  atomic_int users;
  int op_count, handle_count;
  const EdgekitOp **ops;
  void **handles;
} Registry;

static void release(Registry *registry) {
  if (!registry || atomic_fetch_sub(&registry->users, 1) > 1) return;
  for (int i = 0; i < registry->handle_count; i++) dlclose(registry->handles[i]);
  free(registry->handles);
  free(registry->ops);
  free(registry);
}

static bool add_op(Registry *registry, const EdgekitOp *op) {
  const EdgekitOp **ops = realloc(registry->ops, ((size_t)registry->op_count + 1) * sizeof *ops);
  if (!ops) return false;
  registry->ops = ops;
  ops[registry->op_count++] = op;
  return true;
}

static bool add_library(Registry *registry, const char *path, char *problem, size_t size) {
  void **handles = realloc(registry->handles, ((size_t)registry->handle_count + 1) * sizeof *handles);
  if (!handles) return false;
  registry->handles = handles;
  void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    snprintf(problem, size, "%s", dlerror());
    return false;
  }
  handles[registry->handle_count++] = handle;
  const EdgekitLibrary *(*list)(void);
  *(void **)&list = dlsym(handle, "edgekit_library");
  const EdgekitLibrary *library = list ? list() : NULL;
  if (!library) {
    snprintf(problem, size, "%s has no edgekit_library: name its operators in EDGEKIT_OPS", path);
    return false;
  }
  if (library->abi != EDGEKIT_OP_ABI) {
    snprintf(problem, size, "%s: expected edgekit_op.h number %d, got %d; build it again", path, EDGEKIT_OP_ABI, (int)library->abi);
    return false;
  }
  for (int32_t i = 0; i < library->op_count; i++)
    if (!library->ops[i]->name || !library->ops[i]->prepare || !library->ops[i]->invoke) {
      snprintf(problem, size, "%s: operator %d needs a name, prepare and invoke", path, (int)i);
      return false;
    } else if (!add_op(registry, library->ops[i])) {
      return false;
    }
  return true;
}

static const EdgekitOp *find_op(const Registry *registry, const char *name) {
  for (int i = registry->op_count; i-- > 0;)
    if (!strcmp(registry->ops[i]->name, name)) return registry->ops[i];
  return NULL;
}

/* ---- a piece of the graph: nodes that follow each other, with the tensors between them ---- */

typedef struct Piece {
  Registry *registry;
  Unit **units;
  int count;
  Locals locals;
} Piece;

static bool among(const TfLiteIntArray *list, int tensor) {
  for (int i = 0; list && i < list->size; i++)
    if (list->data[i] == tensor) return true;
  return false;
}

static void free_piece(TfLiteContext *context, void *user_data) {
  Piece *piece = user_data;
  if (!piece) return;
  for (int i = 0; i < piece->count; i++) edgekit_delete_unit(context, piece->units[i]);
  for (int i = 0; i < piece->locals.count; i++) free(piece->locals.of[i].memory);
  free(piece->locals.of);
  free(piece->units);
  release(piece->registry);
  free(piece);
}

static bool add_unit(TfLiteContext *context, Piece *piece, int index, const TfLiteIntArray *outputs) {
  TfLiteNode *node;
  TfLiteRegistration *registration;
  if (context->GetNodeAndRegistration(context, index, &node, &registration) != kTfLiteOk) return false;
  const EdgekitOp *op = registration->custom_name ? find_op(piece->registry, registration->custom_name) : NULL;
  if (!op) return false;
  size_t blob_bytes = node->custom_initial_data && node->custom_initial_data_size > 0 ? (size_t)node->custom_initial_data_size : 0;
  Unit *unit = edgekit_new_unit(context, op, index, node->custom_initial_data, blob_bytes);
  if (!unit) return false;
  piece->units[piece->count++] = unit;
  /* The node itself is not kept: the interpreter moves its nodes when it adds others. */
  if (edgekit_connect_unit(context, unit, node, &piece->locals)) return false;
  for (int i = 0; node->outputs && i < node->outputs->size; i++) {
    if (among(outputs, node->outputs->data[i])) continue;
    Local *locals = realloc(piece->locals.of, ((size_t)piece->locals.count + 1) * sizeof *locals);
    if (!locals) return false;
    piece->locals.of = locals;
    locals[piece->locals.count++] = (Local){.tensor = node->outputs->data[i]};
  }
  return true;
}

/* There is no way to fail here but to give nothing, which the interpreter hears of when it prepares. */
static void *init_piece(TfLiteContext *context, const char *buffer, size_t length) {
  const TfLiteDelegateParams *given = (const void *)buffer;
  (void)length; /* not told: 0 for a delegate's kernel */
  Piece *piece = calloc(1, sizeof *piece);
  if (!piece) return NULL;
  piece->registry = given->delegate->data_;
  atomic_fetch_add(&piece->registry->users, 1);
  piece->units = calloc((size_t)given->nodes_to_replace->size + 1, sizeof *piece->units);
  bool whole = piece->units;
  for (int i = 0; whole && i < given->nodes_to_replace->size; i++)
    whole = add_unit(context, piece, given->nodes_to_replace->data[i], given->output_tensors);
  if (whole) return piece;
  free_piece(context, piece);
  return NULL;
}

static int prepare_piece(TfLiteContext *context, TfLiteNode *node) {
  Piece *piece = node->user_data;
  if (!piece) {
    context->ReportError(context, "custom operators: out of memory, or a node that does not fit");
    return kTfLiteError;
  }
  for (int i = 0; i < piece->count; i++)
    if (edgekit_prepare_unit(context, piece->units[i])) return kTfLiteError;
  return kTfLiteOk;
}

static int invoke_piece(TfLiteContext *context, TfLiteNode *node) {
  Piece *piece = node->user_data;
  for (int i = 0; i < piece->count; i++)
    if (edgekit_invoke_unit(context, piece->units[i])) return kTfLiteError;
  return kTfLiteOk;
}

/* ---- the delegate ---- */

static int claim(TfLiteContext *context, TfLiteDelegate *delegate) {
  const Registry *registry = delegate->data_;
  TfLiteIntArray *plan;
  if (context->GetExecutionPlan(context, &plan) != kTfLiteOk) return kTfLiteError;
  /* The plan is the interpreter's, and changes while nodes are asked for. */
  size_t bytes = sizeof *plan + (size_t)plan->size * sizeof plan->data[0];
  TfLiteIntArray *nodes = malloc(bytes), *claimed = malloc(bytes);
  int status = nodes && claimed ? kTfLiteOk : kTfLiteError;
  if (status == kTfLiteOk) {
    memcpy(nodes, plan, bytes);
    claimed->size = 0;
  }
  for (int i = 0; status == kTfLiteOk && i < nodes->size; i++) {
    TfLiteNode *node;
    TfLiteRegistration *registration;
    status = context->GetNodeAndRegistration(context, nodes->data[i], &node, &registration);
    if (status == kTfLiteOk && registration->builtin_code == kTfLiteBuiltinCustom && registration->custom_name &&
        find_op(registry, registration->custom_name))
      claimed->data[claimed->size++] = nodes->data[i];
  }
  if (status == kTfLiteOk && claimed->size) {
    TfLiteRegistration kernel = {
        .init = init_piece,
        .free = free_piece,
        .prepare = prepare_piece,
        .invoke = invoke_piece,
        .custom_name = "EdgekitOps",
        .version = 1,
    };
    status = context->ReplaceNodeSubsetsWithDelegateKernels(context, kernel, claimed, delegate);
  }
  free(nodes);
  free(claimed);
  return status;
}

static bool begins(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

EDGEKIT_EXPORT void tflite_plugin_destroy_delegate(TfLiteDelegate *delegate) {
  if (!delegate) return;
  release(delegate->data_);
  free(delegate);
}

/* `report` is told why there is none. The count is an int to Python and a size_t to C++. */
EDGEKIT_EXPORT TfLiteDelegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) {
  char problem[512] = "out of memory";
  TfLiteDelegate *delegate = calloc(1, sizeof *delegate);
  Registry *registry = calloc(1, sizeof *registry);
  if (!delegate || !registry) {
    free(delegate);
    free(registry);
    if (report) report(problem);
    return NULL;
  }
  atomic_init(&registry->users, 1);
  delegate->data_ = registry;
  delegate->Prepare = claim;
  /* Without it a graph with operators that nobody knows is not even prepared before the delegate is asked. */
  delegate->flags = kTfLiteDelegateFlagsAllowDynamicTensors;
  bool whole = add_op(registry, &edgekit_log_mel) && add_op(registry, &edgekit_layer_norm);
  for (uint32_t i = 0; whole && i < (uint32_t)count; i++) {
    if (begins(keys[i], "ops")) {
      whole = add_library(registry, values[i], problem, sizeof problem);
    } else if (begins(keys[i], "kernel")) {
      const EdgekitOp *op = (const EdgekitOp *)(uintptr_t)strtoumax(values[i], NULL, 16);
      whole = op && add_op(registry, op);
      if (!op) snprintf(problem, sizeof problem, "%s: expected an address, got %s", keys[i], values[i]);
    } else {
      snprintf(problem, sizeof problem, "option %s: expected ops or kernel", keys[i]);
      whole = false;
    }
  }
  if (whole) return delegate;
  if (report) report(problem);
  tflite_plugin_destroy_delegate(delegate);
  return NULL;
}

/* ---- the operators shipped, as any library lists its own; and single operators for a resolver, as the calibrator of
 *      TensorFlow's converter has one ---- */

EDGEKIT_OPS(&edgekit_log_mel, &edgekit_layer_norm)

EDGEKIT_EXPORT void *edgekit_init(TfLiteContext *context, const EdgekitOp *op, const char *blob, size_t blob_bytes) {
  return edgekit_new_unit(context, op, -1, blob, blob_bytes);
}

EDGEKIT_EXPORT void edgekit_free(TfLiteContext *context, void *user_data) { edgekit_delete_unit(context, user_data); }

EDGEKIT_EXPORT int edgekit_prepare(TfLiteContext *context, TfLiteNode *node) {
  Unit *unit = node->user_data;
  return unit && !edgekit_connect_unit(context, unit, node, NULL) && !edgekit_prepare_unit(context, unit) ? kTfLiteOk : kTfLiteError;
}

EDGEKIT_EXPORT int edgekit_invoke(TfLiteContext *context, TfLiteNode *node) {
  return edgekit_invoke_unit(context, node->user_data) ? kTfLiteError : kTfLiteOk;
}
