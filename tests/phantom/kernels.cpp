// libcudart, second half: kernels and errors. No kernel runs but one: filling a few elements with a number, so that
// scalars such as a loss scale hold what they were set to.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "card.h"
#include "errors.h"

using namespace phantom;
using Stream = void*;

// --- errors ----------------------------------------------------------------------------------------------------------

static thread_local int last_error = OK;

int remember(int error) { return last_error = error; }

PHANTOM int cudaGetLastError() {
  const int error = last_error;
  last_error = OK;
  return error;
}
PHANTOM int cudaPeekAtLastError() { return last_error; }

PHANTOM const char* cudaGetErrorName(int error) {
  switch (error) {
    case OK: return "cudaSuccess";
    case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
    default: return "cudaErrorUnknown";
  }
}
PHANTOM const char* cudaGetErrorString(int error) {
  switch (error) {
    case OK: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case INVALID_CONFIGURATION: return "invalid configuration argument";
    case NO_DEVICE: return "no CUDA-capable device is detected";
    case INVALID_DEVICE: return "invalid device ordinal";
    case ALREADY_REGISTERED: return "part or all of the requested memory range is already mapped";
    default: return "an error of the phantom card";
  }
}

// --- kernels by name -------------------------------------------------------------------------------------------------

struct Kernel {
  const char* name;
  long launches;
};
static std::mutex lock;
// Never destroyed: filled before main() and read after it.
static std::unordered_map<const void*, Kernel>& kernels() {
  static auto* all = new std::unordered_map<const void*, Kernel>;
  return *all;
}

// PHANTOM_KERNELS names a file: at the end of the process, how often each kernel was launched, most often first.
static void write_launches() {
  FILE* file = fopen(getenv("PHANTOM_KERNELS"), "a");
  if (!file) return;
  std::vector<Kernel> rows;
  for (auto& [stub, kernel] : kernels())
    if (kernel.launches) rows.push_back(kernel);
  std::sort(rows.begin(), rows.end(), [](const Kernel& a, const Kernel& b) { return a.launches > b.launches; });
  for (auto& row : rows) fprintf(file, "%ld %s\n", row.launches, row.name);
  fclose(file);
}

static const char* note_launch(const void* stub) {
  static const bool counts = getenv("PHANTOM_KERNELS") && !atexit(write_launches);
  std::lock_guard<std::mutex> guard(lock);
  auto found = kernels().find(stub);
  if (found == kernels().end()) return "?";
  found->second.launches += counts;
  return found->second.name;
}

PHANTOM void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  std::lock_guard<std::mutex> guard(lock);
  kernels()[stub] = {name, 0};
}
PHANTOM void** __cudaRegisterFatBinary(void*) { return (void**)new_handle(); }
PHANTOM void __cudaRegisterFatBinaryEnd(void**) {}
PHANTOM void __cudaUnregisterFatBinary(void**) {}
PHANTOM char __cudaInitModule(void**) { return 1; }
PHANTOM void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// --- launches --------------------------------------------------------------------------------------------------------

struct Extent {
  unsigned x, y, z;
};
struct Call {
  Extent grid, block;
  size_t shared_bytes;
  Stream stream;
};
static thread_local std::vector<Call> pending_calls;

PHANTOM unsigned __cudaPushCallConfiguration(Extent grid, Extent block, size_t shared_bytes, Stream stream) {
  pending_calls.push_back({grid, block, shared_bytes, stream});
  return OK;
}
PHANTOM int __cudaPopCallConfiguration(Extent* grid, Extent* block, size_t* shared_bytes, void* stream) {
  if (pending_calls.empty()) return remember(INVALID_VALUE);
  const Call call = pending_calls.back();
  pending_calls.pop_back();
  *grid = call.grid;
  *block = call.block;
  *shared_bytes = call.shared_bytes;
  *(Stream*)stream = call.stream;
  return OK;
}

static bool is_allowed(Extent grid, Extent block, size_t shared_bytes) {
  const bool any = grid.x && grid.y && grid.z && block.x && block.y && block.z;
  const bool grid_fits = grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  const bool block_fits = block.x <= 1024 && block.y <= 1024 && block.z <= 64;
  return any && grid_fits && block_fits && size_t(block.x) * block.y * block.z <= 1024 && shared_bytes <= (96u << 10);
}

// Bytes per element of a fill kernel by the type in its mangled name; 0: none that is filled here.
static size_t element_bytes(const char* mangled_type) {
  switch (*mangled_type) {
    case 'b': case 'h': case 'a': return 1;
    case 's': return 2;
    case 'f': case 'i': case 'j': return 4;
    case 'd': case 'l': case 'm': return 8;
    default:
      return !strncmp(mangled_type, "N3c104HalfE", 11) || !strncmp(mangled_type, "N3c108BFloat16E", 15) ? 2 : 0;
  }
}

static void fill_if_small(const char* kernel, void** arguments) {
  const char* functor = strstr(kernel, "FillFunctorI");
  const bool is_elementwise =
      strstr(kernel, "vectorized_elementwise_kernel") || strstr(kernel, "unrolled_elementwise_kernel");
  if (!functor || !is_elementwise) return;
  const size_t nbytes = element_bytes(functor + strlen("FillFunctorI"));
  const int count = *(int*)arguments[0];
  const void* value = arguments[1];
  char* to = *(char**)arguments[2];
  if (!nbytes || count <= 0 || count * nbytes > config().copy_limit_bytes || card_of(to) < 0) return;
  for (int i = 0; i < count; i++) copy(to + i * nbytes, value, nbytes);
}

PHANTOM int cudaLaunchKernel(
    const void* stub, Extent grid, Extent block, void** arguments, size_t shared_bytes, Stream) {
  make_context(current_card());
  const char* name = note_launch(stub);
  if (!is_allowed(grid, block, shared_bytes)) {
    fprintf(stderr, "phantom: launch refused: grid %u %u %u, block %u %u %u, %zu bytes shared: %s\n",
            grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes, name);
    return remember(INVALID_CONFIGURATION);
  }
  fill_if_small(name, arguments);
  return OK;
}
struct LaunchConfig {
  Extent grid, block;
  size_t shared_bytes;
  Stream stream;
  void* attributes;
  unsigned attribute_count;
};
PHANTOM int cudaLaunchKernelExC(const LaunchConfig* launch, const void* stub, void** arguments) {
  return cudaLaunchKernel(stub, launch->grid, launch->block, arguments, launch->shared_bytes, launch->stream);
}

struct FunctionAttributes {
  size_t shared_bytes, constant_bytes, local_bytes;
  int threads_per_block, registers, ptx_version, binary_version, cache_mode, dynamic_shared_bytes, carveout;
};
PHANTOM int cudaFuncGetAttributes(FunctionAttributes* out, const void*) {
  // torch's wheels hold kernels for 5.0 that run on all of 5.x
  const int architecture = config().major * 10 + (config().major == 5 ? 0 : config().minor);
  *out = {0, 0, 0, 1024, 32, architecture, architecture, 0, 48 << 10, -1};
  return OK;
}
PHANTOM int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int block_size, size_t, unsigned) {
  *blocks = block_size > 0 && block_size <= 1024 ? std::min(32, 2048 / block_size) : 1;
  return OK;
}
PHANTOM int cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int* blocks, const void* stub, int block_size, size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, block_size, shared_bytes, 0);
}
