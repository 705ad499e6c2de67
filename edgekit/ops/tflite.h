/* What an external delegate needs of TensorFlow Lite's C interface, declared here so that nothing has to be installed to
 * build it.
 *
 * After tensorflow/lite/core/c/common.h, the same up to here in TensorFlow 2.14 (tflite-runtime 2.14) and in LiteRT 2.3:
 * fields are only ever added at the end. Of TfLiteContext, TfLiteTensor and TfLiteDelegate only the beginning is here:
 * the interpreter makes them, or reads no further. TfLiteRegistration is whole, as it is handed over by value: 88 bytes
 * in either on 64 bits.
 */
#ifndef EDGEKIT_TFLITE_H
#define EDGEKIT_TFLITE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { kTfLiteOk = 0, kTfLiteError = 1 };
enum { kTfLiteBuiltinCustom = 32 };
enum { kTfLiteMmapRo = 1, kTfLitePersistentRo = 6 };
enum { kTfLiteDelegateFlagsAllowDynamicTensors = 1 };

typedef struct TfLiteIntArray {
  int size;
  int data[];
} TfLiteIntArray;

typedef struct TfLiteTensor {
  int type;
  void *data;
  TfLiteIntArray *dims;
  struct {
    float scale;
    int32_t zero_point;
  } params;
  int allocation_type;
  size_t bytes;
  const void *allocation;
  const char *name;
  void *delegate;
  int buffer_handle;
  bool data_is_stale, is_variable;
  struct {
    int type;
    void *params;
  } quantization;
  void *sparsity;
  const TfLiteIntArray *dims_signature;
} TfLiteTensor;

typedef struct TfLiteNode {
  TfLiteIntArray *inputs, *outputs, *intermediates, *temporaries;
  void *user_data, *builtin_data;
  const void *custom_initial_data;
  int custom_initial_data_size;
  void *delegate;
  bool might_have_side_effect;
} TfLiteNode;

typedef struct TfLiteContext TfLiteContext;
typedef struct TfLiteDelegate TfLiteDelegate;

typedef struct TfLiteRegistration {
  void *(*init)(TfLiteContext *, const char *buffer, size_t length);
  void (*free)(TfLiteContext *, void *user_data);
  int (*prepare)(TfLiteContext *, TfLiteNode *);
  int (*invoke)(TfLiteContext *, TfLiteNode *);
  const char *(*profiling_string)(const TfLiteContext *, const TfLiteNode *);
  int32_t builtin_code;
  const char *custom_name;
  int version;
  void *registration_external;
  void *async_kernel;
  uint64_t inplace_operator;
} TfLiteRegistration;

struct TfLiteContext {
  size_t tensors_size;
  int (*GetExecutionPlan)(TfLiteContext *, TfLiteIntArray **plan);
  TfLiteTensor *tensors;
  void *impl_;
  int (*ResizeTensor)(TfLiteContext *, TfLiteTensor *, TfLiteIntArray *new_size); /* takes `new_size` */
  void (*ReportError)(TfLiteContext *, const char *format, ...);
  int (*AddTensors)(TfLiteContext *, int count, int *first);
  int (*GetNodeAndRegistration)(TfLiteContext *, int index, TfLiteNode **, TfLiteRegistration **);
  int (*ReplaceNodeSubsetsWithDelegateKernels)(TfLiteContext *, TfLiteRegistration, const TfLiteIntArray *nodes,
                                               TfLiteDelegate *);
};

struct TfLiteDelegate {
  void *data_;
  int (*Prepare)(TfLiteContext *, TfLiteDelegate *);
  void *CopyFromBufferHandle, *CopyToBufferHandle, *FreeBufferHandle;
  int64_t flags;
  void *opaque_delegate_builder;
};

/* What the kernel of a piece is given as `buffer`. */
typedef struct TfLiteDelegateParams {
  TfLiteDelegate *delegate;
  TfLiteIntArray *nodes_to_replace, *input_tensors, *output_tensors;
} TfLiteDelegateParams;

#endif
