// libcudnn: convolutions find one engine, which wants the configured workspace. Both of torch's ways are there: the
// graph interface, and the legacy one (TORCH_CUDNN_V8_API_DISABLED=1). Numbers of attributes are cuDNN's.
#include <cstddef>

#include "card.h"

using namespace phantom;

PHANTOM size_t cudnnGetVersion() { return 90501; }
PHANTOM size_t cudnnGetCudartVersion() { return 12060; }
PHANTOM const char* cudnnGetErrorString(int) { return "a status of the phantom card"; }
PHANTOM void cudnnGetLastErrorString(char* out, size_t room) {
  if (room) *out = 0;
}
PHANTOM int cudnnGetProperty(int which, int* value) {
  const int version[] = {9, 5, 1};
  *value = version[which];
  return 0;
}
PHANTOM int cudnnCreate(void** handle) {
  make_context(current_card());
  *handle = new_handle();
  return 0;
}

#define MAKES_A_HANDLE(function) \
  PHANTOM int function(void** made) { \
    *made = new_handle(); \
    return 0; \
  }
MAKES_A_HANDLE(cudnnCreateTensorDescriptor)
MAKES_A_HANDLE(cudnnCreateFilterDescriptor)
MAKES_A_HANDLE(cudnnCreateConvolutionDescriptor)
MAKES_A_HANDLE(cudnnCreateActivationDescriptor)
MAKES_A_HANDLE(cudnnCreateDropoutDescriptor)
MAKES_A_HANDLE(cudnnCreateRNNDescriptor)
MAKES_A_HANDLE(cudnnCreateRNNDataDescriptor)
MAKES_A_HANDLE(cudnnCreatePoolingDescriptor)
MAKES_A_HANDLE(cudnnCreateCTCLossDescriptor)
MAKES_A_HANDLE(cudnnCreateSpatialTransformerDescriptor)

PHANTOM int cudnnDropoutGetStatesSize(void*, size_t* nbytes) {
  *nbytes = MIB;
  return 0;
}

// --- the graph interface ---------------------------------------------------------------------------------------------

enum { HEURISTICS_RESULTS = 202, CONFIG_ENGINE = 300, PLAN_WORKSPACE = 402, ENGINE_INDEX = 1301 };

PHANTOM int cudnnBackendCreateDescriptor(int, void** made) {
  *made = new_handle();
  return 0;
}
PHANTOM int cudnnBackendGetAttribute(void*, int attribute, int, long long room, long long* count, void* out) {
  const bool is_there = attribute == HEURISTICS_RESULTS || attribute == CONFIG_ENGINE || attribute == PLAN_WORKSPACE ||
                        attribute == ENGINE_INDEX;
  if (count) *count = is_there;
  if (!is_there || room < 1 || !out) return 0;
  if (attribute == PLAN_WORKSPACE) *(long long*)out = (long long)config().workspace_bytes;
  if (attribute == ENGINE_INDEX) *(long long*)out = 1;
  return 0;  // the other two are descriptors, which the caller has made
}

// --- the legacy interface --------------------------------------------------------------------------------------------

struct Performance {
  int algorithm, status;
  float milliseconds;
  size_t workspace_bytes;
  int is_deterministic, math, reserved[3];
};
static int one_algorithm(int room, int* count, Performance* out) {
  *count = room > 0;
  if (room > 0) *out = {1, 0, 1.0f, config().workspace_bytes, 1, 0, {}};
  return 0;
}
using P = void*;  // a handle or a descriptor

#define ASKS_HEURISTICS(function) \
  PHANTOM int function(P, P, P, P, P, int room, int* count, Performance* out) { return one_algorithm(room, count, out); }
ASKS_HEURISTICS(cudnnGetConvolutionForwardAlgorithm_v7)
ASKS_HEURISTICS(cudnnGetConvolutionBackwardDataAlgorithm_v7)
ASKS_HEURISTICS(cudnnGetConvolutionBackwardFilterAlgorithm_v7)

#define TRIES_ALL(function) \
  PHANTOM int function(P, P, P, P, P, P, P, P, int room, int* count, Performance* out, P, size_t) { \
    return one_algorithm(room, count, out); \
  }
TRIES_ALL(cudnnFindConvolutionForwardAlgorithmEx)
TRIES_ALL(cudnnFindConvolutionBackwardDataAlgorithmEx)
TRIES_ALL(cudnnFindConvolutionBackwardFilterAlgorithmEx)

#define TELLS_WORKSPACE(function) \
  PHANTOM int function(P, P, P, P, P, int, size_t* nbytes) { \
    *nbytes = config().workspace_bytes; \
    return 0; \
  }
TELLS_WORKSPACE(cudnnGetConvolutionForwardWorkspaceSize)
TELLS_WORKSPACE(cudnnGetConvolutionBackwardDataWorkspaceSize)
TELLS_WORKSPACE(cudnnGetConvolutionBackwardFilterWorkspaceSize)

// --- batch normalisation: no workspace; a plain one reserves nothing with the real library either --------------------

PHANTOM int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    P, int, int, P, P, P, P, P, size_t* nbytes) {
  *nbytes = 0;
  return 0;
}
PHANTOM int cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    P, int, int, P, P, P, P, P, P, P, size_t* nbytes) {
  *nbytes = 0;
  return 0;
}
PHANTOM int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(P, int, int, P, P, size_t* nbytes) {
  *nbytes = 0;
  return 0;
}
