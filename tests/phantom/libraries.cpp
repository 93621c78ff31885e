// cuBLAS, cuBLASLt, cuSOLVER, cuSPARSE, NVRTC and CUPTI: the few functions that do more than return success.
// build.py compiles this file once per library, with the library's name defined.
#include <cstring>

#include "card.h"

using namespace phantom;

#define MAKES_A_HANDLE(function) \
  PHANTOM int function(void** made) { \
    *made = new_handle(); \
    return 0; \
  }

#ifdef LIB_CUBLAS
PHANTOM int cublasCreate_v2(void** handle) {
  make_context(current_card());
  *handle = new_handle();
  return 0;
}
PHANTOM int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
PHANTOM int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}
PHANTOM int cublasGetVersion_v2(void*, int* version) {
  *version = 120604;
  return 0;
}
#endif

#ifdef LIB_CUBLASLT
MAKES_A_HANDLE(cublasLtCreate)
MAKES_A_HANDLE(cublasLtMatmulPreferenceCreate)
PHANTOM int cublasLtMatmulDescCreate(void** made, int, int) {
  *made = new_handle();
  return 0;
}
PHANTOM int cublasLtMatrixLayoutCreate(void** made, int, unsigned long long, unsigned long long, long long) {
  *made = new_handle();
  return 0;
}
PHANTOM int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int wanted, void* results, int* found) {
  memset(results, 0, 96);  // one result: 64 bytes of algorithm, its workspace, its state, waves, reserve
  *found = wanted > 0;
  return 0;
}
#endif

#ifdef LIB_CUSOLVER
MAKES_A_HANDLE(cusolverDnCreate)
#endif

#ifdef LIB_CUSPARSE
MAKES_A_HANDLE(cusparseCreate)
PHANTOM const char* cusparseGetErrorString(int) { return "a status of the phantom card"; }
#endif

#ifdef LIB_CUPTI
PHANTOM int cuptiGetVersion(unsigned* version) {
  *version = 24;
  return 0;
}
PHANTOM int cuptiGetResultString(int, const char** text) {
  *text = "a result of the phantom card";
  return 0;
}
#endif

#ifdef LIB_NVRTC
static int one_byte(size_t* nbytes) {
  *nbytes = 1;
  return 0;
}
static int empty_text(char* out) {
  *out = 0;
  return 0;
}
PHANTOM int nvrtcVersion(int* major, int* minor) {
  *major = 12;
  *minor = 6;
  return 0;
}
PHANTOM const char* nvrtcGetErrorString(int) { return "a result of the phantom card"; }
PHANTOM int nvrtcCreateProgram(void** program, const char*, const char*, int, void*, void*) {
  *program = new_handle();
  return 0;
}
PHANTOM int nvrtcGetCUBINSize(void*, size_t* nbytes) { return one_byte(nbytes); }
PHANTOM int nvrtcGetPTXSize(void*, size_t* nbytes) { return one_byte(nbytes); }
PHANTOM int nvrtcGetProgramLogSize(void*, size_t* nbytes) { return one_byte(nbytes); }
PHANTOM int nvrtcGetProgramLog(void*, char* out) { return empty_text(out); }
PHANTOM int nvrtcGetCUBIN(void*, char* out) { return empty_text(out); }
PHANTOM int nvrtcGetPTX(void*, char* out) { return empty_text(out); }
PHANTOM int nvrtcGetLoweredName(void*, const char*, const char** name) {
  *name = "kernel";
  return 0;
}
#endif
