// libcuda: the driver's virtual memory (which torch's expandable segments use), and what torch asks of it besides.
#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "card.h"
#include "errors.h"

using namespace phantom;
using Address = unsigned long long;
using Handle = unsigned long long;

static void* const CONTEXT = (void*)0x1000;

// --- cards and contexts ----------------------------------------------------------------------------------------------

PHANTOM int cuInit(unsigned) { return OK; }
PHANTOM int cuDriverGetVersion(int* version) {
  *version = 12060;
  return OK;
}
PHANTOM int cuDeviceGetCount(int* count) {
  *count = visible_cards();
  return OK;
}
PHANTOM int cuDeviceGet(int* device, int card) {
  *device = card;
  return OK;
}
PHANTOM int cuDeviceGetName(char* out, int room, int) {
  snprintf(out, room, "%s", config().name);
  return OK;
}
PHANTOM int cuDeviceTotalMem_v2(size_t* nbytes, int) {
  *nbytes = config().total_bytes;
  return OK;
}
PHANTOM int cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 16: *value = config().multiprocessors; break;
    case 75: *value = config().major; break;
    case 76: *value = config().minor; break;
    case 102: *value = 1; break;  // has virtual memory management
    default: *value = 0;
  }
  return OK;
}
PHANTOM int cuDevicePrimaryCtxGetState(int card, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = has_context(card);
  return OK;
}
PHANTOM int cuDevicePrimaryCtxRetain(void** context, int card) {
  make_context(card);
  *context = CONTEXT;
  return OK;
}
PHANTOM int cuCtxGetCurrent(void** context) {
  *context = has_context(current_card()) ? CONTEXT : nullptr;
  return OK;
}
PHANTOM int cuCtxSetCurrent(void*) {
  make_context(current_card());
  return OK;
}

// --- errors and modules ----------------------------------------------------------------------------------------------

PHANTOM int cuGetErrorString(int error, const char** text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : "an error of the phantom card";
  return OK;
}
PHANTOM int cuGetErrorName(int, const char** text) {
  *text = "CUDA_ERROR";
  return OK;
}
PHANTOM int cuModuleLoadData(void** module, const void*) {
  *module = new_handle();
  return OK;
}
PHANTOM int cuModuleLoadDataEx(void** module, const void*, unsigned, void*, void*) {
  *module = new_handle();
  return OK;
}
PHANTOM int cuModuleGetFunction(void** function, void*, const char*) {
  *function = new_handle();
  return OK;
}
PHANTOM int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
  *blocks = 2;
  return OK;
}

// --- virtual memory: a range of addresses is reserved, physical memory is made and mapped into it --------------------

struct Physical {
  size_t nbytes;
  int card;
};
static std::mutex lock;
static std::map<Handle, Physical> made;

struct AllocationProperties {
  int kind, handle_kinds;
  int location_kind, card;
};

PHANTOM int cuMemGetAllocationGranularity(size_t* nbytes, const void*, int) {
  *nbytes = PAGE;
  return OK;
}
PHANTOM int cuMemAddressReserve(Address* address, size_t nbytes, size_t, Address, unsigned long long) {
  *address = (Address)reserve_addresses(current_card(), nbytes);
  return *address ? OK : OUT_OF_MEMORY;
}
PHANTOM int cuMemAddressFree(Address, size_t) { return OK; }
PHANTOM int cuMemCreate(Handle* handle, size_t nbytes, const AllocationProperties* properties, unsigned long long) {
  if (nbytes % PAGE) return INVALID_VALUE;
  if (!take(properties->card, nbytes)) return OUT_OF_MEMORY;
  std::lock_guard<std::mutex> guard(lock);
  *handle = (Handle)new_handle();
  made[*handle] = {nbytes, properties->card};
  return OK;
}
PHANTOM int cuMemRelease(Handle handle) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = made.find(handle);
  if (found == made.end()) return INVALID_VALUE;
  give_back(found->second.card, found->second.nbytes);  // torch has unmapped it before
  made.erase(found);
  return OK;
}
PHANTOM int cuMemMap(Address, size_t, size_t, Handle, unsigned long long) { return OK; }
PHANTOM int cuMemUnmap(Address address, size_t nbytes) {
  madvise((void*)address, nbytes, MADV_DONTNEED);
  return OK;
}
PHANTOM int cuMemSetAccess(Address, size_t, const void*, size_t) { return OK; }
