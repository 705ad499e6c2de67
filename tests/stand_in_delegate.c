/* A delegate library as TFLite loads them, for devices that are not here. It takes float32 SOFTMAX and LOGISTIC, which it
 * computes, and what was compiled for the Edge TPU, of which it makes nothing but zeros. Option: winner=CLASS gives that
 * class everything.
 *
 * A file beside it with ".behaviour" behind its name says what goes wrong: "PLACE WHAT COUNT", where PLACE is create,
 * prepare or invoke, WHAT is fail, hang, crash, print or none (takes no operator), and COUNT is of the call. Behind
 * ".created" it leaves a line each time that it is loaded.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tflite.h"

enum { kFloat32 = 1, kLogistic = 14, kSoftmax = 25 };

static char place[16], what[16];
static long at, calls;
static int winner = -1;

static void read_behaviour(void) {
  Dl_info self;
  char path[4096];
  dladdr((void *)read_behaviour, &self);
  snprintf(path, sizeof path, "%s.created", self.dli_fname);
  FILE *file = fopen(path, "a");
  if (file) fputs("created\n", file), fclose(file);
  snprintf(path, sizeof path, "%s.behaviour", self.dli_fname);
  file = fopen(path, "r");
  if (!file) return;
  if (fscanf(file, "%15s %15s %ld", place, what, &at) < 2) *place = 0;
  fclose(file);
}

static bool goes_wrong(const char *where) {
  if (strcmp(place, where)) return false;
  if (!strcmp(what, "hang"))
    for (;;) pause();
  if (!strcmp(what, "crash")) raise(SIGSEGV);
  if (!strcmp(what, "print"))
    for (int i = 0; i < 1000; i++) fprintf(i % 2 ? stdout : stderr, "%063d\n", i);
  return !strcmp(what, "fail");
}

typedef struct Piece {
  int builtin, input, output;
} Piece;

static void *init(TfLiteContext *context, const char *buffer, size_t length) {
  const TfLiteDelegateParams *given = (const void *)buffer;
  (void)length;
  TfLiteNode *node;
  TfLiteRegistration *registration;
  Piece *piece = malloc(sizeof *piece);
  context->GetNodeAndRegistration(context, given->nodes_to_replace->data[0], &node, &registration);
  *piece = (Piece){registration->builtin_code, node->inputs->data[0], node->outputs->data[0]};
  return piece;
}

static void release(TfLiteContext *context, void *piece) {
  (void)context;
  free(piece);
}

static int prepare(TfLiteContext *context, TfLiteNode *node) {
  (void)node;
  if (!goes_wrong("prepare")) return kTfLiteOk;
  context->ReportError(context, "the stand-in does not like it");
  return kTfLiteError;
}

static int invoke(TfLiteContext *context, TfLiteNode *node) {
  const Piece *piece = node->user_data;
  const TfLiteTensor *input = &context->tensors[piece->input], *output = &context->tensors[piece->output];
  calls++;
  if ((calls == at || !strcmp(what, "print")) && goes_wrong("invoke")) {
    context->ReportError(context, "the stand-in has had enough");
    return kTfLiteError;
  }
  if (piece->builtin == kTfLiteBuiltinCustom) {
    memset(output->data, 0, output->bytes);
    return kTfLiteOk;
  }
  const float *x = input->data;
  float *y = output->data, sum = 0;
  int count = (int)(output->bytes / sizeof *y);
  for (int i = 0; i < count; i++) {
    y[i] = piece->builtin == kLogistic ? 1 / (1 + expf(-x[i])) : expf(x[i]);
    sum += y[i];
  }
  for (int i = 0; i < count; i++) {
    if (piece->builtin == kSoftmax) y[i] /= sum;
    if (winner >= 0) y[i] = i == winner;
  }
  return kTfLiteOk;
}

static int claim(TfLiteContext *context, TfLiteDelegate *delegate) {
  TfLiteIntArray *plan;
  if (context->GetExecutionPlan(context, &plan) != kTfLiteOk) return kTfLiteError;
  int taken[2] = {0, 0}; /* one node at most */
  for (int i = 0; i < plan->size; i++) {
    TfLiteNode *node;
    TfLiteRegistration *registration;
    if (context->GetNodeAndRegistration(context, plan->data[i], &node, &registration) != kTfLiteOk) return kTfLiteError;
    bool known = registration->builtin_code == kLogistic || registration->builtin_code == kSoftmax;
    bool real = known && context->tensors[node->inputs->data[0]].type == kFloat32;
    bool compiled = registration->custom_name && !strcmp(registration->custom_name, "edgetpu-custom-op");
    if (real || compiled) taken[0] = 1, taken[1] = plan->data[i];
  }
  if (!taken[0] || !strcmp(what, "none")) return kTfLiteOk;
  TfLiteRegistration kernel = {
      .init = init, .free = release, .prepare = prepare, .invoke = invoke, .custom_name = "StandIn", .version = 1};
  return context->ReplaceNodeSubsetsWithDelegateKernels(context, kernel, (TfLiteIntArray *)taken, delegate);
}

TfLiteDelegate *tflite_plugin_create_delegate(char **keys, char **values, size_t count, void (*report)(const char *)) {
  read_behaviour();
  for (uint32_t i = 0; i < (uint32_t)count; i++)
    if (!strcmp(keys[i], "winner")) winner = atoi(values[i]);
  if (goes_wrong("create")) {
    report("the stand-in is not plugged in");
    return NULL;
  }
  TfLiteDelegate *delegate = calloc(1, sizeof *delegate);
  delegate->Prepare = claim;
  delegate->flags = kTfLiteDelegateFlagsAllowDynamicTensors;
  return delegate;
}

void tflite_plugin_destroy_delegate(TfLiteDelegate *delegate) { free(delegate); }
