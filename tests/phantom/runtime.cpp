// libcudart: the cards, their memory, copies, streams and events. Whatever is asked for is done when the call returns.
// Numbers of errors and attributes are the CUDA runtime's.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "card.h"
#include "errors.h"

using namespace phantom;
using Stream = void*;
using Event = void*;

static void make_current_context() { make_context(current_card()); }

// --- cards -----------------------------------------------------------------------------------------------------------

PHANTOM int cudaGetDeviceCount(int* count) {
  *count = visible_cards();
  return *count ? OK : remember(NO_DEVICE);
}
PHANTOM int cudaGetDevice(int* card) {
  *card = current_card();
  return OK;
}
PHANTOM int cudaSetDevice(int card) {
  if (card < 0 || card >= visible_cards()) return remember(INVALID_DEVICE);
  current_card() = card;
  make_context(card);
  return OK;
}
PHANTOM int cudaDeviceSynchronize() {
  make_current_context();
  return OK;
}
PHANTOM int cudaDriverGetVersion(int* version) {
  *version = 12060;
  return OK;
}
PHANTOM int cudaRuntimeGetVersion(int* version) {
  *version = 12060;
  return OK;
}
PHANTOM int cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return OK;
}
PHANTOM int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return OK;
}
PHANTOM int cudaDeviceGetPCIBusId(char* out, int room, int card) {
  snprintf(out, room, "0000:%02x:00.0", physical_index(card) + 1);
  return OK;
}
PHANTOM int cudaDeviceGetDefaultMemPool(void** pool, int) {
  *pool = new_handle();
  return OK;
}

// cudaDeviceProp of CUDA 12, in the order of its public documentation.
struct Properties {
  char name[256];
  unsigned char uuid[16];
  char luid[8];
  unsigned luid_mask;
  size_t total_bytes, shared_per_block;
  int registers_per_block, warp_size;
  size_t pitch;
  int threads_per_block, block_limits[3], grid_limits[3], clock_khz;
  size_t constant_bytes;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int overlap, multiprocessors, has_timeout, is_integrated, can_map_host_memory, compute_mode;
  int texture_and_surface_limits[40];
  size_t surface_alignment;
  int concurrent_kernels, ecc, pci_bus, pci_device, pci_domain, tcc_driver, async_engines, unified_addressing;
  int memory_clock_khz, memory_bus_bits, l2_bytes, persisting_l2_bytes, threads_per_multiprocessor;
  int stream_priorities, global_l1, local_l1;
  size_t shared_per_multiprocessor;
  int registers_per_multiprocessor, managed_memory, is_multi_gpu_board, board_group, host_atomics, double_ratio;
  int pageable_access, concurrent_managed_access, preemption, host_pointers_of_registered, cooperative_launch;
  int cooperative_multi_launch;
  size_t shared_per_block_optin;
  int host_page_tables, direct_managed_access, blocks_per_multiprocessor, access_policy_window;
  size_t reserved_shared_per_block;
  int host_register, sparse_arrays;
  int rest[74];
};
static_assert(sizeof(Properties) == 1032, "as large as the caller's");

static int threads_per_multiprocessor(int major, int minor) {
  if (major == 7 && minor == 5) return 1024;
  return major == 8 && (minor == 6 || minor == 9) ? 1536 : 2048;
}

PHANTOM int cudaGetDeviceProperties_v2(Properties* p, int card) {
  if (card < 0 || card >= visible_cards()) return remember(INVALID_DEVICE);
  const Config& c = config();
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", c.name);
  uuid_of(physical_index(card), p->uuid);
  p->total_bytes = c.total_bytes;
  p->major = c.major;
  p->minor = c.minor;
  p->multiprocessors = c.multiprocessors;
  p->shared_per_block = 48 << 10;
  p->shared_per_block_optin = (c.major >= 7 ? 64 : 48) << 10;
  p->shared_per_multiprocessor = 96 << 10;
  p->registers_per_block = p->registers_per_multiprocessor = 65536;
  p->warp_size = 32;
  p->pitch = 0x7fffffff;
  p->threads_per_block = p->block_limits[0] = p->block_limits[1] = 1024;
  p->block_limits[2] = 64;
  p->grid_limits[0] = 0x7fffffff;
  p->grid_limits[1] = p->grid_limits[2] = 65535;
  p->threads_per_multiprocessor = threads_per_multiprocessor(c.major, c.minor);
  p->blocks_per_multiprocessor = 32;
  p->clock_khz = 1178000;
  p->memory_clock_khz = 3505000;
  p->memory_bus_bits = 256;
  p->l2_bytes = 1835008;
  p->constant_bytes = 65536;
  p->texture_alignment = 512;
  p->texture_pitch_alignment = 32;
  p->pci_bus = physical_index(card) + 1;
  p->async_engines = 2;
  p->double_ratio = 32;
  p->overlap = p->can_map_host_memory = p->concurrent_kernels = p->unified_addressing = p->stream_priorities = 1;
  p->global_l1 = p->local_l1 = p->managed_memory = p->host_register = 1;
  p->cooperative_launch = c.major >= 6;
  return OK;
}

PHANTOM int cudaDeviceGetAttribute(int* value, int attribute, int card) {
  Properties p;
  if (int error = cudaGetDeviceProperties_v2(&p, card)) return error;
  switch (attribute) {
    case 1: *value = p.threads_per_block; break;
    case 2: case 3: case 4: *value = p.block_limits[attribute - 2]; break;
    case 5: case 6: case 7: *value = p.grid_limits[attribute - 5]; break;
    case 8: *value = int(p.shared_per_block); break;
    case 10: *value = p.warp_size; break;
    case 12: *value = p.registers_per_block; break;
    case 13: *value = p.clock_khz; break;
    case 16: *value = p.multiprocessors; break;
    case 38: *value = p.l2_bytes; break;
    case 39: *value = p.threads_per_multiprocessor; break;
    case 41: *value = p.unified_addressing; break;
    case 75: *value = p.major; break;
    case 76: *value = p.minor; break;
    case 78: *value = p.stream_priorities; break;
    case 81: *value = int(p.shared_per_multiprocessor); break;
    case 82: *value = p.registers_per_multiprocessor; break;
    case 97: *value = int(p.shared_per_block_optin); break;
    case 106: *value = p.blocks_per_multiprocessor; break;
    default: *value = 0;
  }
  return OK;
}

// --- memory ----------------------------------------------------------------------------------------------------------

PHANTOM int cudaMalloc(void** address, size_t nbytes) {
  *address = nbytes ? allocate(current_card(), nbytes) : nullptr;
  if (config().logs) fprintf(stderr, "phantom: cudaMalloc %zu -> %p\n", nbytes, *address);
  return *address || !nbytes ? OK : remember(OUT_OF_MEMORY);
}
PHANTOM int cudaFree(void* address) {
  make_current_context();
  if (config().logs) fprintf(stderr, "phantom: cudaFree %p\n", address);
  return !address || release(address) ? OK : remember(INVALID_VALUE);
}
PHANTOM int cudaMallocAsync(void** address, size_t nbytes, Stream) { return cudaMalloc(address, nbytes); }
PHANTOM int cudaFreeAsync(void* address, Stream) { return cudaFree(address); }

PHANTOM int cudaMemGetInfo(size_t* free, size_t* total) {
  make_current_context();
  *free = free_bytes(current_card());
  *total = config().total_bytes;
  return OK;
}

PHANTOM int cudaHostAlloc(void** address, size_t nbytes, unsigned) {
  make_current_context();
  const size_t mapped = nbytes ? nbytes : 1;
  void* pages = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return remember(OUT_OF_MEMORY);
  pin(pages, mapped);
  *address = pages;
  if (config().logs) fprintf(stderr, "phantom: cudaHostAlloc %zu\n", nbytes);
  return OK;
}
PHANTOM int cudaMallocHost(void** address, size_t nbytes) { return cudaHostAlloc(address, nbytes, 0); }
PHANTOM int cudaFreeHost(void* address) {
  if (!address) return OK;
  const size_t mapped = unpin(address);
  if (!mapped) return remember(INVALID_VALUE);
  munmap(address, mapped);
  return OK;
}
PHANTOM int cudaHostRegister(void* address, size_t nbytes, unsigned) {
  if (is_pinned(address)) return remember(ALREADY_REGISTERED);
  pin(address, nbytes);
  return OK;
}
PHANTOM int cudaHostUnregister(void* address) { return unpin(address) ? OK : remember(NOT_REGISTERED); }
PHANTOM int cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return OK;
}

struct PointerAttributes {
  int kind, card;  // kinds: 0 the host's, 1 the host's and pinned, 2 a card's
  void *device_pointer, *host_pointer;
};
PHANTOM int cudaPointerGetAttributes(PointerAttributes* out, const void* address) {
  void* plain = (void*)address;
  const int card = card_of(address);
  if (card >= 0)
    *out = {2, card, plain, nullptr};
  else if (is_pinned(address))
    *out = {1, current_card(), plain, plain};
  else
    *out = {0, -2, nullptr, plain};
  return OK;
}

PHANTOM int cudaMemcpy(void* to, const void* from, size_t nbytes, int) {
  make_current_context();
  copy(to, from, nbytes);
  return OK;
}
PHANTOM int cudaMemcpyAsync(void* to, const void* from, size_t nbytes, int kind, Stream) {
  return cudaMemcpy(to, from, nbytes, kind);
}
PHANTOM int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t nbytes, Stream) {
  return cudaMemcpy(to, from, nbytes, 0);
}
PHANTOM int cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, int, Stream) {
  for (size_t row = 0; row < height; row++)
    copy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
  return OK;
}
PHANTOM int cudaMemset(void* to, int value, size_t nbytes) {
  make_current_context();
  fill(to, value, nbytes);
  return OK;
}
PHANTOM int cudaMemsetAsync(void* to, int value, size_t nbytes, Stream) { return cudaMemset(to, value, nbytes); }

// --- streams and events ----------------------------------------------------------------------------------------------

PHANTOM int cudaStreamCreate(Stream* stream) {
  make_current_context();
  *stream = new_handle();
  return OK;
}
PHANTOM int cudaStreamCreateWithFlags(Stream* stream, unsigned) { return cudaStreamCreate(stream); }
PHANTOM int cudaStreamCreateWithPriority(Stream* stream, unsigned, int) { return cudaStreamCreate(stream); }
PHANTOM int cudaStreamGetPriority(Stream, int* priority) {
  *priority = 0;
  return OK;
}
PHANTOM int cudaStreamIsCapturing(Stream, int* status) {
  *status = 0;
  return OK;
}
PHANTOM int cudaStreamGetCaptureInfo_v2(
    Stream, int* status, unsigned long long* id, void** graph, const void*** dependencies, size_t* count) {
  if (status) *status = 0;
  if (id) *id = 0;
  if (graph) *graph = nullptr;
  if (dependencies) *dependencies = nullptr;
  if (count) *count = 0;
  return OK;
}
PHANTOM int cudaStreamBeginCapture(Stream, int) { return remember(NOT_SUPPORTED); }
PHANTOM int cudaLaunchHostFunc(Stream, void (*function)(void*), void* argument) {
  function(argument);
  return OK;
}
PHANTOM int cudaStreamAddCallback(Stream stream, void (*function)(Stream, int, void*), void* argument, unsigned) {
  function(stream, OK, argument);
  return OK;
}
PHANTOM int cudaEventCreate(Event* event) {
  make_current_context();
  *event = new_handle();
  return OK;
}
PHANTOM int cudaEventCreateWithFlags(Event* event, unsigned) { return cudaEventCreate(event); }
PHANTOM int cudaEventElapsedTime(float* milliseconds, Event, Event) {
  *milliseconds = 0;
  return OK;
}

// --- the driver's functions, by name ---------------------------------------------------------------------------------

PHANTOM int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long, int* status) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (status) *status = *function ? 0 : 1;
  if (!*function) fprintf(stderr, "phantom: no driver function %s\n", name);
  return OK;
}
PHANTOM int cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long flags, int* status) {
  return cudaGetDriverEntryPoint(name, function, flags, status);
}
