/* Feeds the library of custom operators with what no converter makes: options with bytes changed, shapes, types and sizes
 * of any kind, nodes that name tensors that are not there. Compiled with AddressSanitizer and UndefinedBehaviorSanitizer
 * by test_ops_safety.py, together with the library; plays the interpreter's part, which would itself break on most of it.
 *
 * fuzz_ops SEEDS COUNT NUMBER: SEEDS are options as a converter writes them, each as a line "NAME FFT HOP LENGTH" and so
 * many bytes, the numbers those of a front end; COUNT rounds, of random numbers that begin with NUMBER.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tflite.h"

enum { MAX_SEEDS = 16, MAX_TENSORS = 24, MAX_NODES = 4, MAX_BYTES = 1 << 18, MAX_MEMORY = 1 << 22 };

typedef struct Seed {
  char name[64];
  int fft, hop, length;
  unsigned char *bytes;
} Seed;

static Seed seeds[MAX_SEEDS];
static int seed_count;
static TfLiteTensor tensors[MAX_TENSORS];
static int tensor_count, node_count;
static TfLiteNode nodes[MAX_NODES];
static TfLiteRegistration registrations[MAX_NODES];
static TfLiteIntArray *plan;
static uint64_t state;
static long prepared, invoked, refused;

TfLiteDelegate *tflite_plugin_create_delegate(char **, char **, size_t, void (*)(const char *));
void tflite_plugin_destroy_delegate(TfLiteDelegate *);

static uint32_t any(void) { /* xorshift64* (Vigna, 2016) */
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (uint32_t)(state * 0x2545F4914F6CDD1DULL >> 32);
}

static int below(int limit) { return (int)(any() % (uint32_t)limit); }
static bool once_in(int many) { return below(many) == 0; }

static TfLiteIntArray *new_array(int size) {
  TfLiteIntArray *array = malloc(sizeof *array + (size_t)size * sizeof(int));
  array->size = size;
  return array;
}

static size_t type_bytes(int type) {
  static const size_t bytes[] = {0, 4, 4, 1, 8, 0, 1, 2, 8, 1, 2, 8};
  return type >= 0 && type < 12 ? bytes[type] : 0;
}

/* False where an interpreter would give no memory. */
static bool fill(TfLiteTensor *tensor, bool lie) {
  double size = (double)type_bytes(tensor->type);
  for (int i = 0; i < tensor->dims->size; i++) size *= tensor->dims->data[i];
  free(tensor->data);
  tensor->data = NULL;
  tensor->bytes = 0;
  if (size < 0 || size > MAX_BYTES) return false;
  tensor->bytes = (size_t)size;
  if (lie) tensor->bytes = tensor->bytes / 2 + (size_t)below(9);
  tensor->data = malloc(tensor->bytes);
  for (size_t i = 0; i < tensor->bytes; i++) ((unsigned char *)tensor->data)[i] = (unsigned char)any();
  if (tensor->type == 1 && !once_in(8)) /* mostly numbers of the size that sound has */
    for (size_t i = 0; i < tensor->bytes / 4; i++) ((float *)tensor->data)[i] = (float)below(2001) / 1000.f - 1.f;
  return true;
}

static int resize(TfLiteContext *context, TfLiteTensor *tensor, TfLiteIntArray *dims) {
  (void)context;
  free(tensor->dims);
  tensor->dims = dims;
  return fill(tensor, false) ? kTfLiteOk : kTfLiteError;
}

static void report(TfLiteContext *context, const char *format, ...) {
  char text[4096];
  (void)context;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  refused++;
}

static int get_plan(TfLiteContext *context, TfLiteIntArray **given) {
  (void)context;
  *given = plan;
  return kTfLiteOk;
}

static int get_node(TfLiteContext *context, int index, TfLiteNode **node, TfLiteRegistration **registration) {
  (void)context;
  if (index < 0 || index >= node_count) return kTfLiteError;
  *node = &nodes[index];
  *registration = &registrations[index];
  return kTfLiteOk;
}

static int replace(TfLiteContext *context, TfLiteRegistration kernel, const TfLiteIntArray *claimed, TfLiteDelegate *delegate) {
  TfLiteIntArray *inputs = new_array(0), *outputs = new_array(tensor_count), *members = new_array(claimed->size);
  memcpy(members->data, claimed->data, (size_t)claimed->size * sizeof(int));
  outputs->size = 0;
  bool all = once_in(2); /* or some stay between the nodes */
  for (int i = 0; i < tensor_count; i++)
    if (all || once_in(2)) outputs->data[outputs->size++] = i;
  TfLiteDelegateParams given = {delegate, members, inputs, outputs};
  TfLiteNode piece = {.inputs = inputs, .outputs = outputs};
  piece.user_data = kernel.init(context, (const char *)&given, 0);
  for (int round = 0; round < 2; round++) {
    if (kernel.prepare(context, &piece) != kTfLiteOk) break;
    prepared++;
    for (int i = 0; i < tensor_count; i++)
      if (!tensors[i].data && tensors[i].bytes) fill(&tensors[i], false);
    if (kernel.invoke(context, &piece) != kTfLiteOk) break;
    invoked++;
    if (once_in(2)) break;
    int changed = below(tensor_count); /* as after resize_tensor_input, or without anyone having told */
    if (tensors[changed].dims->size) tensors[changed].dims->data[0] = below(40);
    fill(&tensors[changed], once_in(4));
    if (once_in(2)) kernel.invoke(context, &piece);
  }
  if (piece.user_data) kernel.free(context, piece.user_data);
  free(inputs);
  free(outputs);
  free(members);
  return kTfLiteOk;
}

static void read_seeds(const char *path) {
  FILE *file = fopen(path, "rb");
  while (file && seed_count < MAX_SEEDS) {
    Seed *seed = &seeds[seed_count];
    if (fscanf(file, "%63s %d %d %d%*c", seed->name, &seed->fft, &seed->hop, &seed->length) != 4) break;
    seed->bytes = malloc((size_t)seed->length + 1);
    if (fread(seed->bytes, 1, (size_t)seed->length, file) != (size_t)seed->length) exit(2);
    seed_count++;
  }
  if (!seed_count) exit(2);
  fclose(file);
}

static void make_tensor(TfLiteTensor *tensor) {
  static const int types[] = {1, 1, 1, 1, 1, 7, 9, 0, 2, 3, 4, 5, 6, 8, 10, 11, 15};
  *tensor = (TfLiteTensor){.type = types[below(once_in(3) ? 17 : 7)]};
  int rank = below(once_in(20) ? 12 : 4);
  tensor->dims = new_array(rank);
  for (int i = 0; i < rank; i++) {
    tensor->dims->data[i] = once_in(3) ? 1 : below(once_in(3) ? 3000 : 20);
    if (once_in(100)) tensor->dims->data[i] = (int)any();
  }
  tensor->params.scale = once_in(4) ? 0.f : (float)below(100) / 50.f;
  tensor->params.zero_point = (int)below(300) - 150;
  tensor->allocation_type = once_in(3) ? kTfLiteMmapRo : 2;
  fill(tensor, once_in(50));
  if (once_in(100)) {
    free(tensor->data);
    tensor->data = NULL;
  }
}

static int new_tensor(int type, int rank, const int *dims) {
  if (tensor_count == MAX_TENSORS) return below(tensor_count);
  TfLiteTensor *tensor = &tensors[tensor_count];
  *tensor = (TfLiteTensor){.type = type, .allocation_type = once_in(3) ? kTfLiteMmapRo : 2};
  tensor->params.scale = type == 9 || once_in(4) ? (float)(1 + below(100)) / 50.f : 0.f;
  tensor->params.zero_point = type == 9 ? (int)below(300) - 150 : 0;
  tensor->dims = new_array(rank);
  memcpy(tensor->dims->data, dims, (size_t)rank * sizeof *dims);
  fill(tensor, false);
  return tensor_count++;
}

/* What the operator of the seed takes and gives, more or less. */
static void fit(const Seed *seed, TfLiteNode *node) {
  int *in = node->inputs->data, *out = node->outputs->data, dims[4] = {1, 1, 1, 1};
  node->inputs->size = node->outputs->size = 0;
  if (!strcmp(seed->name, "EdgekitLayerNorm")) {
    int rank = 1 + below(4), type = once_in(2) ? 9 : 1;
    for (int i = 0; i < rank; i++) dims[i] = 1 + below(9);
    in[node->inputs->size++] = new_tensor(type, rank, dims);
    int channels = dims[rank - 1];
    in[node->inputs->size++] = new_tensor(1, 1, &channels);
    in[node->inputs->size++] = new_tensor(1, 1, &channels);
    out[node->outputs->size++] = new_tensor(type, rank, dims);
    return;
  }
  bool stream = once_in(2), flat = !stream && once_in(2);
  dims[!flat] = stream ? seed->hop * (1 + below(4)) : 1 + below(3000);
  in[node->inputs->size++] = new_tensor(once_in(3) ? 7 : 1, flat ? 1 : 2, dims);
  out[node->outputs->size++] = new_tensor(1, 0, dims);
  if (!stream) return;
  dims[1] = 1 + seed->fft / 2;
  int of_state = new_tensor(1, 2, dims);
  if (once_in(2) && tensors[of_state].data) memset(tensors[of_state].data, 0, tensors[of_state].bytes);
  in[node->inputs->size++] = of_state;
  out[node->outputs->size++] = new_tensor(1, 2, dims);
}

static void spoil(TfLiteIntArray *list) {
  if (list->size && once_in(12)) list->data[below(list->size)] = once_in(4) ? (once_in(2) ? -1 : (int)any()) : below(tensor_count);
  if (once_in(40)) list->size = below(5);
}

static void make_node(int index, unsigned char **blob) {
  const Seed *seed = &seeds[below(seed_count)];
  TfLiteNode *node = &nodes[index];
  *node = (TfLiteNode){.inputs = new_array(5), .outputs = new_array(5)};
  for (int i = 0; i < 5; i++) node->inputs->data[i] = node->outputs->data[i] = below(tensor_count);
  fit(seed, node);
  spoil(node->inputs);
  spoil(node->outputs);
  int length = seed->length;
  *blob = malloc((size_t)length + 1);
  memcpy(*blob, seed->bytes, (size_t)length);
  for (int changes = once_in(2) ? 0 : 1 + below(3); changes-- > 0 && length;) {
    int at = once_in(4) ? length - 1 - below(length < 80 ? length : 80) : below(length);
    (*blob)[at] = once_in(2) ? (unsigned char)any() : (unsigned char)((*blob)[at] ^ 1u << below(8));
    if (once_in(10)) length = below(length + 1);
  }
  unsigned char *exact = malloc((size_t)length + !length); /* so that reading past the end is seen */
  memcpy(exact, *blob, (size_t)length);
  free(*blob);
  *blob = exact;
  node->custom_initial_data = exact;
  node->custom_initial_data_size = once_in(200) ? -1 : length;
  registrations[index] = (TfLiteRegistration){
      .builtin_code = once_in(30) ? 3 : kTfLiteBuiltinCustom,
      .custom_name = once_in(100) ? NULL : seed->name,
      .version = 1,
  };
}

int main(int count_of_arguments, char **arguments) {
  if (count_of_arguments != 4) return 2;
  read_seeds(arguments[1]);
  long rounds = atol(arguments[2]);
  state = strtoull(arguments[3], NULL, 10) * 2654435761u + 88172645463325252ULL;
  for (long round = 0; round < rounds; round++) {
    unsigned char *blobs[MAX_NODES];
    tensor_count = 2 + below(3);
    node_count = once_in(2) ? 1 : 1 + below(MAX_NODES);
    for (int i = 0; i < tensor_count; i++) make_tensor(&tensors[i]);
    for (int i = 0; i < node_count; i++) make_node(i, &blobs[i]);
    plan = new_array(node_count);
    for (int i = 0; i < node_count; i++) plan->data[i] = i;
    TfLiteContext context = {(size_t)tensor_count, get_plan, tensors, NULL, resize, report, NULL, get_node, replace};
    TfLiteDelegate *delegate = tflite_plugin_create_delegate(NULL, NULL, 0, NULL);
    delegate->Prepare(&context, delegate);
    tflite_plugin_destroy_delegate(delegate);
    free(plan);
    for (int i = 0; i < node_count; i++) {
      free(nodes[i].inputs);
      free(nodes[i].outputs);
      free(blobs[i]);
    }
    for (int i = 0; i < tensor_count; i++) {
      free(tensors[i].dims);
      free(tensors[i].data);
    }
  }
  for (int i = 0; i < seed_count; i++) free(seeds[i].bytes);
  printf("%ld rounds, %ld prepared, %ld invoked, %ld refused\n", rounds, prepared, invoked, refused);
  return 0;
}
